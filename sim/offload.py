"""Experts that are on no GPU when their tokens come: fetched from the host in place of others, run on the host's CPU,
replaced by experts that are there, or left out; and copies ahead of their use.

Which slots are given away is an eviction rule's choice (eviction.py), in which precision experts come a precision's
(policies/precision.py). An expert that a layer computes now is never displaced. Copies that came, or are to come, ahead
of a layer that has not routed yet go last: others' prefetches may not take their slots, and demand does only where
there is nothing else. Knows nothing about time. Shape letters: T tokens, K experts per token, L layers, E experts, G
GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import Forecast, RoutedLayer
from moesim.sim.dispatch import Ints
from moesim.sim.eviction import EVICTIONS, Future, Key, Pool, Setting
from moesim.sim.policies import Policy
from moesim.sim.residency import EMPTY, HOST, PRECISIONS, Residency, Transfer

Cheaper = Callable[[int], bool]
"""Whether the host computes so many tokens of one expert sooner than its copy arrives; the executor knows."""
Bools = NDArray[np.bool_]
FEW = 16
"""Experts that are looked at one by one rather than as arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """What has to happen before a layer's next wave of experts runs."""

    moves: list[Transfer]
    """Copies to begin, blocking."""
    awaited: list[tuple[int, int]]
    """(expert, GPU) whose copies are under way already."""
    host_E: Bools
    """[E] experts that the host's CPU computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What is computed of what a layer's router chose, and what of it is there."""

    ids_TK: Ints
    """[T, K] the router's ids; EMPTY where a pair is skipped (it adds nothing, the token's other weights stay), and
    another expert's where that one is computed instead, with the weight of the one it stands for."""
    skipped: int = 0
    substituted: int = 0
    """Pairs, those of dropped tokens not counted."""
    hit: Sequence[int] = ()
    awaited: Sequence[int] = ()
    missed: Sequence[int] = ()
    """The experts that have tokens: on a GPU in the wanted precision or better, on their way, neither."""


class Cache:
    """The slots of GPUs that the host backs, under one policy's rules. `cheaper` is asked where the policy's `miss` is
    `cpu`; `future` is shown to eviction rules that are oracles."""

    def __init__(
        self, policy: Policy, residency: Residency, cheaper: Cheaper | None = None, future: Future | None = None
    ) -> None:
        c = residency.cluster
        self.residency, self.cheaper = residency, cheaper
        self.precision, self.miss = policy.recipe.precision, policy.recipe.miss
        self.popularity_LE = policy.popularity_LE
        setting = Setting(cluster=c, popularity_LE=policy.popularity_LE, future=future)
        self.eviction = EVICTIONS[policy.recipe.eviction](setting)
        self._home_E: list[int] = c.home_E.tolist()
        self._plain = self.miss in ("wait", "cpu") and not self.precision.lossy
        """Whether everything is computed as the router chose it, in full."""
        self._code_LE = np.zeros((c.layers, c.experts), np.uint8)
        """In which precision each expert was wanted when its layer last routed, at least; place in PRECISIONS."""
        self._best = 0
        """No copy comes in a better precision, place in PRECISIONS."""
        self._ahead: set[Key] = set()
        """Copied ahead of a layer that has not routed since."""
        self._windows: dict[tuple[int, int], tuple[dict[Key, int], Iterator[int]]] = {}
        """Of the decision that is being made, by GPU and first slot: what lies where, and the slots that hold
        nothing."""
        self._busy: dict[int, set[Key]] = {}
        """Lane to what it computes now."""
        there_LE = residency.usable_LEG.any(axis=2)
        self._pinned = {(int(i), int(e)) for i, e in np.argwhere(self.eviction.pinned_LE() & there_LE)}
        for gpu, slot in np.argwhere(residency.expert_GS != EMPTY).tolist():
            key = (int(residency.layer_GS[gpu, slot]), int(residency.expert_GS[gpu, slot]))
            if key not in self._pinned:
                self.eviction.loaded(key, self._pool(gpu, key[0]), ahead=False)

    def begin_step(self, requests: Iterable[int]) -> None:
        """A step with tokens of these requests begins."""
        self.eviction.begin_step(requests)

    def computes(self, layer: int, ids_TK: NDArray[np.integer], lane: int) -> None:
        """`layer` has routed: its experts are not displaced until the lane asks for others, or is `done`."""
        self._busy[lane] = {(layer, int(expert)) for expert in np.unique(ids_TK)}

    def comes_in(self, precision: str) -> None:
        """Whatever is asked for, copies come in no better precision: it is good enough."""
        self._best = max(self._best, PRECISIONS.index(precision))

    def failed(self) -> None:
        """A GPU has gone: what was pinned there is not, where it comes from now on."""
        there_LE = np.asarray((self.residency.usable_LEG | self.residency.coming_LEG).any(axis=2))
        self._pinned = {key for key in self._pinned if there_LE[key]}
        for layer, expert in np.argwhere(~there_LE).tolist():
            self.eviction.gone((layer, expert))

    def executed(
        self, layer: int, routed: RoutedLayer, dropped_T: Bools, scores_TE: NDArray[np.floating] | None
    ) -> Executed:
        """What `layer`, which has just routed, computes. `scores_TE`: the router's, of all experts, for a choice of
        what stands in for a missing one; without them the expert with the largest load in the fitted requests does."""
        r, c = self.residency, self.residency.cluster
        ids_TK = routed.ids.astype(np.int64)
        if self._plain:
            experts = np.flatnonzero(np.bincount(ids_TK[~dropped_T].ravel(), minlength=1))
            return self._used(layer, ids_TK, experts, *self._there(layer, experts))
        wanted = self.precision.wanted(layer, ids_TK, routed.weights, ~dropped_T, self.popularity_LE)
        self._code_LE[layer] = wanted.code_E
        here_E = (r.usable_LEG[layer] & self._good_EG(layer)).any(axis=1)
        coming_E = (r.coming_LEG[layer] & self._good_EG(layer)).any(axis=1)
        kept_T1, routed_TK = ~dropped_T[:, None], ids_TK
        ids_TK = np.where((wanted.skip_E & ~here_E & ~coming_E)[ids_TK] & kept_T1, EMPTY, ids_TK)
        if self.miss in ("substitute", "skip"):
            usable_E = r.usable_LEG[layer].any(axis=1)
            gone_TK = (ids_TK != EMPTY) & ~usable_E[ids_TK] & kept_T1
            if self.miss == "skip":
                ids_TK = np.where(gone_TK, EMPTY, ids_TK)
            else:
                ids_TK = _substituted(ids_TK, gone_TK, usable_E, scores_TE, self.popularity_LE[layer])
            self._code_LE[layer] = len(PRECISIONS) - 1  # what is there is good enough: nothing is waited for
            here_E = usable_E
        experts = np.flatnonzero(np.bincount(ids_TK[kept_T1 & (ids_TK != EMPTY)], minlength=c.experts))
        found = self._used(layer, ids_TK, experts, here_E[experts], coming_E[experts], wanted.code_E)
        return replace(
            found,
            skipped=int(((ids_TK == EMPTY) & kept_T1).sum()),
            substituted=int(((ids_TK != routed_TK) & (ids_TK != EMPTY)).sum()),
        )

    def _there(self, layer: int, experts: NDArray[np.intp]) -> tuple[Bools, Bools]:
        """[X] each: whether the expert is on a GPU, and on its way to one, as good as it is wanted."""
        r = self.residency
        if r.cluster.gpus == 1 and len(experts) <= FEW:  # a decode step decides in microseconds: no arrays for a few
            usable_E, coming_E = r.usable_LEG[layer, :, 0], r.coming_LEG[layer, :, 0]
            wanted_E, code_E, least = self._code_LE[layer], r.precision_LEG[layer, :, 0], self._best
            good = [(e, code_E[e] <= max(wanted_E[e], least)) for e in experts.tolist()]
            here = [bool(usable_E[e] and enough) for e, enough in good]
            return np.array(here, np.bool_), np.array([bool(coming_E[e] and enough) for e, enough in good], np.bool_)
        code_X = np.maximum(self._code_LE[layer, experts], self._best)
        good_XG = r.precision_LEG[layer, experts] <= code_X[:, None]
        here_X = (r.usable_LEG[layer, experts] & good_XG).any(axis=1)
        return here_X, (r.coming_LEG[layer, experts] & good_XG).any(axis=1)

    def _used(
        self,
        layer: int,
        ids_TK: Ints,
        experts: NDArray[np.intp],
        here_X: Bools,
        coming_X: Bools,
        code_E: NDArray[np.uint8] | None = None,
    ) -> Executed:
        """Tell the eviction rule what is computed; what of it is there. `code_E`: as wanted, None for all in full."""
        self._ahead = {key for key in self._ahead if key[0] != layer}
        self.eviction.visited(layer)
        there_X = here_X | coming_X
        for expert, there in zip(experts.tolist(), there_X.tolist(), strict=True):
            key = (layer, expert)
            if key not in self._pinned:
                full = code_E is None or bool(code_E[expert] == 0)
                self.eviction.used(key, self._pool(self._home(expert), layer), hit=there, full=full)
        return Executed(
            ids_TK=ids_TK,
            hit=experts[here_X].tolist(),
            awaited=experts[coming_X & ~here_X].tolist(),
            missed=experts[~there_X].tolist(),
        )

    def fetch(self, layer: int, load_E: Ints, lane: int = 0) -> Fetch:
        """For the experts with tokens left in `load_E`: every GPU fetches its missing ones, as many as find a slot that
        none of them needs. Experts that are there and needed stay; they are computed in the same wave."""
        r = self.residency
        experts = np.flatnonzero(load_E)
        self._busy[lane] = {(layer, expert) for expert in experts.tolist()}
        here_X, coming_X = self._there(layer, experts)
        awaited: list[tuple[int, int]] = []
        if (coming_X & ~here_X).any():
            waits_X = experts[coming_X & ~here_X]
            coming_XG = r.coming_LEG[layer, waits_X] & self._good_EG(layer)[waits_X]
            awaited = [(int(waits_X[x]), int(g)) for x, g in np.argwhere(coming_XG)]
        missing = experts[~(here_X | coming_X)].tolist()
        host_E = np.zeros(r.cluster.experts, np.bool_)
        if self.cheaper is not None:
            host_E[[expert for expert in missing if self.cheaper(int(load_E[expert]))]] = True
        self._windows.clear()
        moves: list[Transfer] = []
        for expert in missing:
            if host_E[expert]:
                continue
            move = self._bring((layer, expert), int(self._code_LE[layer, expert]), lane)
            if move is not None:
                moves.append(move)
        return Fetch(moves=moves, awaited=awaited, host_E=host_E)

    def done(self, lane: int) -> None:
        """The lane computes nothing of what it fetched any more."""
        self._busy.pop(lane, None)

    def prefetch(self, layer: int, experts: Sequence[int], forecast: Forecast, due: int) -> list[Transfer]:
        """Copies of those of `experts`, the most wanted first, that are not on their GPU or on their way there, as many
        as find a slot; none displaces another of `experts`."""
        self.eviction.forecast(layer, forecast.load)
        wanted = self.precision.expected(layer, forecast, self.popularity_LE, self.residency.cluster.top_k)
        keys = [(layer, expert) for expert in experts if not wanted.skip_E[expert]]
        self._ahead.update(key for key in keys if self._holds(key))
        self._windows.clear()
        moves: list[Transfer] = []
        for key in keys:
            if self._holds(key):
                continue
            move = self._bring(key, int(wanted.code_E[key[1]]), None, due)
            if move is not None:
                moves.append(move)
                self._ahead.add(key)
        return moves

    def _holds(self, key: Key) -> bool:
        r = self.residency
        return bool((r.usable_LEG[key] | r.coming_LEG[key]).any())

    def _good_EG(self, layer: int) -> Bools:
        """[E, G] whether a copy is, or will be, in the precision that is wanted."""
        wanted_E1 = np.maximum(self._code_LE[layer][:, None], self._best)
        return np.asarray(self.residency.precision_LEG[layer] <= wanted_E1)

    def _bring(self, key: Key, code: int, lane: int | None, due: int = 0) -> Transfer | None:
        """The copy that brings an expert to its GPU, beside those of `begun`, for a lane that waits for it or (None)
        ahead; None where no slot may be given away."""
        layer, expert = key
        gpu = self._home(expert)
        slot = self._slot(key, gpu, lane)
        if slot is None:
            return None
        return Transfer(
            layer=layer,
            expert=expert,
            source=HOST,
            target=gpu,
            slot=slot,
            blocking=lane is not None,
            precision=PRECISIONS[code],
            due=due,
        )

    def _slot(self, key: Key, gpu: int, lane: int | None) -> int | None:
        """The slot that `key` comes into; the eviction rule has been told."""
        r, pool = self.residency, self._pool(gpu, key[0])
        held = self._window(gpu, key[0])
        if r.usable_LEG[key][gpu] or r.coming_LEG[key][gpu]:  # with too few bits: it comes anew into its slot
            return held.pop(key)
        empty = self._empty(gpu, key[0])
        if empty is None:
            allowed = self._allowed([there for there in held if there not in self._pinned], lane)
            if not allowed:
                return None
            goes = self.eviction.victim(pool, allowed, key)
            self._ahead.discard(goes)
            empty = held.pop(goes)
        self.eviction.loaded(key, pool, ahead=lane is None)
        return empty

    def _window(self, gpu: int, layer: int) -> dict[Key, int]:
        """What lies in the slots that a layer may use, in their order; less what has been given away in this
        decision."""
        window = self.residency.cluster.slots_of(layer)
        found = self._windows.get((gpu, window.start))
        if found is None:
            span = slice(window.start, window.stop)
            keys = list(
                zip(
                    self.residency.layer_GS[gpu, span].tolist(),
                    self.residency.expert_GS[gpu, span].tolist(),
                    strict=True,
                )
            )
            held = {key: slot for slot, key in zip(window, keys, strict=True) if key[0] != EMPTY}
            free = [slot for slot, key in zip(window, keys, strict=True) if key[0] == EMPTY]
            found = self._windows[gpu, window.start] = (held, iter(free))
        return found[0]

    def _empty(self, gpu: int, layer: int) -> int | None:
        """The first slot that holds nothing, which is given away with that."""
        return next(self._windows[gpu, self.residency.cluster.slots_of(layer).start][1], None)

    def _allowed(self, keys: Iterable[Key], lane: int | None) -> list[Key]:
        """Those that may go: neither computed nor expected soon. For a lane that waits, else what is expected, else
        what other lanes are about to compute, who have to wait for their turn and will fetch it again."""
        busy = set().union(*self._busy.values())
        allowed = [key for key in keys if key not in busy and key not in self._ahead]
        if allowed or lane is None:
            return allowed
        return [key for key in keys if key not in busy] or [key for key in keys if key not in self._busy[lane]]

    def _pool(self, gpu: int, layer: int) -> Pool:
        return gpu, 0 if self.residency.cluster.pooled else layer

    def _home(self, expert: int) -> int:
        """The expert's GPU, or the next that lives."""
        gpu = self._home_E[expert]
        if self.residency.alive_G[gpu]:
            return gpu
        alive = np.flatnonzero(self.residency.alive_G)
        return int(alive[np.searchsorted(alive, gpu) % len(alive)])


def _substituted(
    ids_TK: Ints, gone_TK: Bools, usable_E: Bools, scores_TE: NDArray[np.floating] | None, popularity_E: Ints
) -> Ints:
    """`ids_TK` with the best usable experts that a token has not got in the place of those that are `gone_TK`, the
    heaviest pair's first; EMPTY where there is none left."""
    found = ids_TK.copy()
    for t in np.flatnonzero(gone_TK.any(axis=1)).tolist():
        scores_E = popularity_E if scores_TE is None else scores_TE[t]
        others = [e for e in np.argsort(-scores_E, kind="stable").tolist() if usable_E[e] and e not in ids_TK[t]]
        for k in np.flatnonzero(gone_TK[t]).tolist():
            found[t, k] = others.pop(0) if others else EMPTY
    return found
