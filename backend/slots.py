"""Experts in host memory, and their way into slots on the device: demand before prefetch, neighbours in one copy.

A mover carries what the driver has begun and tells what has arrived; it never decides. `Inline` carries at once, in
order, so that a run repeats to the bit; `Threaded` carries beside the computation, on a GPU in a stream of its own.
Knows nothing about policies. Shape letters: L MoE layers, E experts, P weights of one expert, C bytes of a packed one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch

from moesim.backend.experts import ExpertShape, ExpertSlots
from moesim.backend.quantize import dequantise, packed_bytes, quantise
from moesim.sim.residency import PRECISIONS, Transfer
from moesim.traces import PolicyError

FULL = PRECISIONS[0]
PREFETCHES = 4
"""Most prefetches that are carried without looking whether somebody has begun to wait for something else."""


class HostExperts:
    """All experts of a stack in host memory, pinned where a GPU reads them; packed forms are made when first wanted."""

    def __init__(self, weights_LE: list[list[torch.Tensor]], shape: ExpertShape, *, pinned: bool) -> None:
        self.shape = shape
        self._pinned = pinned
        self._rows: dict[str, torch.Tensor] = {}
        self._keep(FULL, torch.stack([torch.stack(row_E) for row_E in weights_LE]))
        for layer, row_E in enumerate(weights_LE):  # the same memory, not a second copy of the model
            row_E[:] = list(self._rows[FULL][layer])

    def rows(self, precision: str) -> torch.Tensor:
        """[L, E, P] weights or, packed, [L, E, C] bytes."""
        if precision not in self._rows:
            full_LEP = self._rows[FULL]
            self._keep(precision, torch.stack([quantise(row_EP, precision) for row_EP in full_LEP]))
        return self._rows[precision]

    def bytes(self, precision: str) -> int:
        """Bytes that one copy moves."""
        return self.shape.bytes if precision == FULL else packed_bytes(self.shape.params, precision)

    def _keep(self, precision: str, rows: torch.Tensor) -> None:
        self._rows[precision] = rows.pin_memory() if self._pinned else rows


@dataclass(slots=True, kw_only=True, eq=False)
class Copy:
    """A transfer under way."""

    transfer: Transfer
    precision: str
    """What is really carried: the transfer's own precision, or that of `--copy-dtype`."""
    late: bool = False
    """Its layer has computed without it, or had to wait for it."""
    done: threading.Event = field(default_factory=threading.Event)


class Mover(Protocol):
    """Carries copies."""

    pending: list[Copy]
    """In order of issue, until `arrived` has told of them."""

    def claim(self, slots: set[int]) -> None:
        """From now on nothing is written into these slots but what is started next."""

    def start(self, copies: list[Copy]) -> None:
        """Take copies whose slots have been claimed for them."""

    def arrived(self) -> list[Copy]:
        """What has come since the last call, in order of issue. Raises what went wrong on the way."""

    def wait(self, copies: Iterable[Copy]) -> None:
        """Return when these have come; they go before everything else."""

    def drain(self) -> None:
        """Carry what is left, and end."""


class Inline:
    """Copies are there when `start` returns."""

    def __init__(self, host: HostExperts, slots: ExpertSlots) -> None:
        self._host, self._slots = host, slots
        self.pending: list[Copy] = []

    def claim(self, slots: set[int]) -> None:
        """Nothing is under way."""

    def start(self, copies: list[Copy]) -> None:
        """Carry them, in runs of neighbours."""
        for run in neighbours(copies):
            carry(run, self._host, self._slots)
        self.pending += copies

    def arrived(self) -> list[Copy]:
        """All that was started."""
        told, self.pending = self.pending, []
        return told

    def wait(self, copies: Iterable[Copy]) -> None:
        """They are there."""

    def drain(self) -> None:
        """There is nothing left."""
        self.pending = []


class Threaded:
    """Copies are carried by a thread: what somebody waits for first, else up to PREFETCHES prefetches that are due.

    One piece at a time, so that a slot that changes hands twice ends up with what it was given last.
    """

    def __init__(self, host: HostExperts, slots: ExpertSlots) -> None:
        self._host, self._slots = host, slots
        self.pending: list[Copy] = []
        self._device = slots.rows_SP.device
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call] # as in clock.py
        self._ready: torch.cuda.Event | None = None
        self._demand: list[Copy] = []
        self._prefetch: list[Copy] = []
        self._running: list[Copy] = []
        self._error: BaseException | None = None
        self._ended = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="expert-copies", daemon=True)
        self._thread.start()

    def claim(self, slots: set[int]) -> None:
        """Drop what still waits for these slots, and let what is being written into them end."""
        with self._wake:
            for queue in (self._demand, self._prefetch):
                for copy in [copy for copy in queue if copy.transfer.slot in slots]:
                    queue.remove(copy)
                    self.pending.remove(copy)
            self._wake.wait_for(lambda: not any(copy.transfer.slot in slots for copy in self._running))

    def start(self, copies: list[Copy]) -> None:
        """Queue them."""
        if self._stream is not None:  # after what may still read the slots, or fill them with NaN
            self._ready = torch.cuda.current_stream(self._device).record_event()
        with self._wake:
            self.pending += copies
            self._demand += [copy for copy in copies if copy.transfer.blocking]
            self._prefetch += [copy for copy in copies if not copy.transfer.blocking]
            self._wake.notify_all()

    def arrived(self) -> list[Copy]:
        """What has come, see `Mover`."""
        if self._error is not None:
            raise self._error
        told = [copy for copy in self.pending if copy.done.is_set()]
        self.pending = [copy for copy in self.pending if copy not in told]
        return told

    def wait(self, copies: Iterable[Copy]) -> None:
        """Move them to the front, and wait."""
        wanted = list(copies)
        with self._wake:
            for copy in [copy for copy in self._prefetch if copy in wanted]:
                self._prefetch.remove(copy)
                self._demand.append(copy)
            self._wake.wait_for(lambda: self._error is not None or all(c.done.is_set() for c in wanted))
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Carry what is queued, then end the thread."""
        with self._wake:
            self._ended = True
            self._wake.notify_all()
        self._thread.join()
        self.pending = []

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ended or bool(self._demand or self._prefetch))
                if not (self._demand or self._prefetch):
                    return
                self._running = self._next()
                ready = self._ready
            try:
                self._carry(self._running, ready)
            except BaseException as error:  # told to the thread that computes, whatever it is
                self._error = error
            with self._wake:
                for copy in self._running:
                    copy.done.set()
                self._running = []
                self._wake.notify_all()
                if self._error is not None:
                    return

    def _next(self) -> list[Copy]:
        if self._demand:
            batch, self._demand = self._demand, []
            return batch
        self._prefetch.sort(key=lambda copy: copy.transfer.due)  # stable: equal ones in order of issue
        batch, self._prefetch = self._prefetch[:PREFETCHES], self._prefetch[PREFETCHES:]
        return batch

    def _carry(self, batch: list[Copy], ready: torch.cuda.Event | None) -> None:
        if self._stream is None:
            for run in neighbours(batch):
                carry(run, self._host, self._slots)
            return
        assert ready is not None, "start notes it before it queues"
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for run in neighbours(batch):
                carry(run, self._host, self._slots)
            event = self._stream.record_event()
        event.synchronize()


def neighbours(copies: list[Copy]) -> list[list[Copy]]:
    """`copies` in runs that lie side by side in host memory and in the slots, at one precision: each is one copy."""
    order = sorted(copies, key=lambda c: (c.precision, c.transfer.layer, c.transfer.expert))
    runs = [order[:1]] if order else []
    for before, copy in pairwise(order):
        a, b = before.transfer, copy.transfer
        steps = (b.layer - a.layer, b.expert - a.expert, b.slot - a.slot)
        if steps == (0, 1, 1) and before.precision == copy.precision:
            runs[-1].append(copy)
        else:
            runs.append([copy])
    return runs


def carry(run: list[Copy], host: HostExperts, slots: ExpertSlots) -> None:
    """One run of neighbours into its slots: as bytes over the link, unpacked on the device where they are packed."""
    first, count = run[0].transfer, len(run)
    rows = host.rows(run[0].precision)[first.layer, first.expert : first.expert + count]
    target_NP = slots.rows_SP[first.slot : first.slot + count]
    if run[0].precision == FULL:
        target_NP.copy_(rows, non_blocking=True)
        return
    packed_NC = rows.to(target_NP.device, non_blocking=True)
    target_NP.copy_(dequantise(packed_NC, run[0].precision, slots.shape.params, target_NP.dtype))


def as_copies(moves: list[Transfer], copy_dtype: str | None) -> list[Copy]:
    """Copies of the moves; those in full precision go in `copy_dtype` where there is one.

    Raises PolicyError for a free transfer, which only a simulator can make.
    """
    if any(t.free for t in moves):
        raise PolicyError("a free transfer exists only in the simulator")
    return [Copy(transfer=t, precision=(copy_dtype or FULL) if t.precision == FULL else t.precision) for t in moves]
