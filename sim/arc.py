"""Adaptive replacement, and what builds on it. Shape letters: L layers, E experts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.sim.eviction_rule import Key, Lru, Pool, Setting
from moesim.sim.residency import Cluster


class _Lists:
    """ARC's four lists of one pool, the least recently used first, and its target for the first of them."""

    def __init__(self) -> None:
        self.once: OrderedDict[Key, None] = OrderedDict()
        self.often: OrderedDict[Key, None] = OrderedDict()
        self.once_gone: OrderedDict[Key, None] = OrderedDict()
        self.often_gone: OrderedDict[Key, None] = OrderedDict()
        self.target = 0.0


class Arc(Lru):
    """Adaptive replacement: a list of what was used once and one of what was used again, with ghosts of both that say
    which should be longer. Source: Megiddo and Modha, FAST 2003, figure 4, whose T1, T2, B1, B2 and p are the lists and
    the target here. What comes ahead of its use joins T1 and stays there at its first use. Where the expert that the
    lists choose may not go, the next of the same list does, else one of the other.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.lists: dict[Pool, _Lists] = {}
        self.unused: set[Key] = set()

    def used(self, key: Key, pool: Pool, *, hit: bool, full: bool) -> None:
        """A hit moves to the end of T2 (case I)."""
        lists = self._of(pool)
        if key in self.unused:
            self.unused.discard(key)
            for held in (lists.once, lists.often):
                if key in held:
                    held.move_to_end(key)
        elif hit:
            lists.once.pop(key, None)
            lists.often[key] = None
            lists.often.move_to_end(key)

    def loaded(self, key: Key, pool: Pool, *, ahead: bool) -> None:
        """To the end of T2 where a ghost remembers it, else of T1."""
        lists = self._of(pool)
        known = key in lists.once_gone or key in lists.often_gone
        for ghosts in (lists.once_gone, lists.often_gone):
            ghosts.pop(key, None)
        (lists.often if known else lists.once)[key] = None
        if ahead:
            self.unused.add(key)

    def gone(self, key: Key) -> None:
        """Left without a ghost."""
        for lists in self.lists.values():
            for held in (lists.once, lists.often):
                held.pop(key, None)
        self.unused.discard(key)

    def victim(self, pool: Pool, keys: Sequence[Key], wanted: Key) -> Key:
        """Adapts the target (cases II and III), makes room among the ghosts (case IV) and replaces."""
        lists = self._of(pool)
        held = len(lists.once) + len(lists.often)
        allowed = set(keys)
        if wanted in lists.once_gone:
            lists.target = min(held, lists.target + max(len(lists.often_gone) / len(lists.once_gone), 1))
        elif wanted in lists.often_gone:
            lists.target = max(0, lists.target - max(len(lists.once_gone) / len(lists.often_gone), 1))
        elif len(lists.once) + len(lists.once_gone) >= held:
            if len(lists.once) >= held:  # T1 is all there is: its oldest goes and leaves no ghost
                goes = next((key for key in lists.once if key in allowed), None)
                if goes is not None:
                    self.gone(goes)
                    return goes
            elif lists.once_gone:
                lists.once_gone.popitem(last=False)
        elif held + len(lists.once_gone) + len(lists.often_gone) >= 2 * held and lists.often_gone:
            lists.often_gone.popitem(last=False)
        return self._replace(lists, allowed, wanted)

    def _replace(self, lists: _Lists, allowed: set[Key], wanted: Key) -> Key:
        full = len(lists.once) > lists.target or (wanted in lists.often_gone and len(lists.once) == lists.target)
        first = [(lists.once, lists.once_gone), (lists.often, lists.often_gone)]
        for held, ghosts in first if lists.once and full else first[::-1]:
            goes = next((key for key in held if key in allowed), None)
            if goes is not None:
                del held[goes]
                ghosts[goes] = None
                self.unused.discard(goes)
                return goes
        raise AssertionError("what lies in a pool is in one of its lists")

    def _of(self, pool: Pool) -> _Lists:
        return self.lists.setdefault(pool, _Lists())


SHALLOW_SHARE = 0.5
"""Of a GPU's slots, the most that whole first layers may take under `ShallowArc`."""


class ShallowArc(Arc):
    """All experts of the first layers stay, as many layers as fit into half of the slots; ARC over the other layers in
    what is left, which they share. Source: Fate (arXiv 2502.12224), shallow-favouring cache. Deviation: how many layers
    stay follows from the half, not from a search."""

    def pinned_LE(self) -> NDArray[np.bool_]:
        """The first layers."""
        c = self.cluster
        pinned_LE = super().pinned_LE()
        pinned_LE[: shallow_layers(c)] = True
        return pinned_LE


def shallow_layers(cluster: Cluster) -> int:
    """How many first layers lie on the GPUs entirely."""
    most = -(-cluster.experts // cluster.gpus)
    return min(int(SHALLOW_SHARE * cluster.gpu_slots) // most, cluster.layers)
