"""The ways to a GPU: which queues a copy goes through, and how fast the way is.

- inside a node with peer links (NVLink): out of the source, into the target;
- inside a node without: out of the source, through the host over the roots of both GPUs, which may be the same one,
  into the target;
- from the host's memory: over the root of the target, into it; what lies on SSD comes to the host first;
- between nodes: out of the source's network adapter, into the target's.

`out of GPU` and `into GPU` are its two copy engines. Routes name their queues in one fixed order (out, roots by number,
in), so that copies that hold several cannot wait for each other in a circle. Knows nothing about experts or time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moesim.sim.profile import HardwareProfile, Link, Links
from moesim.sim.residency import HOST
from moesim.sim.station import Station


class Fabric:
    """The queues between the GPUs of a profile; `links` may be replaced when they degrade."""

    def __init__(self, env: Any, profile: HardwareProfile) -> None:
        self.links: Links = profile.links
        self._node_size, self._shared_by = profile.node_size, profile.links.host.shared_by
        self._env = env
        self._stations: dict[str, Station] = {}

    def __iter__(self) -> Iterator[Station]:
        """All queues that a copy has been in."""
        return iter(self._stations.values())

    def _at(self, name: str, number: int) -> Station:
        """The queue, made when it is first asked for: a large cluster has thousands."""
        name = f"{name} {number}"
        if name not in self._stations:
            self._stations[name] = Station(self._env, name)
        return self._stations[name]

    def route(self, source: int, target: int) -> tuple[list[Station], Link]:
        """(queues to hold together, in this order; the link that the bytes cross) from a GPU, or HOST, to a GPU."""
        links, at = self.links, self._at
        if source == HOST:
            return [at("host root", target // self._shared_by), at("into GPU", target)], links.host.link
        if source // self._node_size != target // self._node_size:
            assert links.network is not None, "profiles of several nodes have one"
            return [at("network out of", source), at("network into", target)], links.network
        if links.p2p is not None:
            return [at("out of GPU", source), at("into GPU", target)], links.p2p
        roots = sorted({source // self._shared_by, target // self._shared_by})
        way = [at("out of GPU", source), *(at("host root", root) for root in roots), at("into GPU", target)]
        return way, links.host.link

    def storage(self, target: int) -> tuple[list[Station], Link]:
        """The queue of the SSDs of the target's node, and how fast they are."""
        assert self.links.storage is not None, "only asked where experts lie on SSD"
        return [self._at("storage of node", target // self._node_size)], self.links.storage
