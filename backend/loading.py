"""What a job's note names becomes what is run: a model, the steps of a trace, and what results say of both.

Knows nothing about executors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesim.backend.hub import model_name
from moesim.backend.job import Job
from moesim.backend.random_model import random_switch, switch_config
from moesim.backend.switch import load_model
from moesim.backend.synthetic import random_model
from moesim.sim.scenario import STACK_OF_PHASE, Scenario, make_scenario
from moesim.traces import Gates, InputError, ModelSpec, Phase, TokenTable
from moesim.traces.routers import adapter_of
from moesim.traces.store import Trace


def model_of(job: Job, device: torch.device, spec: ModelSpec | None = None) -> Any:
    """The model in the job's folder; else a published one with random weights (see `random_weights`), already on the
    device; else, for calibrations, a small random one."""
    if job.random:
        return random_weights(job.random, job.dtype, device, spec, STACK_OF_PHASE[Phase[job.phase.upper()]])
    return load_model(Path(job.model), job.dtype) if job.model else random_model(job.dtype)


def random_weights(
    name: str, dtype: str, device: torch.device, spec: ModelSpec | None = None, stack: str = "encoder"
) -> Any:
    """The named model with random weights, as deep as `spec` says: a replayed trace decides how many layers route.

    Raises InputError for an unknown name, and where the trace has another number of experts.
    """
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


def spec_of(model: Any) -> ModelSpec:
    """What a recording of the model would say of it."""
    adapter, routers = adapter_of(model)
    return adapter.spec(model, routers)


def with_widths(spec: ModelSpec, model: ModelSpec) -> ModelSpec:
    """The trace's spec with the model's widths where it has none. Raises InputError where it has others."""
    if spec.widths is None:
        return replace(spec, widths=model.widths, vocab_size=model.vocab_size)
    for name in ("d_model", "d_ff"):
        ours, theirs = getattr(spec.sized(), name), getattr(model.sized(), name)
        if ours != theirs:
            raise InputError(f"the trace was recorded with another model: {name} {ours}, the model has {theirs}")
    return spec


def scenario_of(
    job: Job, trace: Trace, spec: ModelSpec, *, gpus: int, resident: int | None = None, gates: Gates | None = None
) -> Scenario:
    """The steps of the job's phase. Weights are named where they decide, which those of a replay do not.

    Raises InputError as `make_scenario`.
    """
    phase = Phase[job.phase.upper()]
    made = make_scenario(
        spec,
        trace.table(STACK_OF_PHASE[phase]),
        phase=phase,
        gpus=gpus,
        workload=job.workload,
        extra_slots=job.extra_slots,
        resident=resident,
        max_steps=job.max_steps,
        request_texts=trace.request_texts,
        gates=gates,
    )
    return made if job.routing == "replay" else replace(made, model_digest=trace.model_digest)


def inputs_of(job: Job, trace: Trace, model: Any, *, gpus: int) -> tuple[Scenario, TokenTable | None]:
    """The job's steps on several GPUs, and of prefill the table of what the encoder reads, where it was recorded.

    Raises InputError as `scenario_of`, and where a replayed trace has other widths than the model.
    """
    spec = with_widths(trace.spec, spec_of(model)) if job.routing == "replay" else trace.spec
    encoder_table = trace.table("encoder") if job.phase == "prefill" and "encoder" in trace.stacks else None
    return scenario_of(job, trace, spec, gpus=gpus), encoder_table


def describe_job(job: Job) -> dict[str, Any]:
    """What results say of the job, JSON types."""
    return {
        "model": job.random or model_name(job.model),
        "weights": "random" if job.random else "loaded",
        "trace": Path(job.trace).name,
        "dtype": job.dtype,
        "routing": job.routing,
        "repeats": job.repeats,
        "warmup": job.warmup,
    }
