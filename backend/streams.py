"""Copies of experts on a GPU's own copy engine, issued by the thread that computes: no other thread, no waiting host.

What is waited for goes on a stream of high priority; the computation's stream waits for its event, the host does not.
What is ahead of its use queues on the host and is issued a few at a time, so that no demand stands behind many of them:
`pump` refills the link whenever the host comes by, also while it waits for a router. Whether a copy has come is
asked of its event. Knows nothing about policies.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from moesim.backend.cuda import new_stream
from moesim.backend.experts import ExpertSlots
from moesim.backend.slots import Copy, HostExperts, carry, neighbours

AHEAD = 2
"""Prefetches that are issued and not done: one under way, and one so that the link does not stand still meanwhile."""


class Streamed:
    """Copies on CUDA streams, see the module docstring.

    A slot that changes hands is written after what reads it (`start` notes the computation's place) and after what was
    being written into it before. Slots must outlive the mover: `drain` it first.
    """

    def __init__(self, host: HostExperts, slots: ExpertSlots) -> None:
        self._host, self._slots = host, slots
        self.pending: list[Copy] = []
        self._device = slots.rows_SP.device
        self._demand, self._ahead = new_stream(self._device, priority=-1), new_stream(self._device)
        self._queue: list[Copy] = []
        """Not issued yet, in order of need."""
        self._flying: deque[Copy] = deque()
        """Prefetches that have been issued, in order."""
        self._writer: dict[int, Any] = {}
        """Slot to the event of the last copy into it."""

    def claim(self, slots: set[int]) -> None:
        """Drop what is queued for these slots; what is being written into them now ends before what comes next."""
        dropped = {id(copy) for copy in self._queue if copy.transfer.slot in slots}
        if dropped:
            self._queue = _without(self._queue, dropped)
            self.pending = _without(self.pending, dropped)

    def start(self, copies: list[Copy]) -> None:
        """Issue the blocking ones, queue the others; all after what the computation has been given until now."""
        ready = torch.cuda.current_stream(self._device).record_event()
        for copy in copies:
            copy.ready = ready
            if not copy.transfer.blocking:
                insort(self._queue, copy, key=_due)  # of equal ones the first issued stays first
        self.pending += copies
        self._issue([copy for copy in copies if copy.transfer.blocking], self._demand)
        self.pump()

    def pump(self) -> None:
        """Issue prefetches until AHEAD of them are under way."""
        while self._flying and self._flying[0].event.query():
            self._flying.popleft()
        while self._queue and len(self._flying) < AHEAD:
            copy = self._queue.pop(0)
            self._issue([copy], self._ahead)
            self._flying.append(copy)

    def arrived(self) -> list[Copy]:
        """What has come, and what the computation waits for: to whoever decides next that is there."""
        self.pump()
        told = [c for c in self.pending if c.event is not None and (c.awaited or c.event.query())]
        if told:
            self.pending = _without(self.pending, {id(copy) for copy in told})
        return told

    def wait(self, copies: Iterable[Copy]) -> None:
        """The computation's stream goes on when they have come; those that are queued are issued as demand."""
        wanted = list(copies)
        queued = [copy for copy in wanted if copy.event is None]
        if queued:
            self._queue = _without(self._queue, {id(copy) for copy in queued})
            self._issue(queued, self._demand)
        here = torch.cuda.current_stream(self._device)
        for event in {id(copy.event): copy.event for copy in wanted}.values():
            here.wait_event(event)
        for copy in wanted:
            copy.awaited = True

    def drain(self) -> None:
        """Drop what is queued and wait for what is under way."""
        self._queue = []
        for stream in (self._demand, self._ahead):
            stream.synchronize()
        self.pending, self._flying, self._writer = [], deque(), {}

    def _issue(self, copies: list[Copy], stream: Any) -> None:
        if not copies:
            return
        with torch.cuda.stream(stream):
            for run in neighbours(copies):
                before = [copy.ready for copy in run]
                before += [self._writer[slot] for copy in run if (slot := copy.transfer.slot) in self._writer]
                for event in {id(event): event for event in before}.values():
                    stream.wait_event(event)
                carry(run, self._host, self._slots)
                done = stream.record_event()
                for copy in run:
                    copy.event = self._writer[copy.transfer.slot] = done
        if stream is self._demand:  # what is issued ahead from now on shares no bandwidth with this
            self._ahead.wait_event(done)


def _without(copies: list[Copy], gone: set[int]) -> list[Copy]:
    return [copy for copy in copies if id(copy) not in gone]


def _due(copy: Copy) -> int:
    return copy.transfer.due
