"""Marks in time along one step: host time on a CPU, events in the device's stream on a GPU.

Knows nothing about what the marks mean.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Clock(Protocol):
    """Collects marks during a step; `read` afterwards."""

    def mark(self) -> None:
        """Note this moment; on a GPU the moment when the device comes to it."""

    def read(self) -> list[float]:
        """Seconds between each mark and the first, and start anew. Waits for the device."""


class HostClock:
    """`time.perf_counter`."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """Note this moment."""
        self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Seconds since the first mark."""
        marks, self._marks = self._marks, []
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """CUDA events in the current stream: what the device did, not when the host asked for it."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Enqueue an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch gives it no types
        event.record()
        self._marks.append(event)

    def read(self) -> list[float]:
        """Seconds since the first event."""
        marks, self._marks = self._marks, []
        marks[-1].synchronize()
        return [marks[0].elapsed_time(mark) / 1e3 for mark in marks]


def clock_of(device: torch.device) -> Clock:
    """The clock that fits the device."""
    return CudaClock() if device.type == "cuda" else HostClock()
