"""Timelines for Perfetto and Chrome.

A simulated run's is made from its event log alone: a row per GPU and per queue, copies as flows, imbalance as counter.
Whoever measures hands in spans, and spans of both kinds go into one file, a process each (`span_timeline`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.traces import InputError

Event = dict[str, Any]
US = 1e6
COMPUTE = ("attention", "experts")


@dataclass(frozen=True, slots=True)
class Span:
    """Something took so long: the one form in which executors tell what happened when. Seconds since the run began."""

    name: str
    """What was done, named as the simulator names it where it knows the same: attention, decide, blocked, dispatch,
    experts, combine, or "layer 3 expert 7 to GPU 1" for a copy."""
    track: str
    """Who did it, a row of the picture: "GPU 0", "copies into GPU 0"."""
    start_s: float
    duration_s: float


def pack(spans: Sequence[Span]) -> dict[str, Any]:
    """JSON form: each name and track once; times in whole nanoseconds, which is finer than any clock."""
    names = {name: i for i, name in enumerate(dict.fromkeys(span.name for span in spans))}
    tracks = {track: i for i, track in enumerate(dict.fromkeys(span.track for span in spans))}
    rows = [[names[s.name], tracks[s.track], round(s.start_s * 1e9), round(s.duration_s * 1e9)] for s in spans]
    return {"names": list(names), "tracks": list(tracks), "name_track_start_ns_duration_ns": rows}


def unpack(data: Mapping[str, Any]) -> list[Span]:
    """The inverse of `pack`. Raises KeyError, IndexError, TypeError or ValueError for what it did not write."""
    names, tracks = data["names"], data["tracks"]
    rows = data["name_track_start_ns_duration_ns"]
    return [Span(names[n], tracks[t], start / 1e9, duration / 1e9) for n, t, start, duration in rows]


def spans_of(events: Iterable[Event]) -> list[Span]:
    """What a simulated run's log says in the form of a measured one's; flows and counters are left out."""
    made = _Process(1, "").of(events)
    rows = {e["tid"]: e["args"]["name"] for e in made if e["name"] == "thread_name"}
    return [Span(e["name"], rows[e["tid"]], e["ts"] / US, e["dur"] / US) for e in made if e["ph"] == "X"]


def span_timeline(spans_by_process: Mapping[str, Sequence[Span]]) -> dict[str, Any]:
    """Trace Event Format of runs that are to be looked at side by side, each beginning at 0: a process for each name,
    in order, a thread for each track. Raises InputError where there is nothing to show."""
    made: list[Event] = []
    for pid, (name, spans) in enumerate(spans_by_process.items(), 1):
        process = _Process(pid, name)
        made += process.of_spans(spans)
        made.append({"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}})
    if not any(spans_by_process.values()):
        raise InputError("no spans to draw: run simulate and run-gpu with --timeline, too")
    return {"traceEvents": made, "displayTimeUnit": "ms", "otherData": {"made by": "moesim"}}


def timeline(events_by_policy: dict[str, list[Event]]) -> dict[str, Any]:
    """Trace Event Format (JSON object form), microseconds: a process per policy, a thread per GPU, then per queue."""
    made: list[Event] = []
    for pid, (policy, events) in enumerate(events_by_policy.items(), 1):
        made += _Process(pid, policy).of(events)
    return {"traceEvents": made, "displayTimeUnit": "ms", "otherData": {"made by": "moesim simulate --timeline"}}


class _Process:
    def __init__(self, pid: int, policy: str) -> None:
        self._pid = pid
        self._made: list[Event] = [self._meta("process_name", 0, policy)]
        self._rows: dict[str, int] = {}
        self._issued: dict[int, Event] = {}
        self._began: dict[int, list[Event]] = {}
        self._gpus = 1

    def of(self, events: Iterable[Event]) -> list[Event]:
        """Everything that one policy's log says."""
        for event in events:
            what = event["what"]
            if what == "run begins":
                self._gpus = event["gpus"]
                for gpu in range(self._gpus):
                    self._row(f"GPU {gpu}")
            elif what in COMPUTE:
                self._compute(event)
            elif what == "transfer issued":
                self._issued[event["number"]] = event
            elif what == "transfer begins":
                self._began.setdefault(event["number"], []).append(event)
            elif what == "transfer ends":
                self._copy(event)
            elif what == "fault":
                self._add("i", 0, event["time_s"], name=event["fault"], s="p")
            elif what == "request done":
                self._request(event)
            elif "duration_s" in event:
                for gpu in range(self._gpus):
                    self._slice(f"GPU {gpu}", what, event["begin_s"], event["duration_s"], event)
        return self._made

    def of_spans(self, spans: Iterable[Span]) -> list[Event]:
        """A slice for each span that took any time, rows in the order of their names so that GPU 2 follows GPU 1."""
        spans = list(spans)
        for track in sorted({span.track for span in spans}, key=_natural):
            self._row(track)
        for span in spans:
            self._slice(span.track, span.name, span.start_s, span.duration_s, {})
        return self._made

    def _compute(self, event: Event) -> None:
        """Each GPU's own time; what it waits for the slowest stays empty."""
        begins = event.get("start_s", [event["begin_s"]] * self._gpus)
        for gpu, (begin, seconds) in enumerate(zip(begins, event["gpu_s"], strict=True)):
            self._slice(f"GPU {gpu}", event["what"], begin, seconds, event)
        self._slice("host CPU", event["what"], event["begin_s"], event.get("host_s", 0.0), event)
        if event["what"] == "experts" and sum(event["tokens_G"]):
            tokens, begin = event["tokens_G"], event["begin_s"]
            self._add("C", 0, begin, name="imbalance", args={"max / mean": max(tokens) * len(tokens) / sum(tokens)})

    def _copy(self, end: Event) -> None:
        """A slice on every queue that the copy held, and an arrow from where it was issued to where it begins."""
        number = end["number"]
        issued, began = self._issued.pop(number), self._began.pop(number)
        copied = issued["copied"]
        name = f"layer {copied['layer']} expert {copied['expert']} to GPU {copied['target']}"
        ends = [*(event["time_s"] for event in began[1:]), end["time_s"]]
        for event, until in zip(began, ends, strict=True):
            for queue in event["queues"]:
                self._slice(queue, name, event["time_s"], until - event["time_s"], issued)
        source = self._row("host" if copied["source"] < 0 else f"GPU {copied['source']}")
        first = self._row(began[0]["queues"][0])
        self._add("s", source, issued["time_s"], name="copy", cat="copy", id=number)
        self._add("f", first, began[0]["time_s"], name="copy", cat="copy", id=number, bp="e")

    def _request(self, event: Event) -> None:
        """An asynchronous slice from arrival to end, with what it consists of."""
        times = [event["arrival_s"], event["start_s"], event["first_token_s"], event["time_s"]]
        for name, begin, end in zip(("queueing", "prompt", "further tokens"), times, times[1:], strict=False):
            if end > begin:
                for phase, at in (("b", begin), ("e", end)):
                    self._add(phase, 0, at, name=name, cat="request", id=f"request {event['request']}")

    def _slice(self, row: str, name: str, begin_s: float, seconds: float, event: Event) -> None:
        if seconds > 0:
            args = {key: event[key] for key in ("step", "part", "layer", "blocking") if event.get(key) is not None}
            self._add("X", self._row(row), begin_s, name=name, dur=seconds * US, args=args)

    def _row(self, name: str) -> int:
        if name not in self._rows:
            self._rows[name] = len(self._rows) + 1
            self._made.append(self._meta("thread_name", self._rows[name], name))
        return self._rows[name]

    def _meta(self, what: str, tid: int, name: str) -> Event:
        return {"ph": "M", "pid": self._pid, "tid": tid, "name": what, "args": {"name": name}}

    def _add(self, phase: str, tid: int, at_s: float, **rest: Any) -> None:
        self._made.append({"ph": phase, "pid": self._pid, "tid": tid, "ts": at_s * US, **rest})


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key by which GPU 10 follows GPU 9."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split()]
