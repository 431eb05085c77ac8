"""What happened in a run of the offload executor: pairs by fate, and step records.

Shape letters: L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moesim.backend.clock import moment, seconds_between
from moesim.sim.dispatch import Ints
from moesim.sim.residency import PRECISIONS
from moesim.sim.results import PHASES, StepRecord


@dataclass(slots=True)
class Pairs:
    """(token, expert) pairs of a run, [L] each; tokens over an expert's capacity are none."""

    layers: int
    routed: Ints = field(init=False)
    """All of them; the others are parts of these."""
    skipped: Ints = field(init=False)
    substituted: Ints = field(init=False)
    mispredicted: Ints = field(init=False)
    """Computed by a predicted expert where the router, asked at that moment, chose another."""
    host: Ints = field(init=False)
    """Computed by the host, exactly."""
    precision: dict[str, Ints] = field(init=False)
    """Computed with a copy below the model's precision, by its name."""

    def __post_init__(self) -> None:
        for name in ("routed", "skipped", "substituted", "mispredicted", "host"):
            setattr(self, name, np.zeros(self.layers, np.int64))
        self.precision = {name: np.zeros(self.layers, np.int64) for name in PRECISIONS[1:]}

    def totals(self) -> dict[str, int]:
        """Sums over the layers, one for each precision."""
        plain = {name: int(getattr(self, name).sum()) for name in ("skipped", "substituted", "host")}
        return {**plain, **{name: int(count_L.sum()) for name, count_L in self.precision.items()}}

    def shares(self) -> dict[str, list[float]]:
        """[L] each: shares of the routed pairs, `rounded` being all below the model's precision."""
        rounded = np.asarray(sum(self.precision.values(), np.zeros(self.layers, np.int64)))
        counted = {name: getattr(self, name) for name in ("skipped", "substituted", "mispredicted", "host")}
        counted = {"rounded": rounded, **self.precision, **counted}
        return {name: (count_L / np.maximum(self.routed, 1)).tolist() for name, count_L in counted.items()}


class Tally:
    """Time and counts of one run, from marks: each ends a phase that began with the one before.

    On a GPU marks are events in the computation's stream, read when the records are asked for: nothing waits for them.
    `continuous`: steps follow each other at once, so that what lies between two of them counts to the later one.
    """

    def __init__(self, layers: int, device: torch.device, *, continuous: bool = False) -> None:
        self.pairs = Pairs(layers)
        self.events: list[Step] = []
        self._device, self._continuous = device, continuous
        self._records: list[StepRecord] = []

    @property
    def records(self) -> list[StepRecord]:
        """Of all steps that have ended; on a GPU it waits for them."""
        while len(self._records) < len(self.events):
            step = self.events[len(self._records)]
            self._records.append(step.record(seconds_between(step.begin, [at for _, at in step.marks])))
        return self._records

    def begin(self, tokens: int) -> None:
        """A step of so many tokens begins."""
        before = self.events[-1].marks if self.events else []
        begin = before[-1][1] if self._continuous and before else moment(self._device)
        self.step = Step(begin=begin, tokens=tokens)
        self._before = self.pairs.totals()

    def mark(self, phase: str) -> None:
        """What ran since the last mark was this phase."""
        self.step.marks.append((phase, moment(self._device)))

    def end(self) -> None:
        """The step ends here, with the dense layers after the last experts."""
        self.mark("attention")
        self.step.counts = {name: count - self._before[name] for name, count in self.pairs.totals().items()}
        self.events.append(self.step)


@dataclass(slots=True, kw_only=True)
class Step:
    """A step as it goes on."""

    begin: Any
    tokens: int
    marks: list[tuple[str, Any]] = field(default_factory=list)
    """(phase, the moment when it ended)."""
    moved: int = 0
    hidden: int = 0
    decide_s: float = 0.0
    """Host seconds of all decisions, whatever the device did meanwhile."""
    needed: Ints = field(default_factory=lambda: np.zeros(3, np.int64))
    """Experts that had tokens: there, on their way, neither."""
    computed: list[int] = field(default_factory=list)
    """Pairs that the device computed, layer by layer."""
    counts: dict[str, int] = field(default_factory=dict)

    def record(self, passed_s: list[float]) -> StepRecord:
        """The step, given the seconds of every mark since its begin."""
        spent = dict.fromkeys(PHASES, 0.0)
        for (phase, _), begin_s, end_s in zip(self.marks, [0.0, *passed_s], passed_s, strict=False):
            spent[phase] += end_s - begin_s
        precision = {name: self.counts[name] for name in PRECISIONS[1:] if self.counts[name]}
        return StepRecord(
            duration_s=passed_s[-1],
            tokens=self.tokens,
            phase_s=spent,
            load_LG=[[count] for count in self.computed],
            busy_s=[spent["attention"] + spent["experts"]],
            moved_bytes=self.moved,
            hidden_bytes=self.hidden,
            host_tokens=self.counts["host"],
            skipped_tokens=self.counts["skipped"],
            substituted_tokens=self.counts["substituted"],
            rounded_tokens=sum(precision.values()),
            precision_pairs=precision,
        )
