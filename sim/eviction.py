"""What goes when a slot is needed: eviction as a part of a policy, and the one place where a rule is registered.

eviction_rule.py says what a rule is asked; adaptive replacement is in arc.py. Shape letters: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.sim.arc import Arc, ShallowArc, shallow_layers
from moesim.sim.dispatch import Ints
from moesim.sim.eviction_rule import Eviction, Future, Key, Lru, Pool, Setting
from moesim.traces import InputError


class Lfu(Lru):
    """Least often used since the run began goes, of equals the least recently used. What has left is still counted
    ("perfect" LFU)."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.count: dict[Key, int] = {}

    def used(self, key: Key, pool: Pool, *, hit: bool, full: bool) -> None:
        """Counted once a visit, however many tokens."""
        super().used(key, pool, hit=hit, full=full)
        self.count[key] = self.count.get(key, 0) + 1

    def victim(self, pool: Pool, keys: Sequence[Key], wanted: Key) -> Key:
        """The rarest."""
        return min(keys, key=lambda key: (self.count.get(key, 0), self.age(key)))


class PinnedLru(Lru):
    """The experts with the largest load in the fitted requests stay, half of each layer's slots; LRU in the others.
    Source: Diff-MoE (SC'25), pinned hot set and local cache. Deviation: its share is not known here; it is a half."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.popularity_LE = setting.popularity_LE

    def pinned_LE(self) -> NDArray[np.bool_]:
        """Of every GPU and layer the hottest."""
        c = self.cluster
        pinned_LE = super().pinned_LE()
        for gpu in range(c.gpus):
            mine = np.flatnonzero(c.home_E == gpu)
            order_LX = mine[np.argsort(-self.popularity_LE[:, mine], axis=1, kind="stable")]
            np.put_along_axis(pinned_LE, order_LX[:, : c.layer_slots // 2], True, axis=1)
        return pinned_LE


class Weighted(Lru):
    """The lowest weighted sum goes: of how recently an expert was used, how often, how often in full precision, and how
    soon its layer comes. Records begin anew with a sequence: when a step has none of the requests of the step before.

    Source: HOBBIT (arXiv 2411.01433), multidimensional cache. Uses are counted a visit and divided by the visits of the
    layer. Deviation: there the weights are tuned for a model; here they are equal.
    """

    weights = (0.25, 0.25, 0.25, 0.25)
    """Of recency, frequency, frequency in full precision, nearness of the layer."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.requests: frozenset[int] = frozenset()
        self.layer = 0
        self._clear()

    def _clear(self) -> None:
        self.visits = np.zeros(self.cluster.layers, np.int64)
        self.last_visit: dict[Key, int] = {}
        self.count: dict[Key, int] = {}
        self.full: dict[Key, int] = {}

    def begin_step(self, requests: Iterable[int]) -> None:
        """New requests only: nothing is known of them."""
        now = frozenset(requests)
        if not now & self.requests:
            self._clear()
        self.requests = now

    def visited(self, layer: int) -> None:
        """A visit more."""
        super().visited(layer)
        self.layer = layer
        self.visits[layer] += 1

    def used(self, key: Key, pool: Pool, *, hit: bool, full: bool) -> None:
        """A use more."""
        super().used(key, pool, hit=hit, full=full)
        self.last_visit[key] = int(self.visits[key[0]])
        self.count[key] = self.count.get(key, 0) + 1
        self.full[key] = self.full.get(key, 0) + full

    def victim(self, pool: Pool, keys: Sequence[Key], wanted: Key) -> Key:
        """The lowest sum, of equals the least recently used."""
        return min(keys, key=lambda key: (self.worth(key), self.age(key)))

    def worth(self, key: Key) -> float:
        """Between 0 and 1."""
        layers, visits = self.cluster.layers, max(int(self.visits[key[0]]), 1)
        near = 1 - (key[0] - self.layer) % layers / layers
        terms = (self.last_visit.get(key, 0) / visits, self.count.get(key, 0) / visits)
        parts = (*terms, self.full.get(key, 0) / visits, near)
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))


class NextUse(Lru):
    """The expert whose next use is expected to be farthest goes: the layers until its own comes, and as many rounds of
    all layers as pass, by its last forecast, before it is used (the chance of a use is its forecast load, at most
    1). Where nothing was forecast the fitted frequency counts. Of equals the least recently used."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        total_L1 = np.maximum(setting.popularity_LE.sum(axis=1, keepdims=True), 1)
        self.load_LE = setting.popularity_LE / total_L1 * setting.cluster.top_k
        self.layer = 0

    def visited(self, layer: int) -> None:
        """Distances are counted from here."""
        super().visited(layer)
        self.layer = layer

    def forecast(self, layer: int, load_E: NDArray[np.floating]) -> None:
        """Kept until the next of the same layer."""
        self.load_LE[layer] = load_E

    def victim(self, pool: Pool, keys: Sequence[Key], wanted: Key) -> Key:
        """The farthest."""
        return max(keys, key=lambda key: (self.distance(key), -self.age(key)))

    def distance(self, key: Key) -> float:
        """Expected layers until the next use."""
        layers = self.cluster.layers
        chance = min(max(float(self.load_LE[key]), 1e-9), 1.0)
        return (key[0] - self.layer - 1) % layers + layers * (1 - chance) / chance


class Belady(Lru):
    """The expert that is needed again last, or never, goes: an oracle, the bound of every cache whose copies cost the
    same. Source: Belady 1966. Raises InputError where nobody knows the future: on real devices and in open loops."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.visit = np.full(setting.cluster.layers, -1)
        self.round: dict[Key, Ints] | None = None
        if setting.future is not None:
            self.round = _rounds(setting.future)

    def visited(self, layer: int) -> None:
        """One more of the visits that the future lists."""
        super().visited(layer)
        self.visit[layer] += 1

    def victim(self, pool: Pool, keys: Sequence[Key], wanted: Key) -> Key:
        """The farthest in the future."""
        return max(keys, key=self.next_use)

    def next_use(self, key: Key) -> tuple[float, int]:
        """(the visit that needs it next, infinite for never; its layer): layers are visited in turn, so this orders
        the uses of all of them."""
        if self.round is None:
            raise InputError("eviction belady is shown the future: it needs a recording to replay in a closed loop")
        rounds = self.round.get(key)
        first = 0 if rounds is None else int(np.searchsorted(rounds, self.visit[key[0]], side="right"))
        if rounds is None or first == len(rounds):
            return (math.inf, key[0])
        return (float(rounds[first]), key[0])


def _rounds(future: Future) -> dict[Key, Ints]:
    """Of each (layer, expert), the visits of its layer that need it, ascending."""
    found: dict[Key, list[int]] = {}
    for layer, visits in enumerate(future):
        for visit, experts in enumerate(visits):
            for expert in experts.tolist():
                found.setdefault((layer, expert), []).append(visit)
    return {key: np.array(visits) for key, visits in found.items()}


EVICTIONS: dict[str, Callable[[Setting], Eviction]] = {
    "lru": Lru,
    "lfu": Lfu,
    "arc": Arc,
    "weighted": Weighted,
    "shallow-arc": ShallowArc,
    "pinned-lru": PinnedLru,
    "next-use": NextUse,
    "belady": Belady,
}
"""By the name that a policy file gives them."""
ORACLES = frozenset({"belady"})
"""Those that are shown the future."""
POOLED = frozenset({"shallow-arc"})
"""Those that make no sense where every layer has slots of its own."""

__all__ = [
    "EVICTIONS",
    "ORACLES",
    "POOLED",
    "Eviction",
    "Future",
    "Key",
    "Pool",
    "Setting",
    "shallow_layers",
]
