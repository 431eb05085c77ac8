"""What the benchmark of partitions runs: workloads, and the simulation of the same runs.

Everything is made from numbers that stand in the report, so that simulations can be repeated anywhere, long after the
measurement. Shape letters: L MoE layers, E experts, G partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import starmap
from multiprocessing import get_context
from typing import Any

import numpy as np

from moesim.backend.synthetic import skewed_table
from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.policies import make_policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.results import StepRecord
from moesim.sim.scenario import Scenario, make_scenario
from moesim.traces import ModelSpec, Phase, Workload, load_LE

POLICIES = ("contiguous", "balanced", "eplb", "predictive-layer", "predictive-batch", "oracle-batch")
BASELINE = POLICIES[0]
MOE_LAYERS = 3
COLD_STEPS = 1
"""The first step, in which policies plan all layers anew, is not counted, neither measured nor simulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload on so many partitions. Seeds are those of the first workloads of 500 whose contiguous placement is
    at most .6 balanced, mean of the layers, and whose busiest expert has 6 to 31 times the mean load."""

    gpus: int
    tokens: int
    """Of a step."""
    spread: float
    seed: int
    steps: int = 10
    """One more than an interval of EPLB, so that it lays out its experts once in the counted ones."""
    extra_slots: int = 2
    experts: int = 128
    request_tokens: int = 128

    @property
    def name(self) -> str:
        return f"{self.gpus} partitions/{self.tokens} tokens/spread {self.spread}"


CASES = (
    Case(gpus=8, tokens=16384, spread=1.1, seed=11),
    Case(gpus=8, tokens=16384, spread=1.4, seed=4),
    Case(gpus=4, tokens=16384, spread=1.4, seed=89),
    Case(gpus=4, tokens=16384, spread=1.6, seed=158),
    Case(gpus=8, tokens=32768, spread=1.4, seed=4),
    Case(gpus=4, tokens=32768, spread=1.6, seed=158),
)
"""In the order of their worth, should the time not suffice for all."""
SMALL_CASES = (Case(gpus=2, tokens=256, spread=1.0, seed=1, steps=3, extra_slots=1, experts=8, request_tokens=32),)


@lru_cache(maxsize=4)
def scenario_of(case: Case, spec: ModelSpec) -> Scenario:
    """The case's steps, and as many tokens again for policies to be fitted on."""
    # Requests go to either half by a hash: a tenth more, so that there are enough.
    count = int(2.2 * case.tokens * case.steps) + 2 * case.request_tokens
    table = skewed_table(
        case.experts,
        MOE_LAYERS,
        count,
        np.random.default_rng(case.seed),
        spread=case.spread,
        request_tokens=case.request_tokens,
    )
    return make_scenario(
        spec,
        table,
        phase=Phase.ENCODER,
        gpus=case.gpus,
        workload=Workload(batch=case.tokens),
        extra_slots=case.extra_slots,
        max_steps=case.steps,
    )


def skew_of(scenario: Scenario) -> dict[str, Any]:
    """How unequal the steps are: [L] max / mean expert load, and mean / max of partitions' loads by expert number."""
    load_LX = load_LE(scenario.run.topk_ids, scenario.spec.num_experts)
    per_LG = load_LX.reshape(len(load_LX), scenario.cluster.gpus, -1).sum(axis=2)
    return {
        "max_over_mean_L": (load_LX.max(axis=1) / load_LX.mean(axis=1)).round(2).tolist(),
        "contiguous_balancedness": float((per_LG.mean(axis=1) / per_LG.max(axis=1)).mean()),
    }


def seconds_of(steps: list[StepRecord]) -> dict[str, float]:
    """Of the counted steps: all, experts, and what is not deciding."""
    counted = steps[COLD_STEPS:]
    total = sum(step.duration_s for step in counted)
    decide = sum(step.phase_s["decide"] for step in counted)
    return {
        "step": total,
        "experts": sum(step.phase_s["experts"] for step in counted),
        "step without decisions": total - decide,
    }


def simulated(case: Case, spec: ModelSpec, profile: HardwareProfile, policy: str, dtype: str) -> dict[str, float]:
    """What `seconds_of` says of the same run in the simulator."""
    scenario = scenario_of(case, spec)
    made = make_policy(policy, scenario.cluster, scenario.fit)
    return seconds_of(simulate(scenario, made, profile, execution=Execution(dtype=dtype)).steps)


Run = tuple[Case, ModelSpec, HardwareProfile, str, str]
"""The arguments of `simulated`."""


def simulate_all(runs: Sequence[Run], workers: int) -> list[dict[str, float]]:
    """`simulated` of every run, in their order, in so many processes."""
    if workers == 1:
        return list(starmap(simulated, runs))
    # Fresh ones: a process that has used CUDA cannot be forked.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(simulated, *zip(*runs, strict=True)))
