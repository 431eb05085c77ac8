"""Kernels of several streams that are to begin together, though one host thread launches them one after the other.

Knows nothing about what they compute.
"""

from __future__ import annotations

import statistics
from collections import deque

import torch

from moesim.backend.cuda import new_event, pause

MOST_S = 5e-3
"""The longest time that a gate holds."""
FIRST_S = 1e-3
REMEMBERED, LONGER = 9, 1.3
"""It holds so many times as long as the median of the last launches took: one that was disturbed changes nothing."""
TICKS, WARM_UPS = 2_000_000, 20
"""The clock is measured over so many ticks, after as many sleeps: a GPU that idled begins slowly."""


class Gate:
    """Holds the partitions' kernels back while the host launches them, so that all begin together, as on real GPUs
    that have a host thread each.

    On a GPU it is a kernel that spins for about as long as the launches took lately: bounded, so that nothing can wait
    for ever. On a CPU there is none: the threads begin as they are given work.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self._taken_s: dict[int, deque[float]] = {}
        """By number of launches: what eight partitions take says nothing about one."""
        self._ticks_per_s = _ticks_per_s(device) if self.on else 0.0

    def hold(self, launches: int) -> None:
        """Put it into the current stream, before so many queues are given work."""
        if self.on:
            seconds = min(LONGER * statistics.median(self._taken(launches)), MOST_S)
            pause(int(seconds * self._ticks_per_s))

    def launched(self, launches: int, seconds: float) -> None:
        """They took so long this time."""
        self._taken(launches).append(seconds)

    def _taken(self, launches: int) -> deque[float]:
        return self._taken_s.setdefault(launches, deque([FIRST_S], maxlen=REMEMBERED))


def _ticks_per_s(device: torch.device) -> float:
    """Rate of the clock that `_sleep` counts."""
    stream = torch.cuda.current_stream(device)
    begin, end = new_event(), new_event()
    for _ in range(WARM_UPS):
        begin.record(stream)
        pause(TICKS)
        end.record(stream)
    end.synchronize()
    return TICKS / (float(begin.elapsed_time(end)) / 1e3)
