"""One invocation on a device whose slots do not hold every expert: fits model and trace together.

Knows nothing about terminals.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.backend.job import Job, Progress
from moesim.backend.loading import describe_job, model_of, scenario_of, spec_of, with_widths
from moesim.backend.offload_calibrate import calibrate_device, profile_of
from moesim.backend.offload_options import RESIDENT, Offloading
from moesim.backend.offload_session import OffloadRun, results_of, run_interleaved
from moesim.backend.session import leave_results
from moesim.backend.synthetic import synthetic_table
from moesim.backend.utilisation import watched
from moesim.sim.policies import Policy, make_policy, recipe
from moesim.sim.profile import HardwareProfile
from moesim.sim.residency import Cluster
from moesim.sim.results import Result
from moesim.sim.scenario import STACK_OF_PHASE, Scenario
from moesim.traces import InputError, ModelSpec, Phase
from moesim.traces.store import Trace
from moesim.traces.workload import batches

REQUEST_TOKENS = 64
"""Tokens of a made-up request in a calibration."""
CALIBRATION_STEPS = 24


def run_offload(job: Job, asked: Offloading, say: Progress) -> list[Result]:
    """Run every policy of the job, and leave results and decision logs in its folder.

    Raises InputError where model, trace and options do not fit together.
    """
    say(0.0, "loading the model")
    device, trace = torch.device(job.device), Trace.open(Path(job.trace))
    phase, replay = Phase[job.phase.upper()], job.routing == "replay"
    model = model_of(job, device, trace.spec)
    of_model = spec_of(model)
    scenario = scenario_of(
        job,
        trace,
        _with_widths(trace.spec, of_model) if replay else trace.spec,
        gpus=1,
        resident=asked.slots(of_model.num_experts),
        gates=trace.gates(STACK_OF_PHASE[phase]),
    )
    texts: dict[str, Any] = {}
    if phase is Phase.DECODE and not replay and "encoder" in trace.stacks:
        decoder = trace.table("decoder")
        texts = {"encoder_table": trace.table("encoder"), "prompts": decoder.take(decoder.phase == Phase.PREFILL)}
    run = OffloadRun(model, scenario, device, replay=replay, copy_dtype=asked.copy_dtype, **texts)
    policies = [_policy(name, scenario) for name in job.policies]
    run.graph()
    with watched(device) as seen:
        passes = run_interleaved(
            run,
            policies,
            repeats=job.repeats,
            warmup=job.warmup,
            say=say,
            decisions=job.decisions,
            spans=job.timeline,
        )
    results = results_of(passes, policies, run, {**describe_job(job), "utilisation": seen.to_dict()})
    leave_results(job, results, passes)
    return results


def calibrate_offload(job: Job, asked: Offloading, say: Progress) -> HardwareProfile:
    """A profile for the job's phase, batch and number of slots, from made-up routing. Raises InputError where the model
    cannot be used, or a policy cannot be fitted on ids alone."""
    say(0.0, "loading the model")
    device, phase = torch.device(job.device), Phase[job.phase.upper()]
    stack = STACK_OF_PHASE[phase]
    model = model_of(job, device)
    spec = spec_of(model)
    if stack not in [one.name for one in spec.stacks]:
        raise InputError(f"the model has no MoE layers in its {stack}")
    scenario = _made_up(spec, job, phase, asked.slots(spec.num_experts))
    run = OffloadRun(model, scenario, device, replay=True, copy_dtype=asked.copy_dtype)
    resident = _policy(RESIDENT, scenario)
    say(0.1, "link, experts and rates")
    known = calibrate_device(run, resident, asked.copy_dtype)
    run.graph()
    policies = [resident, *(_policy(name, scenario) for name in job.policies if name != RESIDENT)]
    passes = run_interleaved(
        run, policies, repeats=2, warmup=1, say=lambda done, what: say(0.3 + 0.7 * done, f"decisions of {what}")
    )
    return profile_of(run, known, passes, RESIDENT, "measured-offload")


def _made_up(spec: ModelSpec, job: Job, phase: Phase, slots: int) -> Scenario:
    rng, stack = np.random.default_rng(0), spec.stack(STACK_OF_PHASE[phase])
    decode = phase is Phase.DECODE
    batch = job.workload.batch
    requests = batch if decode else CALIBRATION_STEPS // 4 * max(batch // REQUEST_TOKENS, 1)
    lengths = [CALIBRATION_STEPS if decode else min(REQUEST_TOKENS, batch)] * requests
    fit, run = (synthetic_table(spec, len(stack.moe_layers), lengths, rng) for _ in range(2))
    fit, run = (replace(table, phase=np.full(len(table), phase, np.uint8)) for table in (fit, run))
    return Scenario(
        spec=spec,
        phase=phase,
        cluster=Cluster(
            layers=len(stack.moe_layers),
            experts=spec.num_experts,
            gpus=1,
            extra_slots=0,
            top_k=spec.top_k,
            resident=slots,
        ),
        workload=job.workload,
        fit=fit,
        run=run,
        batches=tuple(batches(run, job.workload, phase)),
    )


def _policy(name: str, scenario: Scenario) -> Policy:
    slots = scenario.cluster.resident if recipe(name).miss is not None else None
    return make_policy(name, replace(scenario.cluster, resident=slots), scenario.fit, scenario.gates)


def _with_widths(spec: ModelSpec, model: ModelSpec) -> ModelSpec:
    """The trace's spec, with the model's stacks and widths where it has none of its own. Raises InputError where it has
    others."""
    return replace(model, family=spec.family) if spec.widths is None else with_widths(spec, model)
