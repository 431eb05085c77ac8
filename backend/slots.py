"""Experts in host memory, and their way into slots on the device: demand before prefetch, neighbours in one copy.

A mover carries what the driver has begun and tells what has arrived; it never decides. `Inline` carries at once, in
order, so that a run repeats to the bit; `Threaded` carries beside the computation on a CPU, `streams.Streamed` on a
GPU. Knows nothing about policies. Shape letters: L MoE layers, E experts, P weights of one expert, C bytes of a
packed one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from mmap import PAGESIZE
from typing import Any, Protocol

import torch
from torch.nn import functional

from moesim.backend.cuda import runtime
from moesim.backend.experts import ExpertShape, ExpertSlots
from moesim.backend.grouped import Activation
from moesim.backend.quantize import dequantise, packed_bytes, quantise
from moesim.sim.residency import PRECISIONS, Transfer
from moesim.traces import MoesimError, PolicyError

FULL = PRECISIONS[0]
PREFETCHES = 4
"""Most prefetches that are carried without looking whether somebody has begun to wait for something else."""


class HostExperts:
    """All experts of a stack in host memory, pinned where a GPU reads them; packed forms are made when first wanted.

    `weights_LE` gives its rows away one by one, wherever they lie, so that there is one copy of the model and never
    more than a layer of a second; from then on its entries are views of this memory. Raises MoesimError where the
    memory cannot be pinned.
    """

    def __init__(self, weights_LE: list[list[torch.Tensor]], shape: ExpertShape, *, pinned: bool) -> None:
        self.shape = shape
        self._pinned = pinned
        self._rows: dict[str, list[torch.Tensor]] = {FULL: []}
        for row_E in weights_LE:
            layer_EP = self._memory(len(row_E), shape.params, shape.dtype)
            for expert in range(len(row_E)):
                layer_EP[expert].copy_(row_E[expert])
                row_E[expert] = layer_EP[expert]
            self._rows[FULL].append(layer_EP)

    def rows(self, precision: str) -> list[torch.Tensor]:
        """[L] of [E, P] weights or, packed, of [E, C] bytes."""
        if precision not in self._rows:
            self._rows[precision] = [self._packed(layer_EP, precision) for layer_EP in self._rows[FULL]]
        return self._rows[precision]

    def compute(self, layer: int, expert: int, x_XD: torch.Tensor, activation: Activation) -> torch.Tensor:
        """[X, D] an expert's output, computed by the host from its own memory."""
        row_P, half = self._rows[FULL][layer][expert], self.shape.params // 2
        wi_FD = row_P[:half].view(self.shape.d_ff, self.shape.d_model)
        wo_DF = row_P[half:].view(self.shape.d_model, self.shape.d_ff)
        return functional.linear(activation(functional.linear(x_XD, wi_FD)), wo_DF)

    def bytes(self, precision: str) -> int:
        """Bytes that one copy moves."""
        return self.shape.bytes if precision == FULL else packed_bytes(self.shape.params, precision)

    def _packed(self, layer_EP: torch.Tensor, precision: str) -> torch.Tensor:
        """A layer in fewer bits, packed on the GPU where there is one: a host takes minutes for a large model."""
        packed_EC = self._memory(len(layer_EP), packed_bytes(self.shape.params, precision), torch.uint8)
        device = "cuda" if self._pinned else "cpu"
        for expert, row_P in enumerate(layer_EP):
            packed_EC[expert].copy_(quantise(row_P[None].to(device), precision)[0])
        return packed_EC

    def _memory(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] of host memory, pinned where a GPU reads it: whole pages in place or, where the driver refuses
        that, torch's own, which is rounded up to a power of two and never given back."""
        nbytes = rows * width * dtype.itemsize
        if not self._pinned or nbytes == 0:
            return torch.empty((rows, width), dtype=dtype)
        pages = -(-nbytes // PAGESIZE) * PAGESIZE
        room = torch.empty(pages + PAGESIZE, dtype=torch.uint8)
        begin = -room.data_ptr() % PAGESIZE
        cudart = runtime()
        if int(cudart.cudaHostRegister(room.data_ptr() + begin, pages, 0)) == 0:
            # Before this object's memory can go; a process that ends gives everything back by itself.
            weakref.finalize(self, cudart.cudaHostUnregister, room.data_ptr() + begin).atexit = False
            return room[begin : begin + nbytes].view(dtype).view(rows, width)
        _forget_last_error()
        try:
            return torch.empty((rows, width), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise MoesimError(
                f"{nbytes / 2**30:.1f} GiB of host memory cannot be pinned ({said}): free memory, "
                "raise the limit of locked memory (ulimit -l), or offload fewer experts"
            ) from None


def _forget_last_error() -> None:
    """What the runtime refused stays its last error, which torch would raise at whatever kernel it launches next."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return


@dataclass(slots=True, kw_only=True, eq=False)
class Copy:
    """A transfer under way."""

    transfer: Transfer
    precision: str
    """What is really carried: the transfer's own precision, or that of `--copy-dtype`."""
    late: bool = False
    """Its layer has computed without it, or had to wait for it."""
    done: threading.Event = field(default_factory=threading.Event)
    """Set by movers that carry on the host's time."""
    ready: Any = None
    """Event in the device's time from which the slot may be written."""
    event: Any = None
    """Event in the device's time at which it has come; None until it is issued."""
    awaited: bool = False
    """What computes on the device comes after it, whatever the host sees yet."""


class Mover(Protocol):
    """Carries copies."""

    pending: list[Copy]
    """In order of issue, until `arrived` has told of them."""

    def claim(self, slots: set[int]) -> None:
        """From now on nothing is written into these slots but what is started next."""

    def start(self, copies: list[Copy]) -> None:
        """Take copies whose slots have been claimed for them."""

    def pump(self) -> None:
        """Begin what there is room for now; whoever waits for something else calls it meanwhile."""

    def arrived(self) -> list[Copy]:
        """What has come since the last call, in order of issue. Raises what went wrong on the way."""

    def wait(self, copies: Iterable[Copy]) -> None:
        """What computes next has these; they go before everything else."""

    def drain(self) -> None:
        """End: what has not begun is dropped, and nothing is under way on return."""


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

    def pump(self) -> None:
        """Nothing waits."""

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
    """Copies are carried by a thread, on a CPU: what somebody waits for first, else up to PREFETCHES prefetches that
    are due.

    One piece at a time, so that a slot that changes hands twice ends up with what it was given last. On a GPU a thread
    would hold the interpreter's lock against the one that computes: there it is streams.py.
    """

    def __init__(self, host: HostExperts, slots: ExpertSlots) -> None:
        self._host, self._slots = host, slots
        self.pending: list[Copy] = []
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
        with self._wake:
            self.pending += copies
            self._demand += [copy for copy in copies if copy.transfer.blocking]
            self._prefetch += [copy for copy in copies if not copy.transfer.blocking]
            self._wake.notify_all()

    def pump(self) -> None:
        """The thread does it."""

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
        """Drop what is queued, and end the thread."""
        with self._wake:
            self._ended = True
            self._demand, self._prefetch = [], []
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
            try:
                self._carry(self._running)
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

    def _carry(self, batch: list[Copy]) -> None:
        for run in neighbours(batch):
            carry(run, self._host, self._slots)


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
    rows = host.rows(run[0].precision)[first.layer][first.expert : first.expert + count]
    target_NP = slots.rows_SP[first.slot : first.slot + count]
    if run[0].precision == FULL:
        target_NP.copy_(rows, non_blocking=True)
        return
    packed_NC = rows.to(target_NP.device, non_blocking=True)
    dequantise(packed_NC, run[0].precision, slots.shape.params, target_NP)


def as_copies(moves: list[Transfer], copy_dtype: str | None) -> list[Copy]:
    """Copies of the moves; those in full precision go in `copy_dtype` where there is one.

    Raises PolicyError for a free transfer, which only a simulator can make.
    """
    if any(t.free for t in moves):
        raise PolicyError("a free transfer exists only in the simulator")
    return [Copy(transfer=t, precision=(copy_dtype or FULL) if t.precision == FULL else t.precision) for t in moves]
