"""When requests come in an open loop: Poisson, bursty, or at recorded times. Knows nothing about routing."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.traces import InputError

FORMS = "poisson:RATE, gamma:RATE:CV (bursty where CV > 1; requests a second) or a file of times"
COLUMNS = ("arrival_s", "timestamp")
"""Names of the time in a file: seconds; or milliseconds, as in the traces of Mooncake (arXiv 2407.00079)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """A process of arrivals. `cv` is the coefficient of variation of the time between them: 1 is Poisson."""

    kind: Literal["poisson", "gamma", "recorded"]
    rate_per_s: float = 0.0
    cv: float = 1.0
    recorded_s: tuple[float, ...] = ()
    """Ascending, from 0."""
    name: str = ""
    """Of the file."""

    def times(self, count: int, seed: int) -> NDArray[np.float64]:
        """[count] seconds, ascending; of recorded ones the first. Raises InputError where fewer were recorded."""
        if self.kind == "recorded":
            if count > len(self.recorded_s):
                raise InputError(f"{self.name}: {len(self.recorded_s)} arrivals are recorded, {count} are asked for")
            return np.array(self.recorded_s[:count])
        shape = 1 / self.cv**2
        gaps = np.random.default_rng(seed).gamma(shape, 1 / (self.rate_per_s * shape), count)
        return np.cumsum(gaps)

    def text(self) -> str:
        """For reports."""
        if self.kind == "recorded":
            return f"recorded in {self.name}"
        burst = f", CV {self.cv:g}" if self.kind == "gamma" else ""
        return f"{self.kind}, {self.rate_per_s:g} requests/s{burst}"


def parse_arrivals(text: str) -> Arrivals:
    """Arrivals as people write them. Raises InputError naming the forms, or the file and what is wrong with it."""
    kind, *numbers = text.split(":")
    if kind not in ("poisson", "gamma"):
        return _recorded(Path(text))
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if len(values) != (1 if kind == "poisson" else 2) or not all(math.isfinite(v) and v > 0 for v in values):
        raise InputError(f"arrivals {text!r} are not of the form {FORMS}, all numbers positive")
    if kind == "poisson":
        return Arrivals(kind="poisson", rate_per_s=values[0])
    return Arrivals(kind="gamma", rate_per_s=values[0], cv=values[1])


def _recorded(path: Path) -> Arrivals:
    """Times from a file: a number a line, CSV with a header, or JSON lines; counted from the first."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); arrivals are {FORMS}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; arrivals are {FORMS}") from None
    try:
        times = _times(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        names = " or ".join(COLUMNS)
        raise InputError(
            f"{path}: no arrival times ({error}); a number a line, or CSV or JSON lines with {names}"
        ) from None
    if not times or not all(math.isfinite(time) for time in times):
        raise InputError(f"{path}: holds no arrival times, or one that is not a finite number")
    times.sort()
    return Arrivals(kind="recorded", recorded_s=tuple(time - times[0] for time in times), name=path.name)


def _times(text: str) -> list[float]:
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith("{"):
        return [_time(json.loads(line)) for line in lines]
    if lines and any(name in lines[0] for name in COLUMNS):
        return [_time(row) for row in csv.DictReader(lines)]
    return [float(line) for line in lines]


def _time(row: dict[str, str]) -> float:
    if "arrival_s" in row:
        return float(row["arrival_s"])
    return float(row["timestamp"]) / 1e3
