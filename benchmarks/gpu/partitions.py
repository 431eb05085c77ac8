"""One GPU as 4 and 8: policies of expert parallelism on partitions of its multiprocessors, measured and simulated.

Switch-base-128's shapes with random weights, 3 of 6 encoder layers with experts, bf16, and made-up routing replayed
onto them. Attention and dense layers run on the whole device, are timed as a phase of their own, and are the same for
all policies; the speedup of the expert phase is that of the time from the common start of all partitions to the end of
the last one. First that results are exact, then speeds by policy, each case calibrated just before on other loads, then
the simulator's word on the same runs. Entries: `exact/...`, `CASE/POLICY`, `profile/...`, `fidelity/CASE/POLICY`,
`fidelity`.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from partitions_inputs import (
    BASELINE,
    CASES,
    COLD_STEPS,
    MOE_LAYERS,
    POLICIES,
    SMALL_CASES,
    Case,
    scenario_of,
    seconds_of,
    simulate_all,
    skew_of,
)
from shapes import config_of
from timing import Report, free_memory, guarded

from moesim.backend.green import Groups, prepare, split
from moesim.backend.partition_calibrate import Effort, calibrate_partitions
from moesim.backend.partition_measure import total
from moesim.backend.partition_session import spec_of
from moesim.backend.partitions import PartitionExecutor
from moesim.backend.random_model import random_switch
from moesim.backend.shares import forward, shares
from moesim.sim.policies import make_policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.results import StepRecord
from moesim.sim.scenario import Scenario
from moesim.traces import ModelSpec

prepare()

REPEATS = 3
SPARED_S = 20.0
"""Of the budget, for the simulations."""
EXACT_TOKENS, EXACT_STEPS = 2048, 3
TOLERANCE = 1e-4
"""Largest error of float32 outputs, of the largest value."""
REPLAY_TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-5}
"""Largest difference between policies, likewise."""


def run(report: Report, *, device: str, small: bool, budget_s: float) -> None:
    end = time.monotonic() + budget_s
    cases = SMALL_CASES if small else CASES
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with guarded(report, "exact/true router"):
        exact_model(report, cases[0], device, small)
    free_memory()
    profiles: dict[Case, HardwareProfile] = {}
    measured: dict[Case, dict[str, list[dict[str, float]]]] = {}
    benches: dict[int, Bench] = {}
    took_s = 0.0
    for case in cases:
        if time.monotonic() + took_s * case.tokens / cases[0].tokens + (0 if small else SPARED_S) > end:
            report(case.name, {"skipped": f"{end - time.monotonic():.0f} s left"})
            continue
        begin = time.monotonic()
        with guarded(report, case.name):
            if case.gpus not in benches:
                benches[case.gpus] = bench = Bench(case, device, dtype, small)
                report(f"setup/{case.gpus} partitions", bench.about())
                exact_replay(report, bench)
            bench = benches[case.gpus]
            profiles[case] = calibrated(report, bench, case, small)
            measured[case] = speeds(report, bench, case, 1 if small else REPEATS)
        took_s = (time.monotonic() - begin) * cases[0].tokens / case.tokens
    for bench in benches.values():
        with guarded(report, f"setup/{bench.case.gpus} partitions, end"):
            bench.close()
    if measured:
        with guarded(report, "fidelity"):
            workers = 1 if small else min(8, os.cpu_count() or 1)
            some = next(iter(benches.values()))
            fidelity(report, some.spec, profiles, measured, some.dtype_name, workers)


class Bench:
    """A model on so many partitions, for all cases with them."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, small: bool) -> None:
        self.case, self.device = case, torch.device(device)
        self.dtype_name = str(dtype).removeprefix("torch.")
        model = model_of(case, dtype, device, small)
        self.spec = spec_of(model)
        self.groups: Groups = split(self.device, case.gpus)
        self.executor = PartitionExecutor(
            self.device, model, scenario_of(case, self.spec), routing="replay", groups=self.groups
        )

    def take(self, case: Case) -> Scenario:
        """Prepare the case's steps."""
        self.case = case
        scenario = scenario_of(case, self.spec)
        self.executor.take(scenario)
        return scenario

    def about(self) -> dict[str, Any]:
        return {
            **self.executor.describe(),
            "dtype": self.dtype_name,
            "hardware_queues": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
            "extra_slots": self.case.extra_slots,
            "spec": self.spec.to_dict(),
        }

    def close(self) -> None:
        self.executor.close()
        self.groups.close()
        del self.executor
        free_memory()


def model_of(case: Case, dtype: torch.dtype, device: str, small: bool) -> Any:
    """Every other layer of its encoder has experts."""
    config = config_of(small=small, stacks=("encoder",), experts=case.experts, layers=2 * MOE_LAYERS)
    return random_switch(config, dtype, device)


def exact_model(report: Report, case: Case, device: str, small: bool) -> None:
    """With the model's own router, in float32, slots poisoned: under every policy the unpatched model's hidden states.
    A token whose router was undecided to the last bit may go another way: they are counted."""
    tokens = 128 if small else EXACT_TOKENS
    some = replace(case, tokens=tokens, steps=EXACT_STEPS)
    model = model_of(case, torch.float32, device, small)
    spec = spec_of(model)
    scenario = scenario_of(some, spec)
    with torch.inference_mode():
        wanted = [forward(model.encoder, share) for share in shares(scenario, None, torch.device(device))]
    executor = PartitionExecutor(torch.device(device), model, scenario, poison=True)
    try:
        error: dict[str, float] = {}
        beyond = 0
        for name in POLICIES:
            off_X: list[torch.Tensor] = []

            def keep(number: int, hidden_TD: torch.Tensor, off_X: list[torch.Tensor] = off_X) -> None:
                off_TD = (hidden_TD - wanted[number]).abs() / wanted[number].abs().max()
                off_X.append(off_TD.amax(dim=1).nan_to_num(nan=float("inf")))

            executor.run(make_policy(name, scenario.cluster, scenario.fit), None, keep)
            off_T = torch.cat(off_X)
            error[name] = float(off_T.max())
            beyond += int((off_T > TOLERANCE).sum())
        report(
            "exact/true router",
            {
                **executor.describe(),
                "dtype": "float32",
                "tokens": tokens,
                "max_error_by_policy": error,
                "max_error": max(error.values()),
                "tolerance": TOLERANCE,
                "within": beyond == 0,
                "tokens_beyond": beyond,
                "tokens_compared": EXACT_STEPS * tokens * len(POLICIES),
            },
        )
    finally:
        executor.close()


def exact_replay(report: Report, bench: Bench) -> None:
    """Replayed routing, slots poisoned, every policy twice: what the baseline computes, so no kernel read weights
    before they were there. `identical`: bit for bit, as a kernel whose sums do not depend on the rows beside."""
    executor, case = bench.executor, bench.case
    name = f"exact/replay, {case.gpus} partitions"
    with guarded(report, name):
        scenario = bench.take(replace(case, steps=EXACT_STEPS))
        executor.poison = True
        outputs: dict[str, list[torch.Tensor]] = {}
        transfers = 0
        for policy in (*POLICIES, *POLICIES[1:]):
            kept: list[torch.Tensor] = []
            made = make_policy(policy, scenario.cluster, scenario.fit)
            executor.run(made, None, lambda _, hidden_TD, kept=kept: kept.append(hidden_TD.clone()))
            transfers += int(executor.scores()["transfers"] or 0)
            outputs[f"{policy} {len(outputs)}"] = kept
        executor.poison = False
        base, *others = outputs.values()
        same = all(torch.equal(a, b) for other in others for a, b in zip(base, other, strict=True))
        off = max(float((a - b).abs().max() / a.abs().max()) for o in others for a, b in zip(base, o, strict=True))
        finite = all(bool(hidden.isfinite().all()) for kept in outputs.values() for hidden in kept)
        limit = REPLAY_TOLERANCE[bench.dtype_name]
        found = {"identical": same, "max_difference": off, "finite": finite, "runs": len(outputs)}
        found |= {"tolerance": limit, "within": finite and off <= limit}
        report(name, {**found, "transfers": transfers, "dtype": bench.dtype_name})


def calibrated(report: Report, bench: Bench, case: Case, small: bool) -> HardwareProfile:
    """The profile of the case's partitions and batch, from made-up loads, not the case's."""
    bench.take(case)
    begin = time.monotonic()
    effort = Effort(samples=1, repeats=1, decision_steps=2) if small else Effort(samples=3, repeats=4, decision_steps=4)
    profile, raw = calibrate_partitions(
        bench.executor,
        dtype=bench.dtype_name,
        batch=case.tokens,
        policies=POLICIES,
        source="switch-base-128",
        effort=effort,
    )
    path = f"profile/{case.name}"
    report(path, {"seconds": time.monotonic() - begin, "profile": asdict(profile), "raw": raw})
    return profile


def speeds(report: Report, bench: Bench, case: Case, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every policy `repeats` times, in turn, after the baseline once to warm up; seconds by policy and repeat."""
    scenario = bench.take(case)
    executor = bench.executor
    policies = [make_policy(name, scenario.cluster, scenario.fit) for name in POLICIES]
    executor.run(policies[0])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in POLICIES}
    skew = skew_of(scenario)
    for repeat in range(repeats):
        for policy in policies:
            records = executor.run(policy)
            own = found[policy.name]
            own.append(seconds_of(records))
            if repeat in (0, repeats - 1):
                numbers = details(records, executor) | ratios(found[BASELINE], own)
                report(f"{case.name}/{policy.name}", {**skew, **numbers, "seconds": own, "seed": case.seed})
    return found


def ratios(base: list[dict[str, float]], own: list[dict[str, float]]) -> dict[str, Any]:
    """Speedups over the baseline, repeat by repeat, since they ran one after the other: medians and ranges."""
    found: dict[str, Any] = {"repeats": len(own)}
    for what in ("experts", "step", "step without decisions"):
        each = [a[what] / b[what] for a, b in zip(base, own, strict=False)]
        key = what.replace(" ", "_")
        found |= {f"{key}_speedup": statistics.median(each), f"{key}_speedup_range": [min(each), max(each)]}
    return found


def details(records: list[StepRecord], executor: PartitionExecutor) -> dict[str, Any]:
    """Of one run, counted steps only where not said otherwise."""
    counted = records[COLD_STEPS:]
    phases = {name: sum(r.phase_s[name] for r in counted) / len(counted) for name in counted[0].phase_s}
    load_XG = np.array([row for record in counted for row in record.load_LG], float)
    scores = executor.scores()
    return {
        "busy_share": total(executor.shares[COLD_STEPS:]).summary()["expert_busy_share"],
        "balancedness": float((load_XG.mean(axis=1) / load_XG.max(axis=1)).mean()),
        "phase_s_per_step": phases,
        "moved_bytes": sum(r.moved_bytes for r in counted),
        "hidden_bytes": sum(r.hidden_bytes for r in counted),
        "steps": len(counted),
        **{f"run_{name}": value for name, value in scores.items() if not name.startswith("expert_")},
    }


def fidelity(
    report: Report,
    spec: ModelSpec,
    profiles: dict[Case, HardwareProfile],
    measured: dict[Case, dict[str, list[dict[str, float]]]],
    dtype: str,
    workers: int,
) -> None:
    """Simulated beside measured speedups of every case and policy, and the errors of all."""
    runs = [(case, policy) for case in measured for policy in POLICIES]
    asked = [(case, spec, profiles[case], policy, dtype) for case, policy in runs]
    told = dict(zip(runs, simulate_all(asked, workers), strict=True))
    errors: dict[str, list[float]] = {}
    for case, policy in runs:
        if policy == BASELINE:
            continue
        row = beside(told[case, BASELINE], told[case, policy], measured[case][BASELINE], measured[case][policy])
        for what, error in row["errors"].items():
            errors.setdefault(what, []).append(abs(error))
        report(f"fidelity/{case.name}/{policy}", row)
    summary: dict[str, Any] = {"configurations": len(runs) - len(measured)}
    for what, found in errors.items():
        summary |= {f"{what}_median_error": statistics.median(found), f"{what}_worst_error": max(found)}
    report("fidelity", summary)


def beside(
    sim_base: dict[str, float], sim: dict[str, float], base: list[dict[str, float]], own: list[dict[str, float]]
) -> dict[str, Any]:
    """One row: speedups and seconds of both kinds; error = simulated / measured speedup - 1."""
    real = ratios(base, own)
    row: dict[str, Any] = {"errors": {}}
    for what, sim_s in sim.items():
        key = what.replace(" ", "_")
        speedup, found = sim_base[what] / sim_s, real[f"{key}_speedup"]
        row[f"{key}_simulated"], row[f"{key}_measured"] = speedup, found
        row["errors"][key] = speedup / found - 1
        row[f"{key}_simulated_s"] = sim_s
        row[f"{key}_measured_s"] = statistics.median(one[what] for one in own)
    return row
