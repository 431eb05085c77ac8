"""What is left of steps when they are over: sums and quantiles whose size does not grow with their number.

Shape letters: L MoE layers, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from moesim.sim.cachestats import CacheTotals
from moesim.traces import InputError

PHASES = ("attention", "decide", "communication", "experts", "blocked")
"""attention: dense part before the router, slowest GPU. decide: predictor and planner. communication: both all-to-alls
and all-reduces, waiting included. experts: slowest GPU. blocked: waiting for demand transfers. Where micro-batches
overlap, an instant counts once: as computing if anybody computes, else as communication, else as blocked or decide."""

SUMS = ("moved_bytes", "hidden_bytes")
RARE = ("lost_tokens", "rounded_tokens", "skipped_tokens", "substituted_tokens", "host_tokens", "extrapolated")
"""Numbers of a step that are added up; the rare ones are reported where they are not 0."""
EXACT = 65_536
"""Values that `Quantiles` keeps as they are."""
WIDTH = 0.001
"""Relative width of the bins that hold values beyond."""


@dataclass(slots=True)
class Quantiles:
    """Percentiles of a stream of positive numbers: exact up to 65,536 values, then from bins 0.1% wide."""

    values: list[float] = field(default_factory=list)
    bins: dict[int, int] = field(default_factory=dict)
    """Number of a bin, log(value) / WIDTH rounded down, to how many values it holds; empty while all are kept."""
    zeros: int = 0
    """Values of 0, once there are bins."""

    def add(self, value: float) -> None:
        """Take one value, not negative."""
        if self.bins or self.zeros:
            self._put(value)
            return
        self.values.append(value)
        if len(self.values) > EXACT:
            for kept in self.values:
                self._put(kept)
            self.values = []

    def _put(self, value: float) -> None:
        if value > 0:
            number = math.floor(math.log(value) / WIDTH)
            self.bins[number] = self.bins.get(number, 0) + 1
        else:
            self.zeros += 1

    def __len__(self) -> int:
        return len(self.values) + sum(self.bins.values()) + self.zeros

    def percentiles(self, asked: Sequence[float]) -> list[float]:
        """The value below which so many percent lie, between neighbours by their distance; NaN where there are none."""
        steps = [(value, 1) for value in sorted(self.values)]
        if self.zeros or self.bins:
            steps = [(0.0, self.zeros)] if self.zeros else []
            steps += [(math.exp((number + 0.5) * WIDTH), count) for number, count in sorted(self.bins.items())]
        return [_at(steps, (len(self) - 1) * percent / 100) for percent in asked]


def _at(steps: list[tuple[float, int]], rank: float) -> float:
    """The value at a fractional rank (0 is the smallest) of values that come with counts."""
    if not steps:
        return math.nan
    low, part = math.floor(rank), rank - math.floor(rank)
    seen = 0
    for i, (value, count) in enumerate(steps):
        seen += count
        if low < seen:
            above = value if low + 1 < seen or i + 1 == len(steps) else steps[i + 1][0]
            return value + (above - value) * part
    return steps[-1][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One executed step."""

    duration_s: float
    tokens: int
    phase_s: dict[str, float]
    """Seconds on the critical path by phase, keys of PHASES."""
    load_LG: list[list[int]]
    """[L, G] tokens that each GPU computed in each layer; with micro-batches a row for each of them and layer."""
    busy_s: list[float]
    """[G] seconds that each GPU computed (attention and experts)."""
    moved_bytes: int = 0
    """Bytes of expert weights whose copy ended in this step."""
    hidden_bytes: int = 0
    """Of these, bytes that nobody waited for."""
    lost_tokens: int = 0
    """(token, expert) pairs that nobody computed, because no living GPU held the expert."""
    rounded_tokens: int = 0
    """(token, expert) pairs computed with weights that were copied in a smaller dtype: not exact."""
    precision_pairs: dict[str, int] = field(default_factory=dict)
    """Of these, by the copies' precision."""
    skipped_tokens: int = 0
    """(token, expert) pairs that the policy left out: not exact."""
    substituted_tokens: int = 0
    """(token, expert) pairs that the policy gave to another expert: not exact."""
    host_tokens: int = 0
    """(token, expert) pairs that the host's CPU computed."""
    extrapolated: int = 0
    """Expert phases, all-to-alls and copies whose time lies outside what the profile's curves were measured for."""


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums over the steps of a run."""

    steps: int = 0
    tokens: int = 0
    total_s: float = 0.0
    """All steps, and in an open loop the time between them."""
    idle_s: float = 0.0
    """Of `total_s`, the time between steps in which no request was there."""
    phase_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    busy_s: list[float] = field(default_factory=list)
    """[G] as in a step."""
    balance: float = 0.0
    """Sum over layers and steps of mean / max of the GPU loads; `layers` says of how many."""
    layers: int = 0
    mean_load: float = 0.0
    peak_load: int = 0
    """Sums over layers and steps of the mean and the largest GPU load."""
    moved_bytes: int = 0
    hidden_bytes: int = 0
    lost_tokens: int = 0
    rounded_tokens: int = 0
    precision_pairs: dict[str, int] = field(default_factory=dict)
    skipped_tokens: int = 0
    substituted_tokens: int = 0
    host_tokens: int = 0
    extrapolated: int = 0
    cache: CacheTotals = field(default_factory=CacheTotals)
    """Where not all experts have slots (cachestats.py)."""
    durations: Quantiles = field(default_factory=Quantiles)

    def add(self, step: StepRecord) -> None:
        """Count one step."""
        balance = mean_load = 0.0
        peak_load = 0
        for row in step.load_LG:
            peak, mean = max(row), sum(row) / len(row)
            balance += mean / peak if peak else 1.0
            mean_load += mean
            peak_load += peak
        self.add_sums(step, len(step.load_LG), balance, mean_load, peak_load)

    def add_sums(self, step: StepRecord, layers: int, balance: float, mean_load: float, peak_load: int) -> None:
        """Count one step whose `load_LG` has been summed up elsewhere."""
        self.steps += 1
        self.tokens += step.tokens
        self.total_s += step.duration_s
        self.durations.add(step.duration_s)
        for phase, seconds in step.phase_s.items():
            self.phase_s[phase] += seconds
        self.busy_s = [a + b for a, b in zip(self.busy_s or [0.0] * len(step.busy_s), step.busy_s, strict=True)]
        self.layers += layers
        self.balance += balance
        self.mean_load += mean_load
        self.peak_load += peak_load
        for name in (*SUMS, *RARE):
            setattr(self, name, getattr(self, name) + getattr(step, name))
        for precision, pairs in step.precision_pairs.items():
            self.precision_pairs[precision] = self.precision_pairs.get(precision, 0) + pairs

    def idle(self, seconds: float) -> None:
        """Count time between steps in which nobody was served."""
        self.total_s += seconds
        self.idle_s += seconds

    @classmethod
    def of(cls, steps: Sequence[StepRecord]) -> Totals:
        """Count all of `steps`."""
        totals = cls()
        for step in steps:
            totals.add(step)
        return totals

    def time_shares(self) -> dict[str, float]:
        """Where the GPUs' time goes, shares of the whole run, mean over the GPUs; they sum to 1.

        compute: attention and experts. barrier: waiting for the slowest GPU to finish those. communication: all-to-alls
        and all-reduces. weights: waiting for blocking copies. deciding: predictor and planner. idle: what no phase
        accounts for, and the time without requests.
        """
        busy_s = sum(self.busy_s) / len(self.busy_s)
        shares = {
            "compute": busy_s,
            "barrier": max(self.phase_s["attention"] + self.phase_s["experts"] - busy_s, 0.0),
            "communication": self.phase_s["communication"],
            "weights": self.phase_s["blocked"],
            "deciding": self.phase_s["decide"],
        }
        shares = {name: seconds / self.total_s for name, seconds in shares.items()}
        return {**shares, "idle": max(1.0 - sum(shares.values()), 0.0)}

    def metrics(self) -> dict[str, Any]:
        """Latency, throughput, balancedness, utilisation and bytes; see the keys."""
        p50, p95, p99 = self.durations.percentiles([50, 95, 99])
        found = {
            "steps": self.steps,
            "tokens": self.tokens,
            "latency_p50_s": p50,
            "latency_p95_s": p95,
            "latency_p99_s": p99,
            "throughput_tokens_per_s": self.tokens / self.total_s,
            "balancedness_mean_of_ratios": self.balance / self.layers,
            "balancedness_ratio_of_sums": self.mean_load / self.peak_load if self.peak_load else 1.0,
            "time_shares": self.time_shares(),
            "utilisation_G": [busy / self.total_s for busy in self.busy_s],
            "moved_bytes": self.moved_bytes,
            "hidden_bytes": self.hidden_bytes,
        }
        if any(self.cache.needs_L):
            found["cache"] = {**self.cache.summary(), "stall_s": self.phase_s["blocked"]}
        rare = (*RARE, "precision_pairs", "idle_s")
        return {**found, **{name: getattr(self, name) for name in rare if getattr(self, name)}}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        data = asdict(self)
        data["durations"]["bins"] = sorted([number, count] for number, count in self.durations.bins.items())
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Totals:
        """The inverse of `to_dict`. Raises InputError where there is no step, KeyError or TypeError for damage."""
        if {f.name for f in fields(cls)} != data.keys() or not data["steps"]:
            raise InputError("the totals of a result are damaged")
        kept = data["durations"]
        bins = dict(kept["bins"])
        durations = Quantiles(values=kept["values"], bins=bins, zeros=kept["zeros"])
        return cls(**{**data, "durations": durations, "cache": CacheTotals(**data["cache"])})
