"""Copies of experts under way: the links that they queue for, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from moesim.sim.contention import Wires
from moesim.sim.dispatch import Ints
from moesim.sim.driver import Driver
from moesim.sim.fabric import Fabric
from moesim.sim.profile import Link
from moesim.sim.residency import EMPTY, HOST, Transfer
from moesim.sim.station import Station

DEMAND, PREFETCH = 0, 1
"""Priorities on a link; equal ones in order of arrival. What a link has begun to carry is not interrupted."""

Log = Callable[..., None]


class Copies:
    """A copy holds all the queues of its route at once and takes them in the route's order, so copies cannot wait for
    each other in a circle; one that has its first keeps it idle while it queues for the second. A copy from SSD passes
    through the host's memory: one link after the other.

    A copy is *hidden* when nobody waited for it and it was of use: not blocking, in its slot before its layer next
    dispatched, and the slot still its own. One that is late, or whose slot was given away meanwhile, counts as moved
    only. Free transfers move no bytes; copies still under way when the run ends are not counted.
    """

    def __init__(
        self, env: Any, driver: Driver, fabric: Fabric, wires: Wires, nbytes: int, rounded: bool, log: Log
    ) -> None:
        self.hbm_G = np.zeros(driver.cluster.gpus)
        """[G] bytes/s that copies read and write in each GPU's memory now."""
        self.on_disk_LE: Ints | None = None
        """[L, E] nonzero where an expert lies on SSD only; None: the host's memory holds all."""
        self._env, self._driver, self._fabric, self._wires = env, driver, fabric, wires
        self._nbytes, self._rounded, self._log = nbytes, rounded, log
        self._started = 0
        self._pending: dict[int, tuple[Transfer, Any]] = {}
        """Number of a copy, in order of issue, to its transfer and process."""
        self._late: set[int] = set()
        self._computing: dict[int, list[Any]] = {}
        """Layer to the ends of its expert phases that run now."""

    def start(self, moves: Iterable[Transfer]) -> list[Any]:
        """Issue the transfers that the driver has begun; returns the processes of the blocking ones."""
        blocking = []
        for t in moves:
            where = {"layer": t.layer, "expert": t.expert, "source": t.source, "target": t.target, "slot": t.slot}
            if t.free:
                self._driver.arrived(t)
                self._log("transfer free", copied=where)
                continue
            number, self._started = self._started, self._started + 1
            self._log("transfer issued", number=number, blocking=t.blocking, copied=where)
            process = self._env.process(self._copy(number, t))
            self._pending[number] = (t, process)
            if t.blocking:
                blocking.append(process)
        return blocking

    def needed(self, layer: int) -> None:
        """`layer` dispatches now: its copies that are still under way are late."""
        self._late.update(number for number, (t, _) in self._pending.items() if t.layer == layer)

    def awaited(self, layer: int, pairs: Iterable[tuple[int, int]]) -> list[Any]:
        """Processes of the copies that bring (expert, GPU) of `layer`."""
        wanted = set(pairs)
        return [p for t, p in self._pending.values() if t.layer == layer and (t.expert, t.target) in wanted]

    def computes(self, layer: int, end: Any) -> None:
        """The experts of `layer` run until the event `end`; what they use is not overwritten before."""
        self._computing.setdefault(layer, []).append(end)
        end.callbacks.append(lambda _: self._computing[layer].remove(end))

    def _copy(self, number: int, t: Transfer) -> Generator[Any, Any, None]:
        while t.displaces != EMPTY and self._computing.get(t.displaces):
            yield self._computing[t.displaces][-1]
        if t.source == HOST and self.on_disk_LE is not None and self.on_disk_LE[t.layer, t.expert]:
            yield from self._over(number, t, *self._fabric.storage(t.target))
        way, link = self._fabric.route(t.source, t.target)
        outside = bool(link.outside(self._nbytes))
        yield from self._over(number, t, way, link)
        del self._pending[number]
        useful = number not in self._late and self._driver.residency.holds(t)
        self._late.discard(number)
        self._driver.arrived(t, self._rounded)
        more = {"outside": True} if outside else {}
        self._log("transfer ends", number=number, bytes=self._nbytes, hidden=useful and not t.blocking, **more)

    def _over(self, number: int, t: Transfer, stations: list[Station], link: Link) -> Generator[Any, Any, None]:
        held = []
        for station in stations:
            held.append((yield from station.enter(DEMAND if t.blocking else PREFETCH)))
        self._log("transfer begins", number=number, queues=[station.name for station in stations])
        seconds = link.seconds(self._nbytes)
        ends = [g for g in (t.source, t.target) if g != HOST]
        rate = self._nbytes / seconds if seconds else 0.0
        self.hbm_G[ends] += rate
        yield from self._wires.copy(seconds)
        self.hbm_G[ends] -= rate
        for visit in held:
            visit.leave()
