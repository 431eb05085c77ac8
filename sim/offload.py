"""Experts that are on no GPU when their tokens come: fetched from the host over what was used least recently, or run on
the host's CPU. Knows nothing about time. Shape letters: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.sim.dispatch import Ints
from moesim.sim.residency import EMPTY, HOST, Residency, Transfer

Cheaper = Callable[[int], bool]
"""Whether the host computes so many tokens of one expert sooner than its copy arrives; the executor knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """What has to happen before a layer's next wave of experts runs."""

    moves: list[Transfer]
    """Copies to begin, blocking."""
    awaited: list[tuple[int, int]]
    """(expert, GPU) whose copies are under way already."""
    host_E: NDArray[np.bool_]
    """[E] experts that the host's CPU computes."""


@dataclass(slots=True)
class Cache:
    """Which expert was used when, for the choice of what goes."""

    residency: Residency
    cheaper: Cheaper | None = None
    used_LE: Ints = field(init=False)
    _now: int = 0

    def __post_init__(self) -> None:
        c = self.residency.cluster
        self.used_LE = np.full((c.layers, c.experts), -1, np.int64)

    def fetch(self, layer: int, load_E: Ints) -> Fetch:
        """For the experts with tokens left in `load_E`: every GPU fetches its missing ones, as many as find a slot that
        none of them needs. Experts that are there and needed stay; they are computed in the same wave."""
        r, c = self.residency, self.residency.cluster
        self._now += 1
        needed_E = load_E > 0
        self.used_LE[layer, needed_E] = self._now
        here_E = r.usable_LEG[layer].any(axis=1)
        coming_EG = r.coming_LEG[layer] & needed_E[:, None] & ~here_E[:, None]
        awaited = [(int(e), int(g)) for e, g in np.argwhere(coming_EG)]
        missing_E = needed_E & ~here_E & ~coming_EG.any(axis=1)
        host_E = np.zeros(c.experts, np.bool_)
        if self.cheaper is not None:
            host_E[[e for e in np.flatnonzero(missing_E) if self.cheaper(int(load_E[e]))]] = True
        moves: list[Transfer] = []
        for expert in np.flatnonzero(missing_E & ~host_E).tolist():
            gpu = self._home(expert)
            taken = {move.slot for move in moves if move.target == gpu}
            slot = self._victim(layer, gpu, needed_E, taken)
            if slot is not None:
                moves.append(Transfer(layer=layer, expert=expert, source=HOST, target=gpu, slot=slot, blocking=True))
        return Fetch(moves=moves, awaited=awaited, host_E=host_E)

    def _home(self, expert: int) -> int:
        """The expert's GPU, or the next that lives."""
        alive = np.flatnonzero(self.residency.alive_G)
        gpu = self.residency.cluster.home_gpu(expert)
        return int(alive[np.searchsorted(alive, gpu) % len(alive)])

    def _victim(self, layer: int, gpu: int, needed_E: NDArray[np.bool_], taken: set[int]) -> int | None:
        """The slot of `gpu` that is empty, or whose expert is not needed now and was used least recently."""
        window = self.residency.cluster.slots_of(layer)
        best: tuple[int, int] | None = None
        for slot in window:
            expert = int(self.residency.expert_GS[gpu, slot])
            if slot in taken or (expert != EMPTY and needed_E[expert]):
                continue
            used = -2 if expert == EMPTY else int(self.used_LE[layer, expert])
            best = min(best or (used, slot), (used, slot))
        return None if best is None else best[1]
