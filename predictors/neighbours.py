"""What the tokens went on to choose that have routed alike: our own, between `ridge` and `routing-net`.

What a token has routed is kept in a sketch of some hundred numbers, which every layer turns and adds to: reduced-rank
regression, those directions that tell most of the next layers. Fitted tokens are units. The nearest ones are followed
from layer to layer: those of the layer before are measured anew, and so are their neighbours, some thirty distances
instead of thousands. A forecast is read off the sketch and off what a linear map missed of the nearest units. All in
closed form, no torch.

Source: our own; reduced-rank regression is Izenman's (J. Multivariate Analysis 5(2), 1975), correcting a regression
by its neighbours' residuals Quinlan's (ICML 1993), following a graph of neighbours as Malkov and Yashunin do (TPAMI
42(4), 2020). Shape letters: T tokens, U units, L layers, E experts, K experts per token, R numbers of a sketch, Q of
them that distances are measured in, N neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import Cost, Forecast, Need, RoutedLayer, RouterSpec, Seen, learnable, routed_layer
from moesim.predictors.context import Context, Memory
from moesim.predictors.counting import Frequency
from moesim.predictors.described import Described, Describer, Half
from moesim.predictors.neighbours_fit import (
    EARLY,
    FAR,
    LISTED,
    MEASURED,
    NEIGHBOURS,
    RECENT,
    SKETCH,
    STEP,
    Fitting,
    Near,
    Units,
)
from moesim.predictors.stack import Stack, fit_stack
from moesim.traces import LoadTable, StepTokens, TokenTable

DISTANCES = 3
MOST_UNITS = 20_000
"""Fitting takes time with their square."""
CHECKED = 4096
"""Units, about, that probabilities are calibrated on."""
WINDOW = 32
"""Units next to a token in the order of their choices, from where a search begins."""
STARTS = 3
"""Layers under which a search begins from these, too."""
MOST = np.float32(400)
"""Steps that a token's number may be from 0, so that squared distances stay below FAR."""
FOLLOWED = (4, 3, 2)
"""How many of the nearest units' neighbours are looked at, by layer; the last holds for the others."""


@dataclass(slots=True)
class State:
    """Of a running step."""

    context: Context
    z_TR: Half
    """The other arrays are room to work in, new ones would cost more than what is put into them."""
    next_TR: Half
    z_TQ: NDArray[np.int16]
    beside_TX: Half
    """X = 2 E: shares of the request, and what neighbours say."""
    score_TE: Half
    more_TE: Half
    found_TN: NDArray[np.int32]
    far_TN: NDArray[np.int32]
    early: Near | None = None
    """Those found under the layer EARLY."""
    described: list[Described] = field(default_factory=list)


class Neighbours:
    """See the module: fitted once."""

    name = "neighbours"
    needs: tuple[Need, ...] = ("tokens",)

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Layer after layer. Raises InputError where there are no tokens."""
        table = learnable(table, router, self)
        self.E, self.K, self.L = router.num_experts, router.top_k, table.num_layers
        self.weighted = table.topk_weights is not None
        self._describe = Describer(predictor=self.name, experts=self.E, top_k=self.K, weighted=self.weighted)
        self._prior = Frequency()
        self._prior.fit(table, router)
        units = _thinned(table)
        chosen_ULE = np.zeros((len(units), self.L, self.E), bool)
        np.put_along_axis(chosen_ULE, units.topk_ids.astype(np.int64), True, axis=2)
        context = Context(StepTokens(request=units.request, position=units.position), self.E, {})
        self._memory: Memory = {}
        fitting = Fitting(chosen_ULE, units.request.astype(np.int64), DISTANCES)
        self.units: list[Units] = []
        self.stack_LD: dict[tuple[int, int], Stack] = {}
        self.orders = [Order.of(units.topk_ids[:, layer], self.E) for layer in range(min(STARTS, self.L - 1))]
        checked = slice(None, None, -(-len(units) // CHECKED))
        for source in range(self.L - 1):
            one = self._describe(routed_layer(units, source))
            before_UX = self._describe.dense(context.before(one, source))
            share_UE = context.shares(one.ids, source, np.empty((len(units), self.E), np.float32))
            beside_UV = np.concatenate([before_UX, share_UE], axis=1)
            made, told = fitting.layer(source, self._describe.dense(one), beside_UV, checked)
            self.units.append(made)
            for distance, score_TE in enumerate(told, 1):
                layer = source + distance
                self.stack_LD[layer, distance] = fit_stack(score_TE[None], units.topk_ids[checked, layer])

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Of the layers within three of the last routed one; the frequency of others. Raises InputError where it was
        fitted with gate weights and there are none now."""
        distance = layer - len(seen.routed) + 1
        if queued or not seen.routed or not 1 <= distance <= DISTANCES:
            return self._prior.forecast(seen, layer, queued=queued)
        state = seen.memo.get(self.name) or self._begun(seen.tokens)
        seen.memo[self.name] = state
        for routed in seen.routed[len(state.described) :]:
            self._follow(state, routed)
        return self.stack_LD[layer, distance].forecast(self._scores(state, distance - 1)[None], self.K)

    def observe(self, seen: Seen) -> None:
        """Remember the ends of the step's requests."""
        if self.L > 1 and len(seen.tokens):
            described = [self._describe(routed) for routed in seen.routed[: self.L - 1]]
            Context(seen.tokens, self.E, self._memory).remember(described)

    def cost(self) -> Cost:
        """Two matrices, the rows of the chosen experts, distances and residuals; all that the units hold."""
        if not self.units:
            return Cost()
        E, R, rows = self.E, SKETCH, self.K * (3 if self.weighted else 1)
        dense, sparse = R * R + (R + 2 * E) * E, rows * (R + (RECENT + 1) * E)
        searched = (NEIGHBOURS + FOLLOWED[-1] * LISTED) * MEASURED + 2 * NEIGHBOURS * E
        return Cost(flops=2.0 * (dense + sparse + searched), parameters=sum(units.size() for units in self.units))

    def _begun(self, tokens: StepTokens) -> State:
        T, context = len(tokens), Context(tokens, self.E, self._memory)
        found_TN = np.full((T, NEIGHBOURS), -1, np.int32)
        z_TR, next_TR, beside_TX, score_TE, more_TE = (
            np.zeros((T, width), np.float32) for width in (SKETCH, SKETCH, 2 * self.E, self.E, self.E)
        )
        z_TQ, far_TN = np.empty((T, MEASURED), np.int16), np.full(found_TN.shape, FAR)
        return State(context, z_TR, next_TR, z_TQ, beside_TX, score_TE, more_TE, found_TN, far_TN)

    def _follow(self, state: State, routed: RoutedLayer) -> None:
        """The sketch after one more layer, and the units that are nearest now."""
        from moesim.predictors.neighbours_kernels import followed, measured, started

        source = len(state.described)
        units, one = self.units[source], self._describe(routed)
        z_TR = state.next_TR
        if source:
            np.matmul(state.z_TR, units.turn_RR, out=z_TR)
        z_TR += units.shift_R
        self._add(one, units.map_XR, z_TR)
        z_TQ = state.z_TQ
        measured(z_TR, units.step, MOST, z_TQ)
        best = FOLLOWED[min(source, len(FOLLOWED) - 1)]
        if source < len(self.orders):
            if source:
                followed(units.near_UN, z_TQ, units.unit_UQ, state.found_TN, state.far_TN, 0)
            started(self.orders[source].next_to(one.ids), z_TQ, units.unit_UQ, state.found_TN, state.far_TN)
        followed(units.near_UN, z_TQ, units.unit_UQ, state.found_TN, state.far_TN, best)
        state.z_TR, state.next_TR = z_TR, state.z_TR
        state.described.append(one)
        if source <= EARLY:
            state.early = state.found_TN.copy(), state.far_TN.copy(), units.narrow

    def _scores(self, state: State, at: int) -> Half:
        """[T, E] about the probability that the expert is chosen, `at` + 1 layers after the last that was read."""
        from moesim.predictors.neighbours_kernels import mixed

        units, R, E = self.units[len(state.described) - 1], state.z_TR.shape[1], self.E
        score_TE, beside_TX, read_FE = state.score_TE, state.beside_TX, units.read_DFE[at]
        residual_UE, gain_JB, step = units.residual_DUE[at], units.gain_DJB[at], np.float32(STEP)
        assert state.early is not None, "a layer was read"
        beside_TX[:] = 0
        state.context.shares(state.described[-1].ids, len(state.described) - 1, beside_TX)
        mixed(state.found_TN, state.far_TN, units.narrow, gain_JB[0], residual_UE, step, beside_TX)
        mixed(*state.early, gain_JB[1], residual_UE, step, beside_TX)
        np.matmul(state.z_TR, read_FE[:R], out=score_TE)
        score_TE += np.matmul(beside_TX, read_FE[-2 * E :], out=state.more_TE)
        score_TE += units.usual_DE[at]
        before = state.context.before(state.described[-1], len(state.described) - 1)
        read = [*state.described[-RECENT:], before]
        for one, map_XE in zip(read, read_FE[R : -2 * E].reshape(len(read), -1, E), strict=True):
            self._add(one, map_XE, score_TE)
        return score_TE

    def _add(self, one: Described, map_XR: Half, to_TR: Half) -> None:
        from moesim.predictors.kernels import linear

        add = linear(self.E, one.values_TKC.shape[2], to_TR.shape[1])
        add(one.ids, one.values_TKC, one.own_T, map_XR, to_TR)


@dataclass(frozen=True, slots=True)
class Order:
    """Units as in a dictionary: by their first choice, then their second, and so on."""

    unit_U: NDArray[np.int32]
    word_U: NDArray[np.int64]
    experts: int

    @classmethod
    def of(cls, ids_UK: NDArray[np.integer], experts: int) -> Order:
        """Of the units' choices in one layer."""
        word_U = words(ids_UK, experts)
        unit_U = np.argsort(word_U, kind="stable")
        return cls(unit_U.astype(np.int32), word_U[unit_U], experts)

    def next_to(self, ids_TK: NDArray[np.integer]) -> NDArray[np.int32]:
        """[T, W] those around each token."""
        U = len(self.unit_U)
        first_T = np.searchsorted(self.word_U, words(ids_TK, self.experts)) - WINDOW // 2
        return self.unit_U[first_T.clip(0, max(U - WINDOW, 0))[:, None] + np.arange(min(WINDOW, U))]


def words(ids_TK: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """As many choices as there is room for, the first one highest."""
    word_T = np.zeros(len(ids_TK), np.int64)
    for k in range(min(ids_TK.shape[1], int(62 / np.log2(max(experts, 2))))):
        word_T = word_T * experts + ids_TK[:, k]
    return word_T


def _thinned(table: TokenTable) -> TokenTable:
    """Whole requests, evenly, where there are more tokens than may be units."""
    number_T = np.unique(table.request, return_inverse=True)[1]
    rows_T = np.lexsort((table.position, number_T))
    return table.take(rows_T[number_T[rows_T] % -(-len(table) // MOST_UNITS) == 0])
