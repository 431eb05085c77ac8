"""What a cache of experts was worth: hits, prefetches that were of use, bytes that were not. Counted from what
happened, by the simulated and the real executor alike; knows nothing about policies. Shape letter: L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class CacheTotals:
    """Sums over a run. A *need* is an expert that a layer of a micro-batch has tokens for, after pairs were skipped or
    given to others; it counts once, however many its tokens."""

    needs_L: list[int] = field(default_factory=list)
    hits_L: list[int] = field(default_factory=list)
    """Of these, experts that were usable in the wanted precision when their layer had routed."""
    late: int = 0
    """Needs whose copy was on its way: they waited for the rest of it."""
    used: int = 0
    """Prefetched copies that were needed before they were displaced, late ones included; each counts once."""
    unused: int = 0
    """Prefetched copies that were displaced before they were needed. Those that wait at the end are neither."""
    wasted_bytes: int = 0
    """Bytes of the unused that were copied to the end."""
    late_bytes: int = 0
    """Bytes of prefetched copies that somebody waited for."""
    bytes_of: dict[str, int] = field(default_factory=dict)
    """Bytes of finished copies by precision."""

    def summary(self) -> dict[str, Any]:
        """For reports; None where there is nothing to divide by.

        hit_rate: hits / needs; hit_rate_L: the same of each layer. prefetch_precision: used / (used + unused).
        prefetch_recall: used / (used + needs that were neither there nor on their way): of what the cache alone would
        not have had. wasted_bytes, late_bytes, bytes_by_precision: see the fields."""
        needs, hits = sum(self.needs_L), sum(self.hits_L)
        return {
            "hit_rate": _ratio(hits, needs),
            "hit_rate_L": [_ratio(a, b) for a, b in zip(self.hits_L, self.needs_L, strict=True)],
            "prefetch_precision": _ratio(self.used, self.used + self.unused),
            "prefetch_recall": _ratio(self.used, self.used + needs - hits - self.late) if self.used else None,
            "wasted_bytes": self.wasted_bytes,
            "late_bytes": self.late_bytes,
            "bytes_by_precision": dict(sorted(self.bytes_of.items())),
        }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(slots=True)
class _Copy:
    """An expert in a slot, or on its way there."""

    key: tuple[int, int]
    ahead: bool
    nbytes: int = 0
    used: bool = False
    late: bool = False
    displaced: bool = False


class CacheBook:
    """Adds what happens to copies up to `totals`; holds one record for each slot that was filled."""

    def __init__(self) -> None:
        self.totals = CacheTotals()
        self._in: dict[tuple[int, int], _Copy] = {}
        """(GPU, slot) to what came there last."""
        self._of: dict[tuple[int, int], _Copy] = {}
        """(layer, expert) to the copy that came last."""
        self._coming: dict[int, _Copy] = {}

    def needed(self, layer: int, hit: Sequence[int], awaited: Sequence[int], missed: Sequence[int]) -> None:
        """A layer has routed: its experts that are there, on their way, and neither."""
        t = self.totals
        more = layer + 1 - len(t.needs_L)
        t.needs_L += [0] * more
        t.hits_L += [0] * more
        t.needs_L[layer] += len(hit) + len(awaited) + len(missed)
        t.hits_L[layer] += len(hit)
        t.late += len(awaited)
        for expert in (*hit, *awaited):
            copy = self._of.get((layer, expert))
            if copy is not None and copy.ahead and not copy.used:
                copy.used = True
                t.used += 1
        for expert in awaited:
            if (layer, expert) in self._of:
                self._of[layer, expert].late = True

    def issued(self, number: int, layer: int, expert: int, place: tuple[int, int], blocking: bool) -> None:
        """Copy `number` begins to fill the slot `place`, (GPU, slot); what was there is gone."""
        before = self._in.get(place)
        if before is not None:
            before.displaced = True
            if self._of.get(before.key) is before:
                del self._of[before.key]
            if before.ahead and not before.used:
                self.totals.unused += 1
                self.totals.wasted_bytes += before.nbytes
        self._in[place] = self._of[layer, expert] = self._coming[number] = _Copy((layer, expert), not blocking)

    def ended(self, number: int, nbytes: int, precision: str) -> None:
        """Copy `number` is complete."""
        t, copy = self.totals, self._coming.pop(number)
        copy.nbytes = nbytes
        t.bytes_of[precision] = t.bytes_of.get(precision, 0) + nbytes
        if copy.ahead and copy.late:
            t.late_bytes += nbytes
        if copy.ahead and copy.displaced and not copy.used:
            t.wasted_bytes += nbytes
