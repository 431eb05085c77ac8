"""The event log, and everything that is computed from it alone.

Events are JSON objects in order of `time_s`, written when what they tell of has ended; `begin_s` is when it began. The
engine counts a run by feeding its own events to a `Book`; `result_of` reads a written log with the same book, so a log
holds everything that a result says. Shape letters: L MoE layers, G GPUs.

run begins    policy, config, gpus
step begins   step, tokens
attention, experts, decide, communication, blocked
              step, part (micro-batch), layer, begin_s, duration_s; the first two gpu_s [G], and start_s [G] where a GPU
              began later; experts tokens_G, and lost, rounded, host where there are such tokens, `precision` with
              the rounded ones by their copies' dtype; `outside` where a measured curve was left, of transfers as well
needed        step, part, layer, and the experts that have tokens: hit, awaited (on their way), missed; skipped and
              substituted pairs where there are any; of policies that offload
transfer issued, transfer begins, transfer ends, transfer free
step ends     step
idle          duration_s without a request
request done  request, arrival_s, start_s, first_token_s, prompt_tokens, output_tokens
fault         what happened
run ends      scores
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from moesim.sim.cachestats import CacheBook
from moesim.sim.requests import RequestTotals
from moesim.sim.results import Result
from moesim.sim.totals import PHASES, StepRecord, Totals
from moesim.traces import InputError

Event = dict[str, Any]
ORDER = ("attention", "experts", "communication", "blocked", "decide")
"""Which of several phases at the same instant counts, see `PHASES`."""


class Book:
    """Adds events up to step records, totals and requests. `keep_steps`: whether the records are kept; `targets`: of
    requests (requests.py)."""

    def __init__(self, keep_steps: bool, targets: dict[str, float]) -> None:
        self.steps: list[StepRecord] = []
        self.totals = Totals()
        self.requests = RequestTotals()
        self.targets = targets
        self.keep_steps = keep_steps
        self._cache = CacheBook()
        self.totals.cache = self._cache.totals
        self._bytes = [0, 0]
        self._outside = 0
        self._clear()

    def _clear(self) -> None:
        self._phases: list[Event] = []
        self._load: dict[tuple[int, int], list[int]] = {}
        self._lost = self._rounded = self._host = self._skipped = self._substituted = 0
        self._precision: dict[str, int] = {}

    def take(self, event: Event) -> None:
        """Count one event."""
        what = event["what"]
        if what in PHASES:
            self._phases.append(event)
            self._outside += event.get("outside", False)
            if what == "experts":
                self._experts(event)
        elif what == "needed":
            self._needed(event)
        elif what == "transfer issued":
            to = event["copied"]
            place = (to["target"], to["slot"])
            self._cache.issued(event["number"], to["layer"], to["expert"], place, event["blocking"])
        elif what == "transfer ends":
            self._cache.ended(event["number"], event["bytes"], event.get("precision", "full"))
            self._bytes[0] += event["bytes"]
            self._bytes[1] += event["bytes"] if event["hidden"] else 0
            self._outside += event.get("outside", False)
        elif what == "step begins":
            self._begin = event
        elif what == "step ends":
            self._end(event["time_s"])
        elif what == "idle":
            self.totals.idle(event["duration_s"])
        elif what == "request done":
            self.requests.add(event, self.targets)

    def _experts(self, event: Event) -> None:
        where = (event["part"], event["layer"])
        tokens_G = [int(n) for n in event["tokens_G"]]
        before = self._load.get(where)
        self._load[where] = [a + b for a, b in zip(before, tokens_G, strict=True)] if before else tokens_G
        self._lost += event.get("lost", 0)
        self._rounded += event.get("rounded", 0)
        self._host += event.get("host", 0)
        for precision, pairs in event.get("precision", {}).items():
            self._precision[precision] = self._precision.get(precision, 0) + pairs

    def _needed(self, event: Event) -> None:
        self._cache.needed(event["layer"], event["hit"], event["awaited"], event["missed"])
        self._skipped += event.get("skipped", 0)
        self._substituted += event.get("substituted", 0)

    def _end(self, now_s: float) -> None:
        busy_G: Any = 0.0
        for event in self._phases:  # in order, whatever numpy would do: both ways of the engine agree to the bit
            if "gpu_s" in event:
                busy_G = busy_G + np.asarray(event["gpu_s"])
        self.add(
            StepRecord(
                duration_s=now_s - self._begin["time_s"],
                tokens=self._begin["tokens"],
                phase_s=_exposed(self._phases),
                load_LG=[self._load[where] for where in sorted(self._load)],
                busy_s=busy_G.tolist(),
                moved_bytes=self._bytes[0],
                hidden_bytes=self._bytes[1],
                lost_tokens=self._lost,
                rounded_tokens=self._rounded,
                precision_pairs=self._precision,
                skipped_tokens=self._skipped,
                substituted_tokens=self._substituted,
                host_tokens=self._host,
                extrapolated=self._outside,
            )
        )
        self._bytes = [0, 0]
        self._outside = 0
        self._clear()

    def add(self, step: StepRecord) -> None:
        """Count a finished step."""
        self.totals.add(step)
        if self.keep_steps:
            self.steps.append(step)


def _exposed(phases: list[Event]) -> dict[str, float]:
    """Seconds of a step by phase. Where parts overlap every instant counts to one phase, by ORDER."""
    spent = dict.fromkeys(PHASES, 0.0)
    if all(a["time_s"] <= b["begin_s"] for a, b in pairwise(phases)):
        for event in phases:
            spent[event["what"]] += event["duration_s"]
        return spent
    changes = [(event["begin_s"], 1, event["what"]) for event in phases]
    changes += [(event["time_s"], -1, event["what"]) for event in phases]
    active = dict.fromkeys(PHASES, 0)
    before = 0.0
    for time, change, what in sorted(changes):
        first = next((phase for phase in ORDER if active[phase]), None)
        if first:
            spent[first] += time - before
        active[what] += change
        before = time
    return spent


def plain(event: Event) -> Event:
    """The event with lists for arrays, as it is written."""
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in event.items()}


def result_of(events: Iterable[Event]) -> Result:
    """The result of a run from its log alone. Raises InputError where the log is not complete."""
    book, first, last = Book(keep_steps=True, targets={}), None, None
    for event in events:
        try:
            if event["what"] == "run begins":
                first = event
                book.targets = event["config"].get("targets", {})
            elif event["what"] == "run ends":
                last = event
            else:
                book.take(event)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the event log is damaged: {type(error).__name__} {error} in {str(event)[:80]}") from None
    if first is None or last is None or not book.totals.steps:
        raise InputError("the event log does not hold a whole run, from 'run begins' to 'run ends': simulate it again")
    return Result(
        kind="simulated",
        policy=first["policy"],
        config=first["config"],
        steps=book.steps,
        totals=book.totals,
        scores=last["scores"],
        serving=book.requests.summary(book.targets),
    )
