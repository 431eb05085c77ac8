"""Measured curves of a hardware profile: seconds at the sizes that were measured, and a stated rule elsewhere.

Between measured points both curves are linear in logarithms, which is exact for any power of the size. Beyond them each
has its own rule, and `outside` says which sizes that concerns, so that whoever uses a curve can report it. Pure; knows
nothing about models or time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.traces import InputError
from moesim.traces.spec import DTYPE_BYTES

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Roofline = Callable[[Floats, Floats], Floats]
"""Seconds that the cost model gives to (distinct experts, tokens per expert), arrays [N] both."""

MESSAGE_RULE = "linear in logs between points; below them the first point's time, above them the last point's bytes/s"
EXPERT_RULE = "bilinear in logs between points; beyond them the nearest edge times the ratio of the fitted roofline"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageCurve:
    """Measured seconds of one message by its bytes, at two sizes or more."""

    nbytes: tuple[float, ...]
    """Bytes, positive and ascending."""
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_axis("nbytes", self.nbytes, at_least=2)
        _check_seconds("seconds", self.seconds, len(self.nbytes))

    def seconds_at(self, nbytes: Any) -> Any:
        """Seconds of messages of `nbytes` bytes, a number or an array of any shape; returns the same.

        Between points linear in logs; below the first its seconds (that is the latency, also of no bytes at all); above
        the last as many bytes a second as there.
        """
        asked = np.asarray(nbytes, np.float64)
        # One dense row whatever the shape is: numpy's log and exp may round differently over strided arrays.
        x = asked.ravel()
        log_s = np.interp(np.log(np.maximum(x, self.nbytes[0])), _logs(self.nbytes), _logs(self.seconds))
        found = (np.exp(log_s) * np.maximum(x / self.nbytes[-1], 1.0)).reshape(asked.shape)
        return found if asked.shape else float(found)

    def outside(self, nbytes: ArrayLike) -> Bools:
        """Which of these sizes lie beyond the measured ones, in the shape of `nbytes`; no bytes at all do not count."""
        x = np.asarray(nbytes, np.float64)
        return (x > 0) & ((x < self.nbytes[0]) | (x > self.nbytes[-1]))

    def range_text(self) -> str:
        """The measured range in words."""
        return f"{_bytes_text(self.nbytes[0])} to {_bytes_text(self.nbytes[-1])} ({len(self.nbytes)} points)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCurve:
    """Measured seconds of one device's expert phase, for experts of one shape that all have equally many tokens."""

    d_model: int
    d_ff: int
    gated: bool
    """True for three-matrix experts, False for two."""
    dtype: str
    distinct: tuple[int, ...]
    """Experts that have tokens, ascending."""
    rows: tuple[int, ...]
    """Tokens of each of them, ascending."""
    seconds: tuple[tuple[float, ...], ...]
    """[distinct][rows]."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise InputError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        _check_axis("distinct", self.distinct, at_least=1)
        _check_axis("rows", self.rows, at_least=2)
        if len(self.seconds) != len(self.distinct):
            wanted = f"one list for each of {len(self.distinct)} points of distinct"
            raise InputError(f"seconds must have {wanted}, got {len(self.seconds)}")
        for i, seconds in enumerate(self.seconds):
            _check_seconds(f"seconds[{i}]", seconds, len(self.rows))

    @property
    def shape(self) -> tuple[int, int, bool, str]:
        """What must be equal for the curve to hold: (d_model, d_ff, gated, dtype)."""
        return self.d_model, self.d_ff, self.gated, self.dtype

    def seconds_at(self, distinct: ArrayLike, rows_per_expert: ArrayLike, roofline: Roofline) -> Floats:
        """Seconds of `distinct` experts with `rows_per_expert` tokens each, arrays that broadcast; in their shape.

        Between points bilinear in logs. Beyond them the seconds at the nearest edge, times what `roofline` gives to the
        point that is asked for over what it gives to that edge. No experts take no time.
        """
        asked = np.broadcast_arrays(np.asarray(distinct, np.float64), np.asarray(rows_per_expert, np.float64))
        d_N, r_N = (axis.ravel() for axis in asked)
        (d0, d1, d_part), (r0, r1, r_part) = _place(self.distinct, d_N), _place(self.rows, r_N)
        log_DR = _logs(self.seconds)
        low = (1 - r_part) * log_DR[d0, r0] + r_part * log_DR[d0, r1]
        high = (1 - r_part) * log_DR[d1, r0] + r_part * log_DR[d1, r1]
        seconds_N: Floats = np.exp((1 - d_part) * low + d_part * high)
        outside_N = self.outside(d_N, r_N)
        if outside_N.any():
            d, r = d_N[outside_N], r_N[outside_N]
            edge = np.clip(d, self.distinct[0], self.distinct[-1]), np.clip(r, self.rows[0], self.rows[-1])
            seconds_N[outside_N] *= roofline(d, r) / roofline(*edge)
        return np.where(d_N > 0, seconds_N, 0.0).reshape(asked[0].shape)

    def outside(self, distinct: ArrayLike, rows_per_expert: ArrayLike) -> Bools:
        """Which of these points lie beyond the measured grid, in the arguments' shape; no experts do not count."""
        d, r = np.asarray(distinct, np.float64), np.asarray(rows_per_expert, np.float64)
        beyond = (d < self.distinct[0]) | (d > self.distinct[-1]) | (r < self.rows[0]) | (r > self.rows[-1])
        return (d > 0) & beyond

    def range_text(self) -> str:
        """The measured range and the shape that it holds for, in words."""
        experts = "expert" if self.distinct == (1,) else "experts"
        return (
            f"{_span(self.distinct)} {experts} x {_span(self.rows)} tokens each "
            f"({len(self.distinct)} x {len(self.rows)} points), d_model {self.d_model}, d_ff {self.d_ff}, "
            f"{'three' if self.gated else 'two'} matrices, {self.dtype}"
        )


@lru_cache(maxsize=256)
def _logs(points: tuple[Any, ...]) -> Floats:
    """Logarithms of the (nested) points; kept, as a simulation asks for the same few very often."""
    found: Floats = np.log(np.array(points, np.float64))
    found.flags.writeable = False
    return found


def _place(points: tuple[int, ...], x_N: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """[N] (index of the point below, of the point above, how far between them in logs); ends beyond the ends."""
    at_N = np.interp(np.log(np.maximum(x_N, points[0])), _logs(points), np.arange(len(points), dtype=np.float64))
    below_N = at_N.astype(np.intp)
    return below_N, np.minimum(below_N + 1, len(points) - 1), at_N - below_N


def _check_axis(name: str, points: Sequence[float], *, at_least: int) -> None:
    """Raise InputError unless the points are positive, finite and strictly ascending, and enough of them."""
    if len(points) < at_least:
        raise InputError(f"{name} must have at least {at_least} points, got {len(points)}")
    _check_positive(name, points)
    for i in range(1, len(points)):
        if not points[i - 1] < points[i]:
            raise InputError(f"{name} must ascend, got {points[i]!r} after {points[i - 1]!r}")


def _check_seconds(name: str, seconds: Sequence[float], points: int) -> None:
    """Raise InputError unless there is a positive, finite time for each point."""
    if len(seconds) != points:
        raise InputError(f"{name} must have one time for each of {points} points, got {len(seconds)}")
    _check_positive(name, seconds)


def _check_positive(name: str, values: Sequence[float]) -> None:
    for value in values:
        # Compared, not asked with isfinite, which an integer that no float can hold overflows.
        if not 0 < value <= sys.float_info.max:
            raise InputError(f"{name} must be positive numbers, got {value!r}")


def _span(points: tuple[int, ...]) -> str:
    return f"{points[0]} to {points[-1]}" if len(points) > 1 else str(points[0])


def _bytes_text(nbytes: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.3g} B"
