"""Expert weights on their way between ranks, while the ranks compute.

A copy is a snapshot of the source slot, sent over the second communicator into a staging buffer, and written into its
slot only when all ranks agree that it has arrived, so that no rank ever computes from half an expert. Every rank holds
the same list of pending copies in the same order; only source and target hold data. Knows nothing about policies.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moesim.backend.experts import ExpertSlots
from moesim.backend.ranks import Ranks
from moesim.sim.residency import Residency, Transfer
from moesim.traces import PolicyError


class Ticket(Protocol):
    """One message under way."""

    def done(self) -> bool:
        """True once the data is there (received) or may be overwritten (sent)."""

    def result(self) -> object:
        """Wait for it."""


@dataclass(slots=True, kw_only=True)
class _Copy:
    transfer: Transfer
    buffer_P: torch.Tensor | None
    """The snapshot at the source, the staging buffer at the target, nothing elsewhere."""
    ticket: Ticket | None = None
    late: bool = False
    """Its layer has dispatched without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A copy that has ended, on all ranks."""

    transfer: Transfer
    hidden: bool
    """Nobody waited for it, and it was in its slot in time and of use."""


class Copies:
    """The pending copies of one run, as one rank sees them."""

    def __init__(self, ranks: Ranks, slots: ExpertSlots) -> None:
        self._ranks = ranks
        self._slots = slots
        self._post: Callable[[list[_Copy], int], None] = self._post_nccl if ranks.on_gpu else self._post_gloo
        # Gloo tells that a message has arrived only to a thread that waits for it. Two threads, so that an outgoing
        # copy that nobody has received yet does not hide an incoming one.
        self._incoming = ThreadPoolExecutor(1, "copies-in")
        self._outgoing = ThreadPoolExecutor(1, "copies-out")
        self._sent: list[_Copy] = []
        self._count = 0
        self.pending: list[_Copy] = []

    def start(self, moves: list[Transfer]) -> None:
        """Issue copies that the driver has just begun; the sources are read now. Returns at once.

        Raises PolicyError for a free transfer, which only a simulator can make.
        """
        if any(t.free for t in moves):
            raise PolicyError("a free transfer exists only in the simulator")
        me = self._ranks.rank
        issued = []
        for t in moves:
            buffer = None
            if t.source == me:
                buffer = self._slots.snapshot((t.layer, t.expert))
            elif t.target == me:
                buffer = self._slots.staging()
            issued.append(_Copy(transfer=t, buffer_P=buffer))
        self._post(issued, self._count)
        self._count += len(moves)
        self.pending += issued
        self._sent = [copy for copy in self._sent if copy.ticket is not None and not copy.ticket.done()]

    def arrived(self) -> NDArray[np.int32]:
        """[pending] 1 where the copy is complete as far as this rank is concerned (it says 0 only of its own)."""
        return np.array([self._is_here(copy) for copy in self.pending], np.int32)

    def needed(self, layer: int) -> None:
        """`layer` dispatches now: its copies that are still under way are late."""
        for copy in self.pending:
            copy.late |= copy.transfer.layer == layer

    def commit(self, agreed: NDArray[np.bool_], residency: Residency) -> list[Arrival]:
        """Take the agreed ones off the list, in order of issue; their data goes into their slots, unless a slot has
        been given away since. The caller tells the driver, in the same order."""
        done = [copy for copy, yes in zip(self.pending, agreed, strict=True) if yes]
        self.pending = [copy for copy, yes in zip(self.pending, agreed, strict=True) if not yes]
        arrivals = []
        for copy in done:
            t = copy.transfer
            hidden = not (t.blocking or copy.late) and residency.holds(t)
            arrivals.append(Arrival(transfer=t, hidden=hidden))
            coming = residency.holds(t) and residency.coming_LEG[t.layer, t.expert, t.target]
            if t.target == self._ranks.rank and coming:
                assert copy.buffer_P is not None
                self._slots.write(t.slot, (t.layer, t.expert), copy.buffer_P)
        return arrivals

    def wait_blocking(self, residency: Residency) -> list[Arrival]:
        """Wait for this rank's blocking copies and commit all blocking ones.

        No agreement is needed: a rank that is sent tokens for such a replica waits here before it computes them.
        """
        blocking = np.array([copy.transfer.blocking for copy in self.pending], np.bool_)
        if not blocking.any():
            return []
        for copy, waits in zip(self.pending, blocking, strict=True):
            if waits and copy.ticket is not None and copy.transfer.target == self._ranks.rank:
                copy.ticket.result()
        return self.commit(blocking, residency)

    def drain(self) -> None:
        """Wait until nothing is under way any more, and forget it; the run is over."""
        for copy in [*self.pending, *self._sent]:
            if copy.ticket is not None:
                copy.ticket.result()
        self.pending, self._sent = [], []
        self._incoming.shutdown()
        self._outgoing.shutdown()

    def _is_here(self, copy: _Copy) -> bool:
        if copy.transfer.target != self._ranks.rank or copy.ticket is None:
            return True
        if not copy.ticket.done():
            return False
        copy.ticket.result()  # raises where the copy failed
        return True

    def _post_gloo(self, issued: list[_Copy], first: int) -> None:
        me, group = self._ranks.rank, self._ranks.copies
        for tag, copy in enumerate(issued, first):
            t = copy.transfer
            if copy.buffer_P is None or t.source == t.target:
                continue
            data = copy.buffer_P.view(torch.uint8)
            if t.source == me:
                work = dist.isend(data, group=group, group_dst=t.target, tag=tag)
                copy.ticket = _waited(self._outgoing, work)
                self._sent.append(copy)
            else:
                work = dist.irecv(data, group=group, group_src=t.source, tag=tag)
                copy.ticket = _waited(self._incoming, work)

    def _post_nccl(self, issued: list[_Copy], first: int) -> None:
        me, group = self._ranks.rank, self._ranks.copies
        mine = [c for c in issued if c.buffer_P is not None and c.transfer.source != c.transfer.target]
        if not mine:
            return
        operations = []
        for copy in mine:
            t = copy.transfer
            operation, peer = (dist.isend, t.target) if t.source == me else (dist.irecv, t.source)
            assert copy.buffer_P is not None
            operations.append(dist.P2POp(operation, copy.buffer_P, group=group, group_peer=peer))
        # NCCL runs one batch in its own stream, after what this rank has enqueued so far: the snapshots are taken.
        ticket = _NcclTicket(dist.batch_isend_irecv(operations))
        for copy in mine:
            copy.ticket = ticket
            if copy.transfer.source == me:
                self._sent.append(copy)


def _waited(pool: ThreadPoolExecutor, work: dist.Work | None) -> Future[bool]:
    assert work is not None, "this process is a member of the group"
    return pool.submit(work.wait)


class _NcclTicket:
    """All messages of one batch."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def result(self) -> None:
        for work in self._works:
            work.wait()
