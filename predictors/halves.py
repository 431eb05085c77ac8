"""A step's tokens on two cores: what is said of a token hangs on no other token's forecast."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Generic, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

P = TypeVar("P")
R = TypeVar("R")
ENOUGH = 512
"""Tokens; with fewer, one thread is done before a second one is awake."""
FIRST = 0.6
"""Share of the tokens that whoever asks does itself: a second thread begins later."""


def halves(tokens: int) -> list[slice]:
    """All rows; of many two parts, where NUMBA_NUM_THREADS allows two threads."""
    if tokens < ENOUGH or numba.config.NUMBA_NUM_THREADS < 2:
        return [slice(0, tokens)]
    middle = round(FIRST * tokens)
    return [slice(0, middle), slice(middle, tokens)]


def halves_of_requests(length_B: NDArray[np.int64], share: float = 0.5) -> list[tuple[int, NDArray[np.int64]]]:
    """`halves` of whole requests, the first as near to `share` of the tokens as it can be, as (first row, their
    lengths); one long request is no two."""
    end_B = np.cumsum(length_B)
    first = 1 + int(np.abs(end_B - share * end_B[-1]).argmin()) if len(length_B) else 0
    if first == len(length_B) or len(halves(int(end_B[-1]))) == 1:
        return [(0, length_B)]
    return [(0, length_B[:first]), (int(end_B[first - 1]), length_B[first:])]


class _Half(Generic[P, R]):
    """A part that is done by whoever comes to it first."""

    __slots__ = ("_begun", "_done", "_error", "_part", "_returned", "_work")

    def __init__(self, work: Callable[[P], R], part: P) -> None:
        self._work, self._part = work, part
        self._begun, self._done = Lock(), Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def begin(self) -> bool:
        """Whether it is up to the caller now."""
        return self._begun.acquire(blocking=False)

    def do(self) -> None:
        """Beside the other half, where that has not come to it yet."""
        if self.begin():
            try:
                self._returned = self._work(self._part)
            except BaseException as error:
                self._error = error
            self._done.release()

    def wait(self) -> None:
        """Until it is done by another thread."""
        self._done.acquire()

    def returned(self) -> R:
        """What `work` returns of it."""
        if self.begin():
            return self._work(self._part)
        self.wait()
        if self._error:
            raise self._error
        return self._returned


def together(work: Callable[[P], R], parts: Sequence[P]) -> list[R]:
    """What `work` returns of each of the parts, of which there are one or two; it is asked for two at once, and has to
    let other threads run, as compiled code does. Where the second thread has not come to its part when the first one is
    done, cores are busy and nobody waits for it."""
    if len(parts) == 1:
        return [work(parts[0])]
    second = _Half(work, parts[1])
    _waiting(os.getpid()).put(second)
    try:
        first = work(parts[0])
    except BaseException:
        if not second.begin():
            second.wait()  # it writes into the same arrays: nothing goes on behind whoever asked
        raise
    return [first, second.returned()]


@cache
def _waiting(process: int) -> SimpleQueue[_Half[Any, Any]]:
    """Halves that a second thread takes up; of this process, as a forked one inherits no threads."""
    waiting: SimpleQueue[_Half[Any, Any]] = SimpleQueue()

    def work() -> None:
        while True:
            waiting.get().do()

    Thread(target=work, name=f"forecast-{process}", daemon=True).start()
    return waiting
