"""Moments in time: of the host on a CPU, events in the device's stream on a GPU, which tell what the device did, not
when the host asked for it. Knows nothing about what they mean.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from moesim.backend.cuda import recorded


def moment(device: torch.device) -> Any:
    """This moment; on a GPU the one when the device comes to what follows in its current stream."""
    return recorded() if device.type == "cuda" else time.perf_counter()


def seconds_between(begin: Any, moments: list[Any]) -> list[float]:
    """Seconds from `begin` to each of the moments, the last one last. On a GPU it waits for the device."""
    if isinstance(begin, float):
        return [later - begin for later in moments]
    moments[-1].synchronize()
    return [begin.elapsed_time(later) / 1e3 for later in moments]


class Clock:
    """Collects marks during a step; `read` afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment."""
        self._marks.append(moment(self._device))

    def read(self) -> list[float]:
        """Seconds between each mark and the first, and start anew. Waits for the device."""
        marks, self._marks = self._marks, []
        return seconds_between(marks[0], marks)
