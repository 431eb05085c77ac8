"""What an eviction rule is asked and told, and the simplest of them.

A rule is told what happens in a pool (the slots of a GPU that a layer may use: its own, or all of them where layers
share), and names the one of some experts that goes. The cache (offload.py) offers only experts that may go: never one
that is being computed, nor one that the rule pins. Knows nothing about slots, links or time. Shape letters: L layers, E
experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.sim.dispatch import Ints
from moesim.sim.residency import Cluster

Key = tuple[int, int]
"""(layer, expert)."""
Pool = tuple[int, int]
"""(GPU, layer), layer 0 where all layers share the slots."""
Future = Sequence[Sequence[NDArray[np.integer]]]
"""Of each layer, the experts that have tokens, visit after visit of the whole run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an eviction rule is made for."""

    cluster: Cluster
    popularity_LE: Ints
    """Tokens of each expert in the fitted requests."""
    future: Future | None = None
    """What will be needed; shown to rules that say so, and to no other."""


class Eviction(Protocol):
    """A rule; most need only some of this."""

    def pinned_LE(self) -> NDArray[np.bool_]:
        """[L, E] experts that never go, as long as they are where the placement put them."""

    def begin_step(self, requests: Iterable[int]) -> None:
        """A step with tokens of these requests begins."""

    def visited(self, layer: int) -> None:
        """`layer` has routed; `used` tells of its experts next."""

    def forecast(self, layer: int, load_E: NDArray[np.floating]) -> None:
        """So many tokens are expected of each expert of `layer` when it comes next."""

    def used(self, key: Key, pool: Pool, *, hit: bool, full: bool) -> None:
        """The expert is computed now; it was there (`hit`) or is to come; `full`: it was wanted in full precision."""

    def loaded(self, key: Key, pool: Pool, *, ahead: bool) -> None:
        """A copy into the pool begins (or lies there from the start); `ahead`: before anybody used it."""

    def gone(self, key: Key) -> None:
        """The expert is on no GPU: the one that held it has failed."""

    def victim(self, pool: Pool, keys: Sequence[Key], wanted: Key) -> Key:
        """The one of `keys`, at least one and in order of their slots, that goes so that `wanted` can come."""


class Lru:
    """Least recently used goes; of those never used, the one in the first slot."""

    def __init__(self, setting: Setting) -> None:
        self.cluster = setting.cluster
        self.last: dict[Key, int] = {}
        self.now = 0

    def pinned_LE(self) -> NDArray[np.bool_]:
        """None."""
        return np.zeros((self.cluster.layers, self.cluster.experts), np.bool_)

    def begin_step(self, requests: Iterable[int]) -> None:
        """Does not matter here."""

    def visited(self, layer: int) -> None:
        """What is used together is equally recent."""
        self.now += 1

    def forecast(self, layer: int, load_E: NDArray[np.floating]) -> None:
        """Does not matter here."""

    def used(self, key: Key, pool: Pool, *, hit: bool, full: bool) -> None:
        """Most recent of all."""
        self.last[key] = self.now

    def loaded(self, key: Key, pool: Pool, *, ahead: bool) -> None:
        """What comes ahead of its use is as recent as what is used now."""
        if ahead:
            self.last[key] = self.now

    def gone(self, key: Key) -> None:
        """Its last use is remembered."""

    def victim(self, pool: Pool, keys: Sequence[Key], wanted: Key) -> Key:
        """The one whose last use lies back farthest."""
        return min(keys, key=self.age)

    def age(self, key: Key) -> int:
        """When it was used last, -1 for never."""
        return self.last.get(key, -1)
