"""The ways between GPUs: which queues a copy goes through, and how fast the way is.

- inside a node with peer links (NVLink): out of the source, into the target;
- inside a node without: through the host, over the roots of both GPUs, which may be the same one;
- between nodes: out of the source's network adapter, into the target's.

Routes name their queues in one fixed order (out before in, roots by number), so that copies that hold several cannot
wait for each other in a circle. Knows nothing about experts or time.
"""

from __future__ import annotations

from typing import Any

from moesim.sim.profile import HardwareProfile, Link
from moesim.sim.station import Station


class Fabric:
    """The queues of the first `gpus` GPUs of a profile."""

    def __init__(self, env: Any, profile: HardwareProfile, gpus: int) -> None:
        self._links, self._node_size = profile.links, profile.node_size
        roots = -(-gpus // profile.links.host.shared_by)
        counts = {
            "out of GPU": gpus,
            "into GPU": gpus,
            "host root": roots,
            "network out of": gpus,
            "network into": gpus,
        }
        self._stations = {kind: [Station(env, f"{kind} {i}") for i in range(n)] for kind, n in counts.items()}

    def route(self, source: int, target: int) -> tuple[list[Station], Link]:
        """(queues to hold together, in this order; the link that the bytes cross) from one GPU to another."""
        links, at = self._links, self._stations
        if source // self._node_size != target // self._node_size:
            assert links.network is not None, "profiles of several nodes have one"
            return [at["network out of"][source], at["network into"][target]], links.network
        if links.p2p is not None:
            return [at["out of GPU"][source], at["into GPU"][target]], links.p2p
        roots = sorted({source // links.host.shared_by, target // links.host.shared_by})
        return [at["host root"][root] for root in roots], links.host.link
