"""Offloading on the shapes of Switch-base-128: copies, slots and kernels are real, the routing is made up and replayed.

Random routers say nothing worth predicting, so recorded-like routing is forced onto the layers (offload_trace.py
says how it is made); routers run all the same. Decode at batch 1 and 16, encoder at 1,024 tokens; 10, 25 and 50% of
the experts on the device. All policies of a case take turns in one run. The oracle of a case is the faster of two
that are shown the future: Belady's cache, and the same with perfect prefetch. "one-slot" is on-demand without a
cache: one slot a layer. int8: copies of fewer bits, unpacked on the device; their quality is another section's. Then
the same cases simulated, with profiles that were calibrated on other made-up routing. Entries: `device`,
`CASE/RESIDENT/POLICY`, `CASE/RESIDENT`, `profile/CASE/RESIDENT`, `fidelity/CASE/RESIDENT/POLICY`, `fidelity`. Shape
letters: E experts, L MoE layers.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from offload_inputs import policy_of, scenario_of
from shapes import config_of
from timing import Report, free_memory, guarded

from moesim.backend.offload import Offload
from moesim.backend.offload_calibrate import Device, calibrate_device, profile_of
from moesim.backend.offload_session import OffloadRun
from moesim.backend.random_model import random_switch
from moesim.backend.session import Pass
from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.policies import Policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.scenario import Scenario
from moesim.traces import Phase
from moesim.traces.routers import adapter_of

DTYPE = torch.bfloat16
INT8 = ":int8"
ORACLES = ("oracle", "belady")
DECODE = ("lru", "next-use", "prefetch-gates", "prefetch-sure", "oracle", "next-use:int8", "prefetch-gates:int8")
ENCODER = ("lru", "next-use", "belady", "oracle", "next-use:int8")
SMALL_DECODE, SMALL_ENCODER = ("lru", "prefetch-gates", "oracle", "lru:int8"), ("lru", "next-use", "belady")
BASE = "lru"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run under every policy, and how often."""

    name: str
    phase: Phase
    batch: int
    requests: int
    length: int
    policies: tuple[str, ...]
    repeats: int = 3


CASES = (
    Case(name="decode-1", phase=Phase.DECODE, batch=1, requests=1, length=48, policies=DECODE),
    Case(name="decode-16", phase=Phase.DECODE, batch=16, requests=16, length=24, policies=DECODE),
    Case(name="encoder-1024", phase=Phase.ENCODER, batch=1024, requests=24, length=128, policies=ENCODER, repeats=2),
)
SMALL_CASES = (
    Case(name="decode-2", phase=Phase.DECODE, batch=2, requests=2, length=6, policies=SMALL_DECODE, repeats=2),
    Case(name="encoder-48", phase=Phase.ENCODER, batch=48, requests=8, length=12, policies=SMALL_ENCODER, repeats=2),
)
EXACT_RUNS = 2
UNTIL = {"decoder": 0.55, "encoder": 0.75}
"""Share of the budget after which nothing more of a stack is begun: the other one and the simulation take some, too."""
SHARES = (0.10, 0.25, 0.50)
FIT_REQUESTS = 120


def run(report: Report, *, device: str, small: bool, budget_s: float) -> None:
    """All cases, then their simulation, as far as the budget goes; what is left out is said."""
    start = time.monotonic()
    there = torch.device(device)
    cases, shares = (SMALL_CASES, SHARES[1:2]) if small else (CASES, SHARES)
    measured: list[Measured] = []
    known: Device | None = None
    for stack in ("decoder", "encoder"):
        mine = [case for case in cases if (case.phase is Phase.ENCODER) == (stack == "encoder")]
        with guarded(report, f"setup/{stack}"):
            began = time.monotonic()
            model = random_switch(config_of(small=small, stacks=(stack,)), DTYPE, there)
            spec = adapter_of(model)[0].spec(model, adapter_of(model)[1])
            offload: Offload | None = None
            bench: Bench | None = None
            report(f"setup/{stack}", {"built_s": time.monotonic() - began, "experts": spec.num_experts})
            for case in mine:
                with guarded(report, case.name):
                    bench = Bench(report, model, spec, case, there, offload)
                    offload = bench.offload
                    known = known or bench.calibrated(report)
                    with guarded(report, f"exact/{case.name}"):
                        bench.exact()
                    for share in shares:
                        spent_s = time.monotonic() - start
                        if spent_s > UNTIL[stack] * budget_s:
                            report(f"{case.name}/{share:.0%}", {"left out": f"{spent_s:.0f} s of {budget_s:.0f} spent"})
                            continue
                        with guarded(report, f"{case.name}/{share:.0%}"):
                            measured += bench.measure(share, known)
            del model, offload, bench
        free_memory()
    with guarded(report, "fidelity"):
        workers = 1 if small else min(12, os.cpu_count() or 1)
        fidelity(report, measured, workers, start + budget_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One policy of a case as it was run, and what it takes to simulate it."""

    name: str
    base: str
    """The entry that its speedup refers to."""
    policy: str
    resident: int
    scenario: Scenario
    profile: HardwareProfile
    speedup: float
    phases: dict[str, float]


class Bench:
    """One case on one model. `offload`: the model's experts, where an earlier case has taken them."""

    def __init__(
        self, report: Report, model: Any, spec: Any, case: Case, device: torch.device, offload: Offload | None
    ) -> None:
        self._report, self._case = report, case
        self._cold = 1
        sizes = {"requests": case.requests, "length": case.length, "fit_requests": FIT_REQUESTS}
        scenarios = [scenario_of(spec, case.phase, case.batch, seed=seed, **sizes) for seed in (1, 2)]
        began = time.monotonic()
        options: dict[str, Any] = {"replay": True, "asynchronous": True}
        self._run = OffloadRun(model, scenarios[0], device, offload=offload, **options)
        self.offload = self._run.offload
        self._other = OffloadRun(model, scenarios[1], device, offload=self.offload, **options)
        for one in (self._run, self._other):
            with guarded(report, f"setup/{case.name}/graphs"):  # without them all is slower, and as right
                one.graph()
        report(f"setup/{case.name}", {"prepared_s": time.monotonic() - began, "steps": len(scenarios[0].batches)})

    def calibrated(self, report: Report) -> Device:
        """The terms that hold for every case."""
        self._packed()
        found = calibrate_device(self._other, policy_of("resident", self._other.scenario, None), copy_dtype="int8")
        shape = self.offload.patched.shape
        report(
            "device",
            {
                "expert_bytes": shape.bytes,
                "host_to_device": dict(zip(found.host.curve.nbytes, found.host.curve.seconds, strict=True)),
                "host_to_device_GB_per_s": found.host.bytes_per_s / 1e9,
                "device_to_host": dict(zip(found.back.nbytes, found.back.seconds, strict=True)),
                "copy_beside_computation": found.busy_host,
                "device_GB_per_s": found.bytes_per_s / 1e9,
                "experts": asdict(found.experts),
            },
        )
        return found

    def exact(self) -> None:
        """Hidden states of all steps under policies whose slots are poisoned, against everything on the device: the
        same kernels and the same numbers, so they are to be equal, again and again."""
        run, experts = self._run, self._run.scenario.cluster.experts
        resident = max(round(0.25 * experts), 1)
        wanted = states_of(run, policy_of("resident", run.scenario, None))
        worst, finite = {}, True
        self.offload.options = replace(self.offload.options, poison=True)
        try:
            for name in [one for one in self._case.policies if not one.endswith(INT8)]:
                for _ in range(EXACT_RUNS):
                    got = states_of(run, policy_of(name, run.scenario, resident))
                    apart = [float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)]
                    worst[name] = max(worst.get(name, 0.0), *apart)
                    finite = finite and all(bool(one.isfinite().all()) for one in got)
            self._cold = 0  # kernels and planning are compiled
        finally:
            self.offload.options = replace(self.offload.options, poison=False)
        self._report(
            f"exact/{self._case.name}",
            {
                "max_difference": max(worst.values()),
                "identical": max(worst.values()) == 0,
                "finite": finite,
                "runs": EXACT_RUNS,
                "by_policy": worst,
            },
        )

    def _packed(self) -> None:
        began = time.monotonic()
        self.offload.host.rows("int8")
        self._report(f"setup/{self._case.name}/int8", {"packed_s": time.monotonic() - began})

    def measure(self, share: float, known: Device) -> list[Measured]:
        """Every policy with so many of the experts on the device, calibration first, on other routing."""
        case, experts = self._case, self._run.scenario.cluster.experts
        resident = max(round(share * experts), 1)
        if any(name.endswith(INT8) for name in case.policies):
            self._packed()
        once = share == SHARES[0] and case.phase is Phase.DECODE  # one slot is one slot, whatever the share
        names = ("resident", *(("one-slot",) if once else ()), *case.policies)
        where = f"{case.name}/{share:.0%}"
        others = self._passes(self._other, names, resident, 1, warmup=self._cold)
        self._cold = 0
        profile = profile_of(self._other, known, others, "resident", f"measured-{where}")
        self._report(f"profile/{where}", {"decide_s": profile.decide_s, "attention": asdict(profile.gpu.attention)})
        passes = self._passes(self._run, names, resident, case.repeats, warmup=0)
        rows = {name: row_of(passes, name) for name in passes}
        for name, row in rows.items():
            self._report(f"{where}/{name}", {"resident": resident, **row})
        self._report(where, summary_of(rows, passes))
        return [
            Measured(
                name=f"{where}/{name}",
                base=f"{where}/{BASE}",
                policy=name,
                resident=resident,
                scenario=self._run.scenario,
                profile=profile,
                speedup=row["speedup"],
                phases=row["phase_s"],
            )
            for name, row in rows.items()
            if name != "one-slot"
        ]

    def _passes(
        self, run: OffloadRun, names: Sequence[str], resident: int, repeats: int, *, warmup: int
    ) -> dict[str, list[Pass]]:
        """Policy to its passes, after `warmup` of each that are not counted; all take turns."""
        policies: dict[str, tuple[Policy, str | None]] = {}
        for name in names:
            slots = 1 if name == "one-slot" else resident
            recipe = BASE if name == "one-slot" else name.removesuffix(INT8)
            policies[name] = (policy_of(recipe, run.scenario, slots), "int8" if name.endswith(INT8) else None)
        passes: dict[str, list[Pass]] = {name: [] for name in names}
        for repeat in range(-warmup, repeats):
            for name, (policy, dtype) in policies.items():
                found = run.run(policy, copy_dtype=dtype)
                if repeat >= 0:
                    passes[name].append(found)
        return passes


def states_of(run: OffloadRun, policy: Policy) -> list[torch.Tensor]:
    """The last hidden states of every step."""
    found: list[torch.Tensor] = []
    run.run(policy, keep=lambda _number, hidden: found.append(hidden))
    return found


def row_of(passes: dict[str, list[Pass]], name: str) -> dict[str, Any]:
    """The numbers of one policy: seconds of a step, speedup over LRU (repeat by repeat), and where the time went."""
    totals, base = ([total(one) for one in passes[which]] for which in (name, BASE))
    one = sorted(passes[name], key=total)[(len(totals) - 1) // 2]
    steps, layers = len(one.records), len(one.records[0].load_LG)
    ratios = [b / t for b, t in zip(base, totals, strict=True)]
    moved = sum(record.moved_bytes for record in one.records)
    return {
        "step_s": {"median_s": median(totals) / steps, "min_s": min(totals) / steps, "max_s": max(totals) / steps},
        "repeats": len(totals),
        "speedup": median(base) / median(totals),
        "speedup_range": [min(ratios), max(ratios)],
        "phase_s": {p: sum(r.phase_s[p] for r in one.records) / steps for p in one.records[0].phase_s},
        "moved_bytes": moved / steps,
        "hidden_share": sum(record.hidden_bytes for record in one.records) / max(moved, 1),
        "hit_rate": one.scores["hit_rate"],
        "late_transfers": one.scores["late_transfers"],
        "decide_host_s": float(one.scores["decide_host_s"] or 0) / steps / (layers + 1),
        "peak_memory_bytes": one.scores.get("peak_memory_bytes"),
        "routing": "replay",
    }


def total(one: Pass) -> float:
    """Seconds of all steps of a pass."""
    return sum(record.duration_s for record in one.records)


def summary_of(rows: dict[str, dict[str, Any]], passes: dict[str, list[Pass]]) -> dict[str, Any]:
    """The best causal exact policy beside the oracle, and the best with fewer bits."""
    seconds = {name: row["step_s"]["median_s"] for name, row in rows.items()}
    causal = [n for n in rows if not n.endswith(INT8) and n not in (*ORACLES, "resident", "one-slot")]
    best, oracle = (min(names, key=seconds.__getitem__) for names in (causal, [n for n in ORACLES if n in rows]))
    ratios = [total(a) / total(b) for a, b in zip(passes[best], passes[oracle], strict=True)]
    found = {
        "best_causal": best,
        "oracle": oracle,
        "ratio_to_oracle": seconds[best] / seconds[oracle],
        "ratio_to_oracle_range": [min(ratios), max(ratios)],
        "speedup_over_lru": rows[best]["speedup"],
        "oracle_speedup_over_lru": rows[oracle]["speedup"],
        "resident_speedup_over_lru": rows["resident"]["speedup"],
    }
    fewer = [name for name in rows if name.endswith(INT8)]
    if fewer:
        best_int8 = min(fewer, key=seconds.__getitem__)
        found |= {
            "best_int8": best_int8,
            "int8_speedup_over_lru": rows[best_int8]["speedup"],
            "int8_speedup_over_lru_range": rows[best_int8]["speedup_range"],
        }
    return found


def fidelity(report: Report, measured: Sequence[Measured], workers: int, ends: float) -> None:
    """Every measured policy simulated; errors of its speedup over LRU and of the seconds of a step. Each is reported as
    soon as it and its baseline are there."""
    jobs = sorted(measured, key=lambda one: one.name != one.base)  # baselines first, the others in their order
    errors: list[float] = []
    told: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        seconds: Iterable[dict[str, float]] = map(simulated, jobs)
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # a fork would copy the device's state
            pool = stack.enter_context(ProcessPoolExecutor(workers, context))
            seconds = pool.map(simulated, jobs, timeout=max(ends - time.monotonic(), 1))
        try:
            for one, found in zip(jobs, seconds, strict=True):
                told[one.name] = found
                if one.name == one.base:
                    continue
                speedup = sum(told[one.base].values()) / sum(found.values())
                errors.append(speedup / one.speedup - 1)
                apart = {"step": errors[-1], "seconds": sum(found.values()) / sum(one.phases.values()) - 1}
                row = {"simulated": speedup, "measured": one.speedup, "errors": apart}
                report(f"fidelity/{one.name}", {**row, "simulated_phase_s": found, "measured_phase_s": one.phases})
        finally:  # also of some, where the time was too short for all
            if errors:
                sizes = np.abs(errors)
                found = {"median_error": np.median(sizes), "worst_error": sizes.max()}
                report("fidelity", {"configurations": len(errors), **found})


def simulated(one: Measured) -> dict[str, float]:
    """Seconds of a step by phase. In a process of its own: nothing but plain data goes in and comes out."""
    name = one.policy.removesuffix(INT8)
    policy = replace(policy_of(name, one.scenario, one.resident), name=one.policy)
    scenario = replace(one.scenario, cluster=replace(one.scenario.cluster, resident=policy.cluster.resident))
    execution = Execution(dtype="bfloat16", copy_dtype="int8" if one.policy.endswith(INT8) else None)
    result = simulate(scenario, policy, one.profile, execution=execution, keep_steps=False)
    steps = len(scenario.batches)
    return {phase: seconds / steps for phase, seconds in result.phase_s().items()}
