"""The event log as a timeline for Perfetto and Chrome: a row per GPU and per queue, copies as flows, imbalance as a
counter. Made from the events alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]
US = 1e6
COMPUTE = ("attention", "experts")


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
