"""Transfer rules: what to copy where, when. A rule sees a forecast and the residency, never the truth.

Decision point p of a step lies after p layers have routed: 0 is the start, L comes after the last router. Between
point p and the routing of layer p lie the expert phase of layer p-1 and the attention of layer p: the window in which a
transfer for layer p hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import Forecast
from moesim.sim.planner import Ids, eplb, held, plan
from moesim.sim.replication import PLANS, UNSURE, Need, grouped_eplb, planned
from moesim.sim.residency import EMPTY, HOST, Residency, Transfer
from moesim.traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A forecast that a rule asks for: `layer` of this step or, `queued`, of the next one."""

    layer: int
    queued: bool = False


class Rule(Protocol):
    """When to ask for forecasts, and what to copy because of one."""

    def targets(self, step: int, point: int, layers: int) -> Sequence[Target]:
        """The forecasts wanted at decision point `point` (0..layers) of step `step`."""

    def transfers(self, target: Target, forecast: Forecast, residency: Residency) -> list[Transfer]:
        """Copies to start now; they begin together."""


@dataclass(frozen=True, slots=True)
class Never:
    """Nothing ever moves."""

    def targets(self, step: int, point: int, layers: int) -> Sequence[Target]:
        """None."""
        return ()

    def transfers(self, target: Target, forecast: Forecast, residency: Residency) -> list[Transfer]:
        """None."""
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Periodic:
    """Every `interval` steps, before the step begins, lay out every layer anew; the step waits for the copies.

    Source: EPLB as SGLang and vLLM run it.
    """

    interval: int = 8
    hierarchical: bool = False
    """EPLB's hierarchical variant: groups of experts to nodes, then replicas and GPUs within each."""
    moves: int | None = None
    """Copies of a layer at most, each of which must pay (planner.plan); None: EPLB's layout, whatever it costs."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise InputError(f"interval must be at least 1 step, got {self.interval}")
        if self.moves is not None and self.moves < 1:
            raise InputError(f"moves must be at least 1, got {self.moves}")
        if self.moves is not None and self.hierarchical:
            raise InputError("moves and hierarchical exclude each other")

    def targets(self, step: int, point: int, layers: int) -> Sequence[Target]:
        """All layers at the start of every `interval`-th step, once there is history."""
        due = point == 0 and step > 0 and step % self.interval == 0
        return [Target(layer=layer) for layer in range(layers)] if due else ()

    def transfers(self, target: Target, forecast: Forecast, residency: Residency) -> list[Transfer]:
        """Blocking copies into the slots whose expert changes; an expert that stays on its GPU is not copied."""
        c = residency.cluster
        now_GS = residency.experts_GS(target.layer)
        wanted_GS = self._wanted(forecast.load, now_GS, residency)
        moves = []
        for gpu in np.flatnonzero(residency.alive_G).tolist():
            free = [i for i in range(c.layer_slots) if now_GS[gpu, i] not in wanted_GS[gpu] or now_GS[gpu, i] == EMPTY]
            new = [e for e in wanted_GS[gpu] if e != EMPTY and e not in now_GS[gpu]]
            for i, expert in zip(free, new, strict=False):
                slot = target.layer * c.layer_slots + i
                moves.append(_copy(residency, target.layer, int(expert), gpu, slot, blocking=True))
        return moves

    def _wanted(self, load_E: NDArray[np.float64], now_GS: NDArray[np.int32], residency: Residency) -> Ids:
        """[G, S] the layout of one layer."""
        c, alive = residency.cluster, np.flatnonzero(residency.alive_G)
        whole = len(alive) == c.gpus
        if self.moves is not None and whole and held(now_GS[None], c.experts).any(axis=2).all():
            changed_LGS = plan(load_E[None], c.gpus, c.layer_slots, now_GS[None], moves=self.moves).placed_LGS
            return np.asarray(changed_LGS[0])
        if self.hierarchical and whole:
            return grouped_eplb(load_E, c.gpus, c.layer_slots, c.nodes, c.groups)
        wanted_GS = np.full((c.gpus, c.layer_slots), EMPTY, np.int32)
        wanted_GS[alive] = eplb(load_E, len(alive), c.layer_slots)
        return wanted_GS


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """Keep the home placement, fill the replica slots with what is forecast to be overloaded; computation goes on.

    `next_batch=False`: after layer l has routed, for layer l+1 (PROBE, Libra, Lina plan at this distance).
    `next_batch=True`: once a layer's experts have run, for the same layer of the queued step, so that a copy has almost
    a whole step to arrive (predictive replication, arXiv 2605.11537, section on replication ahead of the batch).
    Raises InputError for an unknown plan.
    """

    next_batch: bool
    free: bool = False
    plan: str = "greedy"
    """Which experts to copy where, a name of replication.PLANS."""
    cap: int | None = None
    """Copies of an expert at most, its home included; None: one on every GPU."""
    most_moves: int | None = None
    """Copies of a layer that begin at one decision; None: as many as there are slots."""
    most_per_gpu: int | None = None
    """Replicas of a layer that a GPU has, where it has more slots; None: all slots."""
    hide: bool = False
    """True: into a GPU begin only as many copies as can arrive before the layer that they are for, where the executor
    says how fast it is."""

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise InputError(f"plan = {self.plan!r} is not known; known: {', '.join(PLANS)}")
        for name, least in (("cap", 1), ("most_moves", 0), ("most_per_gpu", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")

    def targets(self, step: int, point: int, layers: int) -> Sequence[Target]:
        """One layer a point; before anything was planned (the first step), all layers at point 0."""
        if not self.next_batch:
            return [Target(layer=point)] if point < layers else ()
        if point == 0:
            return [Target(layer=layer) for layer in (range(layers) if step == 0 else [layers - 1])]
        return [Target(layer=point - 2, queued=True)] if point >= 2 else ()

    def transfers(self, target: Target, forecast: Forecast, residency: Residency) -> list[Transfer]:
        """Copies into replica slots; a replica that is still wanted stays where it is. What has no copy left (its GPU
        failed) comes from the host first, and stays."""
        c, layer = residency.cluster, target.layer
        slots_GS, first = residency.replicas_GS(layer), c.replica_slots(layer).start
        home_EG = held(residency.experts_GS(layer)[None, :, : c.home_slots], c.experts)[0]
        have_EG = held(slots_GS[None], c.experts)[0]
        slots = slots_GS.shape[1]
        most = slots if self.most_per_gpu is None else min(self.most_per_gpu, slots)
        room_G = np.where(residency.alive_G, most, 0)
        kept = _adopt(forecast.load, home_EG, have_EG, room_G)
        hidden = c.rates.hidden_copies(max(c.layers - 1, 1) if target.queued else 1) if self.hide and c.rates else None
        need = Need(
            load_E=forecast.load,
            sd_E=forecast.load_sd if self.plan in UNSURE else None,
            home_EG=home_EG,
            have_EG=have_EG,
            room_G=room_G,
            new_G=room_G if hidden is None else np.minimum(room_G, hidden),
            moves=c.gpus * slots if self.most_moves is None else self.most_moves,
            cap=c.gpus if self.cap is None else self.cap,
            slowdown_G=residency.slowdown_G,
            rates=c.rates,
        )
        wanted = kept + planned(self.plan, need)
        moves = []
        for gpu in range(c.gpus):
            keep = {e for e, g in wanted if g == gpu}
            new = [e for e, g in wanted if g == gpu and not have_EG[e, g]]
            free = [i for i, expert in enumerate(slots_GS[gpu]) if expert not in keep]
            for i, expert in zip(free, new, strict=False):
                moves.append(_copy(residency, layer, expert, gpu, first + i, free=self.free))
        return moves


def _adopt(
    load_E: NDArray[np.floating], home_EG: NDArray[np.bool_], have_EG: NDArray[np.bool_], room_G: NDArray[np.integer]
) -> list[tuple[int, int]]:
    """(expert, GPU) where experts without a home get one in a replica slot: where a replica of theirs is, else where
    there is most room. Writes them into `home_EG` and takes their room."""
    adopted = []
    orphans = np.flatnonzero(~home_EG.any(axis=1))
    for expert in sorted(orphans.tolist(), key=lambda e: (not have_EG[e].any(), -load_E[e], e)):
        gpu = int(np.argmax(have_EG[expert]) if have_EG[expert].any() else np.argmax(room_G))
        if room_G[gpu] > 0:
            home_EG[expert, gpu] = True
            room_G[gpu] -= 1
            adopted.append((expert, gpu))
    return adopted


def _copy(
    residency: Residency,
    layer: int,
    expert: int,
    target: int,
    slot: int,
    *,
    blocking: bool = False,
    free: bool = False,
) -> Transfer:
    """A transfer from the first GPU, counted onwards from the target, that holds the expert: spreads the reading; from
    the host where no GPU does."""
    holders = np.flatnonzero(residency.usable_LEG[layer, expert])
    source = int(min(holders, key=lambda g: (g - target) % residency.cluster.gpus, default=HOST))
    return Transfer(layer=layer, expert=expert, source=source, target=target, slot=slot, blocking=blocking, free=free)
