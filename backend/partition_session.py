"""One invocation on partitions of a device: all policies interleaved over the repeats, or a calibration. One process.

Fits trace and model together, and says in the results what stood for GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.backend.hub import model_name
from moesim.backend.job import Job, Progress
from moesim.backend.loading import describe_job, inputs_of, model_of, spec_of
from moesim.backend.partition_calibrate import calibrate_partitions
from moesim.backend.partitions import PartitionExecutor
from moesim.backend.session import device_facts, leave_results, run_interleaved, summarise
from moesim.backend.synthetic import synthetic_scenario
from moesim.backend.utilisation import watched
from moesim.sim.policies import make_policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.residency import Cluster
from moesim.sim.results import Result
from moesim.traces import InputError, Workload
from moesim.traces.store import Trace


def run_on_partitions(job: Job, say: Progress) -> list[Result]:
    """Run every policy of the job and leave results and decision logs in its folder.

    Raises InputError where model, trace and options do not fit together.
    """
    say(0.0, "loading the model")
    device, trace = torch.device(job.device), Trace.open(Path(job.trace))
    model = model_of(job, device, trace.spec)
    scenario, encoder_table = inputs_of(job, trace, model, gpus=job.partitions)
    executor = PartitionExecutor(device, model, scenario, encoder_table, routing=job.routing)
    try:
        policies = [make_policy(name, scenario.cluster, scenario.fit) for name in job.policies]
        with watched(device) as seen:
            passes = run_interleaved(executor, policies, job, say, decisions=job.decisions)
        config = {
            **scenario.config(),
            **describe_job(job),
            **executor.describe(),
            **device_facts(device),
            "utilisation": seen.to_dict(),
        }
    finally:
        executor.close()
    results = [summarise(name, passes[name], config) for name in job.policies]
    leave_results(job, results, passes)
    return results


def calibrate_on_partitions(job: Job, say: Progress) -> HardwareProfile:
    """Measure. Raises InputError where the model cannot be used."""
    say(0.0, "loading the model")
    device = torch.device(job.device)
    executor = calibration_executor(device, model_of(job, device), job.partitions, job.extra_slots)
    try:
        profile, _ = calibrate_partitions(
            executor,
            dtype=job.dtype,
            batch=job.workload.batch,
            policies=list(job.policies),
            source=job.random or model_name(job.model) or "a random Switch model",
            say=say,
        )
    finally:
        executor.close()
    return profile


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
