"""Copies and all-to-alls on the same wires: they ignore each other, copies pause, or both slow down.

`pause`: while an all-to-all runs, copies stand still (a server that gives collectives the link). `share`: while both
run, each gets half of the bandwidth; the all-to-all is halved by one copy anywhere, since its slowest GPU counts.
Latency is slowed with the bytes. Which wire a copy is on is not told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy

from moesim.sim.execution import Contention

Steps = Generator[Any, Any, None]


class Wires:
    """Lets copies and all-to-alls take their time, longer where they meet."""

    def __init__(self, env: simpy.Environment, contention: Contention) -> None:
        self._env, self.contention = env, contention
        self._copies = self._exchanges = 0
        self._changed = env.event()

    def copy(self, seconds: float) -> Steps:
        """A copy that takes `seconds` alone."""
        if self.contention == "none":
            yield self._env.timeout(seconds)
            return
        self._change(copies=1)
        yield from self._work(seconds, lambda: 1.0 if not self._exchanges else 0.5 * (self.contention == "share"))
        self._change(copies=-1)

    def exchange(self, seconds: float) -> Steps:
        """An all-to-all that takes `seconds` alone."""
        if self.contention == "none":
            yield self._env.timeout(seconds)
            return
        self._change(exchanges=1)
        yield from self._work(seconds, lambda: 0.5 if self._copies and self.contention == "share" else 1.0)
        self._change(exchanges=-1)

    def _work(self, seconds: float, speed: Callable[[], float]) -> Steps:
        """Until `seconds` of work are done at a speed that may change whenever a copy or exchange begins or ends."""
        left = seconds
        while True:
            begin, now_speed, changed = float(self._env.now), speed(), self._changed
            if now_speed == 0:
                yield changed
                continue
            done = self._env.timeout(left / now_speed)
            yield self._env.any_of([done, changed])
            if done.processed:
                return
            left -= (float(self._env.now) - begin) * now_speed

    def _change(self, copies: int = 0, exchanges: int = 0) -> None:
        self._copies += copies
        self._exchanges += exchanges
        before, self._changed = self._changed, self._env.event()
        before.succeed()
