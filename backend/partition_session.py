"""One invocation on partitions of a device: all policies interleaved over the repeats, or a calibration. One process.

Loads or makes the model, fits trace and model together, and says in the results what stood for GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.backend.hub import model_name
from moesim.backend.job import Job
from moesim.backend.partition_calibrate import calibrate_partitions
from moesim.backend.partitions import PartitionExecutor
from moesim.backend.session import device_name, leave_results, run_interleaved, summarise, versions
from moesim.backend.switch import load_model
from moesim.backend.synthetic import random_model, synthetic_scenario
from moesim.backend.utilisation import watched
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.residency import Cluster
from moesim.sim.results import Result
from moesim.sim.scenario import STACK_OF_PHASE, Scenario, make_scenario
from moesim.traces import InputError, ModelSpec, Phase, Workload
from moesim.traces.routers import adapter_of
from moesim.traces.store import Trace


def run_on_partitions(job: Job) -> list[Result]:
    """Run every policy of the job and leave results and decision logs in its folder.

    Raises InputError where model, trace and options do not fit together.
    """
    job.say(0, 0.0, "loading the model")
    device = torch.device(job.device)
    phase = Phase[job.phase.upper()]
    trace = Trace.open(Path(job.trace))
    model = _model(job, trace.spec, device)
    spec = with_widths(trace.spec, spec_of(model)) if job.routing == "replay" else trace.spec
    scenario = make_scenario(
        spec,
        trace.table(STACK_OF_PHASE[phase]),
        phase=phase,
        gpus=job.partitions,
        workload=job.workload,
        extra_slots=job.extra_slots,
        max_steps=job.max_steps,
        request_texts=trace.request_texts,
    )
    encoder_table = trace.table("encoder") if phase is Phase.PREFILL and "encoder" in trace.stacks else None
    executor = PartitionExecutor(device, model, scenario, encoder_table, routing=job.routing)
    try:
        policies = [make_policy(name, scenario.cluster, scenario.fit) for name in job.policies]
        with watched(device) as seen:
            passes = run_interleaved(executor, policies, job)
        config = {**describe(job, scenario, executor), "utilisation": seen.to_dict()}
    finally:
        executor.close()
    results = [summarise(name, passes[name], config) for name in job.policies]
    leave_results(job, results, passes)
    return results


def calibrate_on_partitions(job: Job) -> None:
    """Measure, and leave the profile in the job's result file. Raises InputError where the model cannot be used."""
    job.say(0, 0.0, "loading the model")
    device = torch.device(job.device)
    if job.model:
        model = load_model(Path(job.model), job.dtype)
    else:
        model = random_weights(job.random, job.dtype, device) if job.random else random_model(job.dtype)
    executor = calibration_executor(device, model, job.partitions, job.extra_slots)
    try:
        profile, _ = calibrate_partitions(
            executor,
            dtype=job.dtype,
            batch=job.workload.batch,
            policies=list(job.policies) or [name for name, parts in POLICIES.items() if not parts.simulated_only],
            source=job.random or model_name(job.model) or "a random Switch model",
            say=lambda share, what: job.say(0, share, what),
        )
    finally:
        executor.close()
    profile.save(job.result_file)


def calibration_executor(device: torch.device, model: Any, partitions: int, extra_slots: int) -> PartitionExecutor:
    """An executor over the model's encoder whose routing is made up, with one small step to begin with.

    Raises InputError where the encoder has no MoE layers.
    """
    spec = spec_of(model)
    if "encoder" not in [stack.name for stack in spec.stacks]:
        raise InputError("calibration needs a model with MoE layers in its encoder")
    layers = len(spec.stack("encoder").moe_layers)
    cluster = Cluster(layers=layers, experts=spec.num_experts, gpus=partitions, extra_slots=extra_slots)
    scenario = synthetic_scenario(spec, cluster, [[16, 16]], np.random.default_rng(0), Workload(batch=32))
    return PartitionExecutor(device, model, scenario, routing="replay")


def spec_of(model: Any) -> ModelSpec:
    """What a recording of the model would say of it."""
    adapter, routers = adapter_of(model)
    return adapter.spec(model, routers)


def describe(job: Job, scenario: Scenario, executor: PartitionExecutor) -> dict[str, Any]:
    """Everything that the measured numbers depend on, JSON types."""
    return {
        **scenario.config(),
        "model": job.random or model_name(job.model),
        "weights": "random" if job.random else "loaded",
        "trace": Path(job.trace).name,
        "dtype": job.dtype,
        "repeats": job.repeats,
        "warmup": job.warmup,
        **executor.describe(),
        "device": executor.device.type,
        "device_name": device_name(executor.device),
        "versions": versions(),
    }


def _model(job: Job, spec: ModelSpec, device: torch.device) -> Any:
    if not job.random:
        return load_model(Path(job.model), job.dtype)
    stack = STACK_OF_PHASE[Phase[job.phase.upper()]]
    if stack != "encoder":
        raise InputError("--random runs the encoder phase: a random encoder's text means nothing to a decoder")
    return random_weights(job.random, job.dtype, device, spec, stack)


def random_weights(
    name: str, dtype: str, device: torch.device, spec: ModelSpec | None = None, stack: str = "encoder"
) -> Any:
    """The named model with random weights, as deep as `spec` says: a replayed trace decides how many layers route.

    Raises InputError for an unknown name, and where the trace has another number of experts.
    """
    from moesim.backend.random_model import random_switch, switch_config

    config = switch_config(name, stacks=(stack,))
    if spec is not None:
        layers = spec.stack(stack)
        if spec.num_experts != config.num_experts:
            raise InputError(f"the trace has {spec.num_experts} experts, {name} has {config.num_experts}")
        depth, sparse = layers.num_layers, len(layers.moe_layers)
        if stack == "encoder":
            config.num_layers, config.num_sparse_encoder_layers = depth, sparse
            config.encoder_sparse_step = depth // sparse
        else:
            config.num_decoder_layers, config.num_sparse_decoder_layers = depth, sparse
            config.decoder_sparse_step = depth // sparse
    return random_switch(config, getattr(torch, dtype), device)


def with_widths(spec: ModelSpec, model: ModelSpec) -> ModelSpec:
    """The trace's spec with the model's widths where it has none. Raises InputError where it has others."""
    if spec.widths is None:
        return replace(spec, widths=model.widths, vocab_size=model.vocab_size)
    for name in ("d_model", "d_ff"):
        ours, theirs = getattr(spec.sized(), name), getattr(model.sized(), name)
        if ours != theirs:
            raise InputError(f"the trace was recorded with another model: {name} {ours}, the model has {theirs}")
    return spec
