"""Queues of work that run beside each other: CUDA streams on a GPU, threads on a CPU, one interface for both.

Work of one queue runs in its order. A moment is recorded behind what has been given to a queue so far; other queues and
the host can wait for it, and two of them tell the seconds between. Knows nothing about experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from moesim.backend.cuda import recorded
from moesim.backend.green import Groups


class Moment(Protocol):
    """A place in a queue."""

    def done(self) -> bool:
        """True once all that was given to the queue before it has been done. Does not wait."""

    def wait(self) -> None:
        """Block the host until then; raises what failed before it."""

    def since(self, earlier: Any) -> float:
        """Seconds from `earlier`, a moment of the same kind, to this one; both must be done."""


class Queue(Protocol):
    """Takes work and does it in order."""

    def run(self, work: Callable[[], object]) -> None:
        """Give it work; on a GPU `work` is called now and launches kernels, which run in the queue's turn."""

    def after(self, moment: Any) -> None:
        """What is given from now on waits for `moment` of another queue."""

    def record(self) -> Moment:
        """A moment behind all that was given so far."""

    def keep(self, used: torch.Tensor) -> None:
        """The allocator gives its memory away only when what the queue was given so far is done with it."""


class StreamMoment:
    """A CUDA event."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = recorded(stream)

    def done(self) -> bool:
        """See Moment."""
        return bool(self.event.query())

    def wait(self) -> None:
        """See Moment."""
        self.event.synchronize()

    def since(self, earlier: StreamMoment) -> float:
        """See Moment."""
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class StreamQueue:
    """A CUDA stream; None stands for the one that is current when work is given."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device, self._stream = device, stream

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream."""
        return self._stream or torch.cuda.current_stream(self._device)

    def run(self, work: Callable[[], object]) -> None:
        """See Queue."""
        with torch.cuda.stream(self.stream):
            work()

    def after(self, moment: StreamMoment) -> None:
        """See Queue."""
        self.stream.wait_event(moment.event)

    def record(self) -> StreamMoment:
        """See Queue."""
        return StreamMoment(self.stream)

    def keep(self, used: torch.Tensor) -> None:
        """See Queue."""
        used.record_stream(self.stream)


class HostMoment:
    """When a thread came to it, by `time.perf_counter`."""

    def __init__(self, at: Future[float]) -> None:
        self._at = at

    def done(self) -> bool:
        """See Moment."""
        return self._at.done()

    def wait(self) -> None:
        """See Moment."""
        self._at.result()

    def since(self, earlier: HostMoment) -> float:
        """See Moment."""
        return self._at.result() - earlier._at.result()


class ThreadQueue:
    """One thread. After work has failed, nothing given later is done, and every later moment raises the failure."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._failure: BaseException | None = None

    def run(self, work: Callable[[], object]) -> None:
        """See Queue."""
        self._pool.submit(self._do, work)

    def after(self, moment: HostMoment) -> None:
        """See Queue."""
        self._pool.submit(self._do, moment.wait)

    def record(self) -> HostMoment:
        """See Queue."""
        return HostMoment(self._pool.submit(self._now))

    def keep(self, used: torch.Tensor) -> None:
        """Work that is queued holds what it uses."""

    def close(self) -> None:
        """Finish what was given, and end the thread."""
        self._pool.shutdown()

    def _do(self, work: Callable[[], object]) -> None:
        if self._failure is not None:
            return
        try:
            with torch.inference_mode():  # a thread does not inherit it
                work()
        except BaseException as error:
            self._failure = error

    def _now(self) -> float:
        if self._failure is not None:
            raise self._failure
        return time.perf_counter()


class HostQueue:
    """The host itself: work is done when it is given."""

    def run(self, work: Callable[[], object]) -> None:
        """See Queue."""
        work()

    def after(self, moment: HostMoment) -> None:
        """See Queue."""
        moment.wait()

    def record(self) -> HostMoment:
        """See Queue."""
        now: Future[float] = Future()
        now.set_result(time.perf_counter())
        return HostMoment(now)

    def keep(self, used: torch.Tensor) -> None:
        """Nothing is queued."""


class Queues:
    """The queues of one device: the main one, and for each of G partitions one that computes and one that copies.

    The main queue computes what is not split (attention, routers) on the whole device.
    """

    def __init__(self, device: torch.device, groups: Groups, count: int) -> None:
        self.device = device
        self.main: Queue
        self.compute: list[Queue]
        self.copy: list[Queue]
        self._threads: list[ThreadQueue] = []
        if device.type == "cuda":
            self.main = StreamQueue(device)
            self.compute = [StreamQueue(device, stream) for stream in groups.streams]
            self.copy = [StreamQueue(device, stream) for stream in groups.copy_streams]
            return
        self.main = HostQueue()
        self._threads = [ThreadQueue(f"partition-{g % count}") for g in range(2 * count)]
        self.compute = list(self._threads[:count])
        self.copy = list(self._threads[count:])

    def synchronize(self) -> None:
        """Wait until all queues are empty; raises what failed in one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return
        for queue in self._threads:
            queue.record().wait()

    def close(self) -> None:
        """End the threads, if there are any."""
        for queue in self._threads:
            queue.close()
