"""Streams and events as the backend uses them, with types, which torch does not give them. Imports without a GPU."""

from __future__ import annotations

from typing import Any

import torch

_cuda: Any = torch.cuda


def new_stream(device: torch.device | None = None, priority: int = 0) -> torch.cuda.Stream:
    """A stream of its own; a lower number goes first."""
    made: torch.cuda.Stream = _cuda.Stream(device, priority=priority)
    return made


def stream_of(handle: int, device: torch.device) -> torch.cuda.Stream:
    """A stream that the driver made."""
    made: torch.cuda.Stream = _cuda.ExternalStream(handle, device=device)
    return made


def new_event(*, timed: bool = True) -> Any:
    """An event, with or without the time when the device comes to it."""
    return _cuda.Event(enable_timing=timed)


def recorded(stream: torch.cuda.Stream | None = None) -> Any:
    """A timed event behind all that the stream (None: the current one) was given so far."""
    event = new_event()
    event.record(stream or torch.cuda.current_stream())
    return event


def pause(ticks: int) -> None:
    """Let the current stream stand still for so many ticks of the device's clock."""
    _cuda._sleep(ticks)


def runtime() -> Any:
    """CUDA's runtime, as far as torch binds it."""
    return _cuda.cudart()
