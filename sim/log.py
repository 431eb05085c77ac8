"""Reading event logs, and a step's critical path by name.

The critical path goes back from the end of a step: what ended then, what ended when that began, and so on to the
beginning. Each link names the phase, its layer and micro-batch, and who was the slowest: a GPU, or the copy that a
blocked layer waited for. Everything is read from the log alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.sim.events import Event
from moesim.sim.totals import PHASES
from moesim.traces import InputError


def read_log(path: Path) -> dict[str, list[Event]]:
    """Policy to its events, of what `simulate --event-log` wrote. Raises InputError naming the file and the line."""
    found: dict[str, list[Event]] = {}
    for number, event in enumerate(_lines(path), 1):
        if not isinstance(event, dict) or not {"policy", "what", "time_s"} <= event.keys():
            raise InputError(f"{path}, line {number}: not an event of moesim simulate --event-log")
        found.setdefault(str(event["policy"]), []).append(event)
    if not found:
        raise InputError(f"{path}: holds no events")
    return found


def _lines(path: Path) -> Iterator[Any]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 # named in the error
                yield json.loads(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); simulate --event-log writes one") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not JSON ({error}); the log is cut short or damaged") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A part of a critical path."""

    what: str
    layer: int | None
    part: int
    who: str
    """The slowest GPU, the copy that was waited for, or nobody in particular."""
    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.begin_s

    def text(self) -> str:
        """In words."""
        where = "" if self.layer is None else f" layer {self.layer}"
        return f"{self.what}{where}{f' ({self.who})' if self.who else ''}"


def critical_path(events: Iterable[Event], step: int) -> list[Link]:
    """The critical path of a step, first link first; their seconds add up to the step's. Raises InputError where the
    log has no such step."""
    issued: dict[int, Event] = {}
    copies: list[tuple[float, str]] = []
    phases: list[Link] = []
    ends: tuple[float, float] | None = None
    begin = 0.0
    for event in events:
        if event["what"] == "transfer issued":
            issued[event["number"]] = event
        elif event["what"] == "transfer ends":
            copies.append((event["time_s"], _copy(issued.pop(event["number"]))))
        if event.get("step") != step:
            continue
        if event["what"] == "step begins":
            begin, copies = event["time_s"], []
        elif event["what"] in PHASES:
            phases += _links(event, copies)
        elif event["what"] == "step ends":
            ends = (begin, event["time_s"])
            break
    if ends is None:
        raise InputError(f"the log has no step {step}")
    return _walk(phases, *ends)


def _links(event: Event, copies: list[tuple[float, str]]) -> list[Link]:
    """The phase as a link that may end the wait of others: one for every GPU where they end apart."""
    where = {"what": event["what"], "layer": event["layer"], "part": event["part"]}
    if "gpu_s" in event and event["duration_s"] > 0:
        gpu_s = np.array(event["gpu_s"])
        start_s = np.array(event.get("start_s", np.full(len(gpu_s), event["begin_s"])))
        end_s = start_s + gpu_s
        slowest = int(np.argmax(end_s))
        if event.get("host_s", 0.0) > end_s[slowest] - event["begin_s"]:
            return [Link(**where, who="host CPU", begin_s=event["begin_s"], end_s=event["time_s"])]
        found = [Link(**where, who=f"GPU {slowest}", begin_s=float(start_s[slowest]), end_s=event["time_s"])]
        if "start_s" in event or (end_s != end_s[slowest]).any():
            # Another micro-batch may have waited for a GPU that was done before the slowest.
            others = [g for g in range(len(gpu_s)) if g != slowest and gpu_s[g] > 0]
            found += [Link(**where, who=f"GPU {g}", begin_s=float(start_s[g]), end_s=float(end_s[g])) for g in others]
        return found
    who = copies[-1][1] if event["what"] == "blocked" and copies else ""
    return [Link(**where, who=who, begin_s=event["begin_s"], end_s=event["time_s"])]


def _copy(event: Event) -> str:
    copied = event["copied"]
    source = "the host" if copied["source"] < 0 else f"GPU {copied['source']}"
    return f"copy of layer {copied['layer']} expert {copied['expert']} from {source} to GPU {copied['target']}"


def _walk(phases: list[Link], begin_s: float, end_s: float) -> list[Link]:
    """Back from the end: of what ended last before, or at, the time reached, the part's own phase first."""
    path: list[Link] = []
    at, part = end_s, -1
    slack = 1e-12 * max(abs(end_s), 1e-9)  # a sum of times may be rounded otherwise than the clock
    left = [link for link in phases if link.end_s > link.begin_s]
    while at > begin_s + slack:
        ready = [link for link in left if abs(link.end_s - at) <= slack]
        if not ready:
            gap_to = max((link.end_s for link in left if link.end_s < at - slack), default=begin_s)
            path.append(Link(what="waiting", layer=None, part=max(part, 0), who="", begin_s=gap_to, end_s=at))
            at = gap_to
            continue
        link = max(ready, key=lambda link: (link.part == part, link.begin_s))
        path.append(link)
        left = [other for other in left if other.begin_s < link.begin_s]
        at, part = link.begin_s, link.part
    return path[::-1]
