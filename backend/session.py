"""One invocation on one rank: all policies in one process group, interleaved over the repeats, and their results.

Interleaved, so that whatever else the machine does hits all policies alike and their ratios hold. Knows nothing about
how processes are started.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from moesim.backend.hub import model_name
from moesim.backend.job import Job
from moesim.backend.parallel import Executor
from moesim.backend.ranks import Ranks
from moesim.backend.switch import load_model
from moesim.backend.utilisation import watched
from moesim.sim.driver import DecisionLog, Sink
from moesim.sim.policies import Policy, make_policy
from moesim.sim.results import Result, StepRecord, save_results
from moesim.sim.scenario import STACK_OF_PHASE, Scenario, make_scenario
from moesim.sim.timeline import Span
from moesim.traces import Phase


class Pass(NamedTuple):
    """One pass over all steps."""

    records: list[StepRecord]
    scores: dict[str, float | int | None]
    """The driver's."""
    decisions: str = ""
    """The decision log; empty where it is not wanted."""
    spans: Sequence[Span] = ()
    """What happened when, likewise."""


def run_policies(job: Job, ranks: Ranks) -> list[Result]:
    """Run every policy of the job; rank 0 leaves results and decision logs in the job's folder.

    Raises InputError where model, trace and options do not fit together.
    """
    executor = _executor(job, ranks)
    scenario = executor.scenario
    policies = [make_policy(name, scenario.cluster, scenario.fit) for name in job.policies]
    with watched(ranks.device) as seen:
        passes = run_interleaved(executor, policies, job, ranks.rank)
    config = {**describe(job, scenario, ranks), "utilisation": seen.to_dict()}
    results = [summarise(name, passes[name], config) for name in job.policies]
    if ranks.rank == 0:
        leave_results(job, results, passes)
    return results


def leave_results(job: Job, results: list[Result], passes: dict[str, list[Pass]]) -> None:
    """Results, and decision logs where they are wanted, go into the job's folder."""
    save_results(results, job.result_file)
    if job.decisions:
        for name in job.policies:
            job.decision_file(name).write_text(_median_pass(passes[name]).decisions, encoding="utf-8")


class Runs(Protocol):
    """An executor: of one rank, or of the partitions of one device."""

    def run(self, policy: Policy, sink: Sink | None = None) -> list[StepRecord]:
        """All steps under `policy`."""

    def scores(self) -> dict[str, float | int | None]:
        """Of the last run."""

    def spans(self) -> list[Span]:
        """What happened when in the last run."""


def run_interleaved(executor: Runs, policies: list[Policy], job: Job, rank: int = 0) -> dict[str, list[Pass]]:
    """The counted passes of every policy, in order, after `job.warmup` passes of each that are not counted."""
    passes: dict[str, list[Pass]] = {policy.name: [] for policy in policies}
    total = (job.warmup + job.repeats) * len(policies)
    done = 0
    for repeat in range(-job.warmup, job.repeats):
        for policy in policies:
            counting = f"repeat {repeat + 1} of {job.repeats}" if repeat >= 0 else "warming up"
            job.say(rank, done / total, f"{policy.name}: {counting}")
            log = DecisionLog() if job.decisions and rank == 0 else None
            records = executor.run(policy, log)
            if repeat >= 0:
                spans = executor.spans() if job.timeline else []
                passes[policy.name].append(Pass(records, executor.scores(), log.text() if log else "", spans))
            done += 1
    return passes


def summarise(policy: str, passes: list[Pass], config: dict[str, Any]) -> Result:
    """The pass with the median total time, and the spread of all of them."""
    totals = [_total_s(one) for one in passes]
    median = _median_pass(passes)
    spread: dict[str, float | int | None] = {
        "repeats": len(passes),
        "total_s_median": statistics.median(totals),
        "total_s_min": min(totals),
        "total_s_max": max(totals),
    }
    return Result(
        kind="measured",
        policy=policy,
        config={**config, "repeat_total_s": totals},
        steps=median.records,
        scores={**median.scores, **spread},
        spans=list(median.spans),
    )


def describe(job: Job, scenario: Scenario, ranks: Ranks) -> dict[str, Any]:
    """Everything that the measured numbers depend on, JSON types."""
    return {
        **scenario.config(),
        "model": model_name(job.model),
        "trace": Path(job.trace).name,
        "ranks": ranks.size,
        "dtype": job.dtype,
        "routing": "model",
        "repeats": job.repeats,
        "warmup": job.warmup,
        **describe_device(ranks),
    }


def describe_device(ranks: Ranks) -> dict[str, Any]:
    """Device, its name, communication backend, threads and library versions."""
    return {
        "device": ranks.device.type,
        "device_name": device_name(ranks.device),
        "backend": "nccl" if ranks.on_gpu else "gloo",
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the libraries that the numbers depend on."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def device_name(device: torch.device) -> str:
    """The GPU's or processor's name, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _executor(job: Job, ranks: Ranks) -> Executor:
    from moesim.traces.store import Trace

    job.say(ranks.rank, 0.0, "loading the model")
    phase = Phase[job.phase.upper()]
    trace = Trace.open(Path(job.trace))
    scenario = make_scenario(
        trace.spec,
        trace.table(STACK_OF_PHASE[phase]),
        phase=phase,
        gpus=ranks.size,
        workload=job.workload,
        extra_slots=job.extra_slots,
        max_steps=job.max_steps,
        request_texts=trace.request_texts,
    )
    encoder_table = trace.table("encoder") if phase is Phase.PREFILL else None
    return Executor(ranks, load_model(Path(job.model), job.dtype), scenario, encoder_table)


def _total_s(one: Pass) -> float:
    return sum(record.duration_s for record in one.records)


def _median_pass(passes: list[Pass]) -> Pass:
    return sorted(passes, key=_total_s)[(len(passes) - 1) // 2]
