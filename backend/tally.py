"""What happened in a run of the offload executor: pairs by fate, and step records.

Shape letters: L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

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
    """Time and counts of one run; `synchronize` returns when the device has done what it was given."""

    def __init__(self, layers: int, synchronize: Callable[[], None]) -> None:
        self.pairs = Pairs(layers)
        self.records: list[StepRecord] = []
        self._synchronize = synchronize

    def begin(self, tokens: int) -> None:
        """A step of so many tokens begins."""
        self.moved = self.hidden = 0
        self.computed: list[int] = []
        self._tokens, self._before = tokens, self.pairs.totals()
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._began = perf_counter()

    def end(self) -> None:
        """It ends: what no other phase took was attention and dense layers."""
        self._synchronize()
        duration_s = perf_counter() - self._began
        self._spent["attention"] = max(duration_s - sum(self._spent.values()), 0.0)
        new = {name: count - self._before[name] for name, count in self.pairs.totals().items()}
        precision = {name: new[name] for name in PRECISIONS[1:] if new[name]}
        self.records.append(
            StepRecord(
                duration_s=duration_s,
                tokens=self._tokens,
                phase_s=self._spent,
                load_LG=[[count] for count in self.computed],
                busy_s=[self._spent["attention"] + self._spent["experts"]],
                moved_bytes=self.moved,
                hidden_bytes=self.hidden,
                host_tokens=new["host"],
                skipped_tokens=new["skipped"],
                substituted_tokens=new["substituted"],
                rounded_tokens=sum(precision.values()),
                precision_pairs=precision,
            )
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase; work of the experts is waited for, so that it counts to them."""
        begin = perf_counter()
        yield
        if name == "experts":
            self._synchronize()
        self._spent[name] += perf_counter() - begin
