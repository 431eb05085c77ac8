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
"""Priorities on a link, of prefetches the highest and then by when they are due; equal ones in order of arrival. What
a link has begun to carry is not interrupted; a prefetch that waits for a link is demand once somebody waits for it."""

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
        self,
        env: Any,
        driver: Driver,
        fabric: Fabric,
        wires: Wires,
        nbytes_of: Callable[[str], int],
        least: str | None,
        log: Log,
    ) -> None:
        self.hbm_G = np.zeros(driver.cluster.gpus)
        """[G] bytes/s that copies read and write in each GPU's memory now."""
        self.on_disk_LE: Ints | None = None
        """[L, E] nonzero where an expert lies on SSD only; None: the host's memory holds all."""
        self._env, self._driver, self._fabric, self._wires = env, driver, fabric, wires
        self._nbytes_of, self._least, self._log = nbytes_of, least, log
        """Bytes by precision; what all copies come in at most, None: as the policy wants."""
        self._started = 0
        self._pending: dict[int, tuple[Transfer, Any]] = {}
        """Number of a copy, in order of issue, to its transfer and process."""
        self._queueing: dict[int, Station] = {}
        """Number of a copy that nobody waits for to the queue that it waits in."""
        self._urgent: set[int] = set()
        """Copies that were begun ahead and are waited for now."""
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
        """Processes of the copies that bring (expert, GPU) of `layer`; from now on they go before prefetches."""
        wanted = set(pairs)
        found = []
        for number, (t, process) in self._pending.items():
            if t.layer == layer and (t.expert, t.target) in wanted:
                found.append(process)
                self._urgent.add(number)
                if number in self._queueing:
                    self._queueing[number].hurry(number, DEMAND)
        return found

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
        outside = bool(link.outside(self._nbytes_of(t.precision)))
        yield from self._over(number, t, way, link)
        del self._pending[number]
        useful = number not in self._late and self._driver.residency.holds(t)
        self._late.discard(number)
        self._urgent.discard(number)
        self._driver.arrived(t, self._least)
        more: dict[str, Any] = {"outside": True} if outside else {}
        if t.precision != "full":
            more["precision"] = t.precision
        nbytes = self._nbytes_of(t.precision)
        self._log("transfer ends", number=number, bytes=nbytes, hidden=useful and not t.blocking, **more)

    def _over(self, number: int, t: Transfer, stations: list[Station], link: Link) -> Generator[Any, Any, None]:
        held = []
        for station in stations:
            wanted_now = t.blocking or number in self._urgent
            self._queueing[number] = station
            held.append((yield from station.enter(DEMAND if wanted_now else PREFETCH + t.due, number)))
            del self._queueing[number]
        self._log("transfer begins", number=number, queues=[station.name for station in stations])
        nbytes = self._nbytes_of(t.precision)
        seconds = link.seconds(nbytes)
        ends = [g for g in (t.source, t.target) if g != HOST]
        rate = nbytes / seconds if seconds else 0.0
        self.hbm_G[ends] += rate
        yield from self._wires.copy(seconds)
        self.hbm_G[ends] -= rate
        for visit in held:
            visit.leave()
