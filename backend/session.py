"""One invocation on one rank: all policies in one process group, interleaved over the repeats, and their results.

Interleaved, so that whatever else the machine does hits all policies alike and their ratios hold. Knows nothing about
how processes are started.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from moesim.backend.job import Job, Progress
from moesim.backend.loading import describe_job, inputs_of, model_of
from moesim.backend.parallel import Executor
from moesim.backend.ranks import Ranks
from moesim.backend.utilisation import watched
from moesim.sim.driver import DecisionLog, Sink
from moesim.sim.policies import Policy, make_policy
from moesim.sim.results import Result, StepRecord, save_results
from moesim.sim.timeline import Span
from moesim.traces.store import Trace


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
    say = partial(job.say, ranks.rank)
    say(0.0, "loading the model")
    trace = Trace.open(Path(job.trace))
    model = model_of(job, ranks.device, trace.spec)
    scenario, encoder_table = inputs_of(job, trace, model, gpus=ranks.size)
    executor = Executor(ranks, model, scenario, encoder_table, routing=job.routing)
    policies = [make_policy(name, scenario.cluster, scenario.fit) for name in job.policies]
    with watched(ranks.device) as seen:
        passes = run_interleaved(executor, policies, job, say, decisions=job.decisions and ranks.rank == 0)
    config = {
        **scenario.config(),
        **describe_job(job),
        "executor": "ranks",
        "ranks": ranks.size,
        **describe_device(ranks),
        "utilisation": seen.to_dict(),
    }
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


def run_interleaved(
    executor: Runs, policies: Sequence[Policy], job: Job, say: Progress, *, decisions: bool
) -> dict[str, list[Pass]]:
    """Policy to its counted passes, as many as the job asks for; `decisions`: with their logs."""

    def one(policy: Policy, log: DecisionLog | None) -> Pass:
        records = executor.run(policy, log)
        spans = executor.spans() if job.timeline else []
        return Pass(records, executor.scores(), log.text() if log else "", spans)

    return take_turns(one, policies, repeats=job.repeats, warmup=job.warmup, say=say, decisions=decisions)


def take_turns(
    one: Callable[[Policy, DecisionLog | None], Pass],
    policies: Sequence[Policy],
    *,
    repeats: int,
    warmup: int,
    say: Progress | None = None,
    decisions: bool = False,
) -> dict[str, list[Pass]]:
    """Policy to its counted passes, after `warmup` of each that are not counted; all policies take turns. `one` makes
    a pass, and is given a log where there are to be `decisions`."""
    passes: dict[str, list[Pass]] = {policy.name: [] for policy in policies}
    turns = list(product(range(-warmup, repeats), policies))
    for done, (repeat, policy) in enumerate(turns):
        if say:
            counting = f"repeat {repeat + 1} of {repeats}" if repeat >= 0 else "warming up"
            say(done / len(turns), f"{policy.name}: {counting}")
        found = one(policy, DecisionLog() if decisions else None)
        if repeat >= 0:
            passes[policy.name].append(found)
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


def describe_device(ranks: Ranks) -> dict[str, Any]:
    """The ranks' devices, with communication backend and threads."""
    return {
        **device_facts(ranks.device),
        "backend": "nccl" if ranks.on_gpu else "gloo",
        "threads_per_rank": torch.get_num_threads(),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Device, its name and library versions."""
    return {"device": device.type, "device_name": device_name(device), "versions": versions()}


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


def _total_s(one: Pass) -> float:
    return sum(record.duration_s for record in one.records)


def _median_pass(passes: list[Pass]) -> Pass:
    return sorted(passes, key=_total_s)[(len(passes) - 1) // 2]
