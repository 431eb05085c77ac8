"""One run of a sweep: its settings, and the row of numbers that comes of them. Where the rows are kept is in
sweep_store.py, who runs them in sweep_pool.py.

Two runs of equal settings are the same run and have the same key. Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np

from moesim.predictors import Predictor
from moesim.sim.engine import simulate
from moesim.sim.execution import Contention, Execution, Send
from moesim.sim.policies import POLICIES, Policy, default_baseline, is_trained, make_policy
from moesim.sim.profile import HardwareProfile, load_profile
from moesim.sim.quality import is_lossy
from moesim.sim.results import PHASES, Result
from moesim.sim.scenario import STACK_OF_PHASE, Scenario, make_scenario
from moesim.sim.totals import RARE
from moesim.traces import InputError, MoesimError, Phase, Workload, load_LE
from moesim.traces.store import Trace

Row = dict[str, Any]
SCENARIOS = 2
"""Scenarios that a process keeps: the runs of a sweep come ordered by scenario."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that one run depends on; the names are those of `moesim simulate`'s options."""

    trace: str
    policy: str
    profile: str
    gpus: int
    phase: str
    batch_tokens: int | None = 2048
    batch_requests: int | None = None
    """Requests a step, instead of tokens."""
    chunked: bool = False
    shuffle: int | None = None
    split: str = "request"
    max_steps: int | None = None
    extra_slots: int = 1
    resident: int | None = None
    shapes: str | None = None
    dtype: str | None = None
    contention: Contention = "none"
    tensor_parallel: int = 1
    micro_batches: int = 1
    overlap: bool = True
    send: Send = "per-expert"
    copy_dtype: str | None = None

    @property
    def key(self) -> str:
        """Names the run: a digest of all settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    def workload(self) -> Workload:
        """How the recording becomes steps. Raises InputError for what cannot be."""
        told: dict[str, Any] = {"shuffle": self.shuffle, "split": self.split, "chunked": self.chunked}
        if self.batch_requests is not None:
            return Workload(batch=self.batch_requests, unit="requests", **told)
        return Workload(batch=2048 if self.batch_tokens is None else self.batch_tokens, **told)

    def execution(self) -> Execution:
        """How the model is executed. Raises InputError for what cannot be."""
        return Execution(**{one.name: getattr(self, one.name) for one in fields(Execution)})

    def baseline(self, asked: str | None = None) -> Settings:
        """The same run under the policy that its speedup refers to."""
        return replace(self, policy=asked or default_baseline(self.resident))

    def scenario_key(self) -> tuple[Any, ...]:
        """Equal where the same tokens run in the same steps on the same cluster."""
        apart = {"policy", "profile", *(one.name for one in fields(Execution))}
        return tuple(getattr(self, one.name) for one in fields(self) if one.name not in apart)

    def fit_key(self) -> tuple[str, ...]:
        """Equal where policies are fitted on the same requests."""
        return self.trace, self.phase, self.split


AXES = tuple(one.name for one in fields(Settings))
"""Names of the settings; each may have several values in a sweep."""
TYPES: dict[str, tuple[type, ...]] = {
    name: tuple(dict.fromkeys(str if isinstance(one, str) else one for one in get_args(kind) or [kind]))
    for name, kind in get_type_hints(Settings).items()
}
"""What the values of a setting may be; NoneType where it may be left out."""


def every_policy(*, offload: bool) -> list[str]:
    """The named policies that `all` means: each once whatever its names, none that trains a net first; with `offload`
    those for fewer slots than experts, else the others."""
    found: dict[int, str] = {}
    for name, parts in POLICIES.items():
        if (parts.miss is not None) == offload and not is_trained(name):
            found.setdefault(id(parts), name)
    return list(found.values())


def check_axes(axes: Mapping[str, Sequence[Any]]) -> None:
    """Raise InputError for a setting that there is not, has no values, or values of another type."""
    for name, values in axes.items():
        if name not in TYPES:
            raise InputError(f"{name} is no setting of a run; known: {', '.join(AXES)}")
        if not values:
            raise InputError(f"{name} has no values: give at least one")
        for value in values:
            if type(value) not in TYPES[name]:
                wanted = " or ".join(one.__name__ for one in TYPES[name] if one is not NoneType)
                raise InputError(f"{name} must be {wanted}, got {value!r}")


def points(axes: Mapping[str, Sequence[Any]], baseline: str | None = None) -> list[Settings]:
    """Every combination of the axes' values, and the run that each speedup refers to; each once, neighbours share
    their scenario. Raises InputError as `check_axes`."""
    check_axes(axes)
    inner = ("policy", "profile", *(one.name for one in fields(Execution)))
    order = [name for name in AXES if name in axes and name not in inner] + [n for n in inner if n in axes]
    found: dict[Settings, None] = {}
    for values in product(*(axes[name] for name in order)):
        one = Settings(**dict(zip(order, values, strict=True)))
        found[one.baseline(baseline)] = None
        found[one] = None
    return list(found)


class Runner:
    """Runs settings in one process; keeps traces, the latest scenarios, and the predictors of the requests that were
    fitted on last."""

    def __init__(self) -> None:
        self._traces: dict[str, Trace] = {}
        self._profiles: dict[str, HardwareProfile] = {}
        self._scenarios: dict[tuple[Any, ...], tuple[Scenario, float]] = {}
        self._fit_key: tuple[str, ...] = ()
        self._fitted: dict[str, Predictor] = {}

    def rows(self, settings: Iterable[Settings]) -> Iterator[Row]:
        """A row for each; what cannot run has a reason instead of numbers."""
        for one in settings:
            try:
                yield {**_blank(one), **self._numbers(one)}
            except MoesimError as error:
                yield {**_blank(one), "reason": " ".join(str(error).split())}

    def _run(self, one: Settings) -> tuple[Result, Policy, Scenario, float]:
        """The result, the policy as it was fitted, what ran and its skew. Raises what `make_scenario`, `make_policy`
        and `simulate` raise."""
        profile = self._profile(one.profile)
        profile.check_gpus(one.gpus)
        execution = one.execution()
        scenario, skew = self._scenario(one, profile.node_size)
        policy = self._policy(one, scenario)
        result = simulate(scenario, policy, profile, execution=execution, keep_steps=False)
        return result, policy, scenario, skew

    def _numbers(self, one: Settings) -> Row:
        result, policy, scenario, skew = self._run(one)
        return {**numbers(result, policy, scenario.spec.expert_bytes(result.config["dtype"])), "skew": skew}

    def _profile(self, name: str) -> HardwareProfile:
        if name not in self._profiles:
            self._profiles[name] = load_profile(name)
        return self._profiles[name]

    def _scenario(self, one: Settings, node_size: int) -> tuple[Scenario, float]:
        key = (*one.scenario_key(), node_size)
        if key not in self._scenarios:
            if one.trace not in self._traces:
                self._traces[one.trace] = Trace.open(Path(one.trace))
            scenario = scenario_of(self._traces[one.trace], one, node_size)
            while len(self._scenarios) >= SCENARIOS:
                del self._scenarios[next(iter(self._scenarios))]
            self._scenarios[key] = scenario, skew_of(scenario)
        return self._scenarios[key]

    def _policy(self, one: Settings, scenario: Scenario) -> Policy:
        """Fitted once for equal requests; every run gets a copy, since some predictors learn while they run."""
        if one.fit_key() != self._fit_key:
            self._fitted.clear()
            self._fit_key = one.fit_key()
        known = deepcopy(self._fitted.get(one.policy))
        policy = make_policy(one.policy, scenario.cluster, scenario.fit, scenario.gates, fitted=known)
        if known is None and policy.predictor is not None:
            self._fitted[one.policy] = deepcopy(policy.predictor)
        return policy


def scenario_of(trace: Trace, one: Settings, node_size: int) -> Scenario:
    """What `moesim simulate` would run with these settings on nodes of `node_size` GPUs. Raises InputError as
    `make_scenario`."""
    if one.phase.upper() not in Phase.__members__:
        known = ", ".join(phase.name.lower() for phase in Phase)
        raise InputError(f"unknown phase {one.phase!r}; known: {known}")
    phase = Phase[one.phase.upper()]
    spec = trace.spec.with_widths(one.shapes) if one.shapes else trace.spec
    spec.sized()
    scenario = make_scenario(
        spec,
        trace.rows(STACK_OF_PHASE[phase]),
        phase=phase,
        gpus=one.gpus,
        workload=one.workload(),
        extra_slots=one.extra_slots,
        resident=one.resident,
        max_steps=one.max_steps,
        request_texts=trace.request_texts,
        gates=trace.gates(STACK_OF_PHASE[phase]),
        node_size=node_size,
    )
    return replace(scenario, model_digest=trace.model_digest)


def skew_of(scenario: Scenario) -> float:
    """Max / mean load of the experts over the tokens that are run, mean of the layers."""
    rows = np.concatenate([batch.rows for batch in scenario.batches])
    counts_LE = load_LE(scenario.run.topk_ids[rows], scenario.cluster.experts)
    return float((counts_LE.max(axis=1) / counts_LE.mean(axis=1)).mean())


METRICS = (
    "latency_p50_s",
    "latency_p95_s",
    "latency_p99_s",
    "throughput_tokens_per_s",
    "balancedness_mean_of_ratios",
    "balancedness_ratio_of_sums",
    "steps",
    "tokens",
    "moved_bytes",
    "hidden_bytes",
    "recall",
    "load_error",
    "late_transfers",
)
TEXTS = ("profile_kind", "moesim", "reason")
NUMBERS: dict[str, type] = {
    **dict.fromkeys(TEXTS, str),
    "total_s": float,
    **{name: int if name in ("steps", "tokens", "moved_bytes", "hidden_bytes", "late_transfers") else float
       for name in METRICS},
    **{f"{phase}_s": float for phase in PHASES},
    **dict.fromkeys(RARE, int),
    "expert_bytes_per_gpu": int,
    "hit_rate": float,
    "skew": float,
    "lossy": bool,
}  # fmt: skip
"""Columns of a row beside the settings and the key, and their types; empty where a run has no such number."""


def _blank(one: Settings) -> Row:
    return {"key": one.key, **asdict(one), **dict.fromkeys(NUMBERS)}


def numbers(result: Result, policy: Policy, expert_bytes: int) -> Row:
    """What a sweep keeps of a run; `expert_bytes` are those of one expert."""
    metrics = result.metrics()
    return {
        "profile_kind": result.config["profile_kind"],
        "moesim": result.config["moesim"],
        "total_s": result.total_s,
        **{name: metrics.get(name) for name in METRICS},
        **{f"{phase}_s": seconds for phase, seconds in result.phase_s().items()},
        **{name: getattr(result.totals, name) for name in RARE},
        "expert_bytes_per_gpu": policy.cluster.gpu_slots * expert_bytes,
        "hit_rate": metrics.get("cache", {}).get("hit_rate"),
        "lossy": is_lossy(result) or result.totals.lost_tokens > 0,
    }


Progress = Callable[[int], None]
"""Is told how many runs have just ended."""
