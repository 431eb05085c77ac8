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
    Units,
)
from moesim.predictors.stack import Opinions, Stack, fit_stack
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
FOLLOWED = (4, 3, 1)
"""How many of the nearest units' neighbours are looked at, by layer; the last holds for the others."""


@dataclass(slots=True, kw_only=True)
class State:
    """Of a running step, or of some rows of it; T are these."""

    rows: slice
    context: Context
    z_TR: Half
    z_TQ: NDArray[np.int16]
    found_2TN: NDArray[np.int32]
    far_2TN: NDArray[np.int32]
    """Those near now, and those found under the layer EARLY."""
    narrow: tuple[np.float32, np.float32] = np.float32(0), np.float32(0)
    """On the distances of these and those."""
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
        states: list[State] = seen.memo.get(self.name) or self._begun(seen.tokens)
        seen.memo[self.name] = states

        def opinions(number: int) -> Opinions:
            state = states[number]
            for routed in seen.routed[len(state.described) :]:
                self._follow(state, routed)
            return self._scores(state, distance - 1)[None]

        return self.stack_LD[layer, distance].forecast(opinions, [state.rows for state in states], self.E, self.K)

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
        dense, sparse = R * R + R * E, rows * (R + (RECENT + 1) * E) + (self.K + 1) * E
        searched = (NEIGHBOURS + FOLLOWED[-1] * LISTED) * MEASURED + 2 * NEIGHBOURS * E
        return Cost(flops=2.0 * (dense + sparse + searched), parameters=sum(units.size() for units in self.units))

    def _begun(self, tokens: StepTokens) -> list[State]:
        from moesim.predictors.halves import halves

        context = Context(tokens, self.E, self._memory)
        return [self._begun_rows(context, rows) for rows in halves(len(tokens))]

    def _begun_rows(self, context: Context, rows: slice) -> State:
        T = rows.stop - rows.start
        return State(
            rows=rows,
            context=context,
            z_TR=np.empty((T, SKETCH), np.float32),
            z_TQ=np.empty((T, MEASURED), np.int16),
            found_2TN=np.full((2, T, NEIGHBOURS), -1, np.int32),
            far_2TN=np.full((2, T, NEIGHBOURS), FAR),
        )

    def _follow(self, state: State, routed: RoutedLayer) -> None:
        """The sketches after one more layer, and the units that are nearest now."""
        from moesim.predictors.kernels import product
        from moesim.predictors.neighbours_kernels import followed, measured, started

        source, sketch = len(state.described), self.units[len(state.described)].sketch
        state.described.append(self._describe(routed, state.rows))
        if sketch is None:
            return
        state.z_TR, last_TR = np.repeat(sketch.shift_R[None], len(state.z_TR), axis=0), state.z_TR
        if source:
            product(SKETCH, SKETCH)(last_TR, sketch.turn_RR, state.z_TR)
        for one, map_XR in zip(state.described[-len(sketch.map_JXR) :], sketch.map_JXR, strict=True):
            self._add(one, map_XR, state.z_TR)
        measured(state.z_TR, sketch.step, MOST, state.z_TQ)
        search = state.z_TQ, sketch.unit_UQ, state.found_2TN[0], state.far_2TN[0]
        if source < len(self.orders):
            if source:
                followed(sketch.near_UN, *search, 0)
            started(self.orders[source].next_to(routed.ids[state.rows]), *search)
        followed(sketch.near_UN, *search, FOLLOWED[min(source, len(FOLLOWED) - 1)])
        state.narrow = sketch.narrow, state.narrow[1]
        if source <= EARLY:
            state.found_2TN[1], state.far_2TN[1] = state.found_2TN[0], state.far_2TN[0]
            state.narrow = sketch.narrow, sketch.narrow

    def _scores(self, state: State, at: int) -> Half:
        """[T, E] about the probability that the expert is chosen, `at` + 1 layers after the last that was read."""
        from moesim.predictors.neighbours_kernels import mixed

        score_TE, units = self._linear(state, at), self.units[len(state.described) - 1]
        near = zip(state.found_2TN, state.far_2TN, state.narrow, units.gain_DJB[at], strict=True)
        for found_TN, far_TN, narrow, gain_B in near:
            mixed(found_TN, far_TN, narrow, gain_B, units.residual_DUE[at], np.float32(STEP), score_TE)
        return score_TE

    def _linear(self, state: State, at: int) -> Half:
        """[T, E] that without what the neighbours say."""
        from moesim.predictors.kernels import product
        from moesim.predictors.neighbours_kernels import shared

        source, one = len(state.described) - 1, state.described[-1]
        units, T = self.units[source], len(one.row_T)
        read_FE = units.read_DFE[at]
        score_TE = np.repeat(units.usual_DE[at][None], T, axis=0)
        product(SKETCH, self.E)(state.z_TR, read_FE[:SKETCH], score_TE)
        read = [*state.described[-RECENT:], state.context.before(one, source)]
        for each, map_XE in zip(read, read_FE[SKETCH : -self.E].reshape(len(read), -1, self.E), strict=True):
            self._add(each, map_XE, score_TE)
        shared(one.ids, *state.context.begun(source), read_FE[-self.E :], state.rows.start, score_TE)
        return score_TE

    def _add(self, one: Described, map_XR: Half, to_TR: Half) -> None:
        from moesim.predictors.kernels import linear

        add = linear(self.E, one.values_NKC.shape[2], to_TR.shape[1])
        add(one.row_T, one.ids, one.values_NKC, one.own_N, map_XR, to_TR)


@dataclass(frozen=True, slots=True)
class Order:
    """Units as in a dictionary: by their first choice, then their second, and so on."""

    unit_U: NDArray[np.int32]
    word_U: NDArray[np.int64]
    experts: int

    @classmethod
    def of(cls, ids_UK: NDArray[np.integer], experts: int) -> Order:
        """Of the units' choices in one layer."""
        none = cls(np.empty(0, np.int32), np.empty(0, np.int64), experts)
        return none.joined(np.arange(len(ids_UK)), ids_UK)

    def joined(self, unit_T: NDArray[np.intp], ids_TK: NDArray[np.integer]) -> Order:
        """With these units, who are no longer where they were before; of those that chose alike they come first."""
        stays_U = ~np.isin(self.unit_U, unit_T)
        unit_U = np.append(unit_T.astype(np.int32), self.unit_U[stays_U])
        word_U = np.append(words(ids_TK, self.experts), self.word_U[stays_U])
        order_U = np.argsort(word_U, kind="stable")
        return Order(unit_U[order_U], word_U[order_U], self.experts)

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
