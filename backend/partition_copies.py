"""Replicas on their way between the partitions of one device, while the partitions compute.

A copy goes from slot to slot in the queue of its target, so a partition receives one at a time. A replica becomes
usable when the host has seen that its copy is done, never before; a blocking copy is waited for. Knows nothing about
policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moesim.backend.copies import Arrival
from moesim.backend.partition_experts import PartitionSlots
from moesim.backend.queues import Moment, Queues
from moesim.sim.residency import HOST, Residency, Transfer
from moesim.traces import PolicyError

Place = tuple[int, int]
"""(partition, slot)."""


@dataclass(slots=True, kw_only=True)
class _Copy:
    transfer: Transfer
    source: Place | None
    """The slot that is read; None once its content has been set aside."""
    begin: Moment
    end: Moment
    late: bool = False
    """Its layer has dispatched without it."""


class PartitionCopies:
    """The copies of one run that are under way."""

    def __init__(self, queues: Queues, slots: list[PartitionSlots], *, poison: bool = False) -> None:
        self._queues, self._slots, self._poison = queues, slots, poison
        self.pending: list[_Copy] = []
        self.seconds: list[float] = []
        """Of every finished copy, its time in its queue."""

    def start(self, moves: list[Transfer]) -> None:
        """Issue copies that the driver has just begun. Returns at once.

        Every source is read as it was before any of `moves`: one whose slot is about to be overwritten by another of
        them is set aside first. No kernel reads the targets any more: what was routed before this decision has been
        computed, since the host has waited for what came after it, and what comes later does not use these slots.
        Raises PolicyError for what only a simulator can do.
        """
        if any(t.free or t.source == HOST for t in moves):
            raise PolicyError("free copies, and copies from the host, are not available between partitions")
        sources = [(t.source, self._slots[t.source].slot((t.layer, t.expert))) for t in moves]
        targets = {(t.target, t.slot) for t in moves}
        aside: dict[Place, tuple[torch.Tensor, Moment]] = {}
        for t, source in zip(moves, sources, strict=True):
            if source in targets and source not in aside:
                aside[source] = self._set_aside(t, source)
        for t, source in zip(moves, sources, strict=True):
            self._issue(t, source, aside)

    def poll(self, residency: Residency) -> list[Arrival]:
        """Those that are done by now, in order of issue; the caller tells the driver in this order."""
        done = [copy for copy in self.pending if copy.end.done()]
        return self._finish(done, residency)

    def needed(self, layer: int) -> None:
        """`layer` dispatches now: its copies that are still under way are late."""
        for copy in self.pending:
            copy.late |= copy.transfer.layer == layer

    def wait_blocking(self, residency: Residency) -> list[Arrival]:
        """Wait for the blocking ones."""
        blocking = [copy for copy in self.pending if copy.transfer.blocking]
        for copy in blocking:
            copy.end.wait()
        return self._finish(blocking, residency)

    def drain(self) -> None:
        """Wait until nothing is under way, and forget it; the run is over."""
        for copy in self.pending:
            copy.end.wait()
            self.seconds.append(copy.end.since(copy.begin))
        self.pending = []

    def _set_aside(self, t: Transfer, source: Place) -> tuple[torch.Tensor, Moment]:
        gpu, slot = source
        row_P = self._slots[gpu].rows_SP[slot]
        queue = self._queues.copy[t.target]
        kept = torch.empty_like(row_P)
        # The memory is of the main stream's pool; what it was used for there is behind us, as the host has waited.
        queue.run(lambda: _write(kept, row_P))
        for other in self._queues.copy:
            other.keep(kept)
        return kept, queue.record()

    def _issue(self, t: Transfer, source: Place, aside: dict[Place, tuple[torch.Tensor, Moment]]) -> None:
        queue, target = self._queues.copy[t.target], (t.target, t.slot)
        row_P = self._slots[t.target].claim(t.slot, (t.layer, t.expert))
        read: Place | None = source
        from_P = self._slots[source[0]].rows_SP[source[1]]
        if source in aside:
            read = None
            from_P, moment = aside[source]
            queue.after(moment)
        if target in aside:
            queue.after(aside[target][1])
        for other in self.pending:
            if other.source == target:
                queue.after(other.end)
        if self._poison:
            queue.run(partial(_poison, row_P))
        begin = queue.record()
        queue.run(partial(_write, row_P, from_P))
        self.pending.append(_Copy(transfer=t, source=read, begin=begin, end=queue.record()))

    def _finish(self, done: list[_Copy], residency: Residency) -> list[Arrival]:
        arrivals = []
        for copy in done:
            copy.end.wait()
            self.seconds.append(copy.end.since(copy.begin))
            t = copy.transfer
            arrivals.append(Arrival(transfer=t, hidden=not (t.blocking or copy.late) and residency.holds(t)))
        gone = {id(copy) for copy in done}
        self.pending = [copy for copy in self.pending if id(copy) not in gone]
        return arrivals


def _write(target_P: torch.Tensor, source_P: torch.Tensor) -> None:
    target_P.copy_(source_P, non_blocking=True)


def _poison(row_P: torch.Tensor) -> None:
    row_P.fill_(float("nan"))
