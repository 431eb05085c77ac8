"""A step's tokens on two cores: what is said of a token hangs on no other token's forecast."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numba

P = TypeVar("P")
R = TypeVar("R")
ENOUGH = 512
"""Tokens; with fewer, one thread is done before a second one is awake."""
FIRST = 0.54
"""Share of the tokens that whoever asks does itself: a second thread begins later."""


def halves(tokens: int) -> list[slice]:
    """All rows; of many two parts, where NUMBA_NUM_THREADS allows two threads."""
    if tokens < ENOUGH or numba.config.NUMBA_NUM_THREADS < 2:
        return [slice(0, tokens)]
    middle = round(FIRST * tokens)
    return [slice(0, middle), slice(middle, tokens)]


def together(work: Callable[[P], R], parts: Sequence[P]) -> list[R]:
    """What `work` returns of each of the parts, of which there are one or two; it is asked for two at once, and has to
    let other threads run, as compiled code does. Where the second thread has not come to its part when the first one is
    done, cores are busy and nobody waits for it."""
    if len(parts) == 1:
        return [work(parts[0])]
    second = _helper(os.getpid()).submit(work, parts[1])
    try:
        first = work(parts[0])
    except BaseException:
        if not second.cancel():
            second.exception()  # it writes into the same arrays: nothing goes on behind whoever asked
        raise
    return [first, work(parts[1]) if second.cancel() else second.result()]


@cache
def _helper(process: int) -> ThreadPoolExecutor:
    """Of this process: a forked one inherits no threads."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"forecast-{process}")
