"""A queue that counts itself: servers, waiting customers in order of (priority, arrival), and the times that theory
speaks of. The links of the engine are such stations; queueing theory is checked on them (tests/sim/test_station.py).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy


class Station:
    """`servers` places that customers hold one at a time; who waits is served by priority, then by arrival.

    Keeps sums for the mean wait and, by Little's law, areas under the number of customers over time; `measure` reads
    them. What is being served is never interrupted.
    """

    def __init__(self, env: simpy.Environment, name: str, servers: int = 1) -> None:
        self.env, self.name, self.servers = env, name, servers
        self._resource = simpy.PriorityResource(env, capacity=servers)
        self._waiting: dict[int | None, Any] = {}
        self._since = float(env.now)
        self._begin = float(env.now)
        self._here = self._busy = 0
        self._area_here = self._area_busy = 0.0
        self._arrived = self._left = 0
        self._waited_s = self._stayed_s = 0.0

    def enter(self, priority: int = 0, name: int | None = None) -> Generator[Any, Any, Visit]:
        """Queue for a place (`yield from`); the visit that comes back is ended with `leave`. `name` is for `hurry`."""
        arrival = float(self.env.now)
        self._change(here=1)
        self._arrived += 1
        request = self._resource.request(priority=priority)
        if name is not None:
            self._waiting[name] = request
        yield request
        self._waiting.pop(name, None)
        self._change(busy=1)
        self._waited_s += float(self.env.now) - arrival
        return Visit(self, request, arrival)

    def hurry(self, name: int, priority: int) -> None:
        """Who waits under that name is served by another priority from now on; nothing happens where it is served."""
        request = self._waiting.get(name)
        if request is None or request.triggered:
            return
        request.priority = priority
        request.key = (priority, request.time, not request.preempt)
        self._resource.put_queue.sort(key=lambda waiting: waiting.key)

    def measure(self) -> dict[str, float]:
        """Since the beginning: customers a second, mean seconds waited and stayed (of those who left), mean number
        here, share of the places that were busy."""
        self._change()
        elapsed = max(float(self.env.now) - self._begin, 1e-300)
        gone = max(self._left, 1)
        return {
            "arrivals_per_s": self._arrived / elapsed,
            "wait_s": self._waited_s / max(self._arrived - self._queued, 1),
            "stay_s": self._stayed_s / gone,
            "here": self._area_here / elapsed,
            "utilisation": self._area_busy / elapsed / self.servers,
        }

    @property
    def _queued(self) -> int:
        return self._here - self._busy

    def _change(self, here: int = 0, busy: int = 0) -> None:
        now = float(self.env.now)
        self._area_here += self._here * (now - self._since)
        self._area_busy += self._busy * (now - self._since)
        self._since = now
        self._here += here
        self._busy += busy

    def _leave(self, visit: Visit) -> None:
        self._change(here=-1, busy=-1)
        self._left += 1
        self._stayed_s += float(self.env.now) - visit.arrival
        self._resource.release(visit.request)


class Visit:
    """A place that is held."""

    __slots__ = ("arrival", "request", "station")

    def __init__(self, station: Station, request: Any, arrival: float) -> None:
        self.station, self.request, self.arrival = station, request, arrival

    def leave(self) -> None:
        """Give the place to the next customer."""
        self.station._leave(self)
