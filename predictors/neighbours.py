"""What the tokens went on to choose that have routed alike: our own, between `ridge` and `routing-net`.

The last layers that a token has routed are read as they are; what came before is kept in a sketch of some numbers,
which every few layers is turned and added to: reduced-rank regression, those directions that tell most of the next
layers. Fitted tokens are units. The nearest ones are followed from sketch to sketch along a graph: those of the one
before are measured anew, and so are their neighbours, some sixteen distances instead of thousands. A forecast is read
off all this and off what a linear map missed of the nearest units. All in closed form, no torch.

Source: our own; reduced-rank regression is Izenman's (J. Multivariate Analysis 5(2), 1975), correcting a regression
by its neighbours' residuals Quinlan's (ICML 1993), following a graph of neighbours as Malkov and Yashunin do (TPAMI
42(4), 2020). Shape letters: T tokens, U units, L layers, E experts, K experts per token, R numbers of a sketch, Q of
them that distances are measured in, N neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import Cost, Forecast, Need, RouterSpec, Seen, learnable, routed_layer
from moesim.predictors.context import Context, Memory
from moesim.predictors.counting import Frequency
from moesim.predictors.described import Described, Describer, Half
from moesim.predictors.neighbours_fit import (
    EARLY,
    EVERY,
    FAR,
    LISTED,
    MEASURED,
    NEIGHBOURS,
    NUMBERS,
    RECENT,
    SKETCH,
    STEP,
    Fitting,
    Units,
    renews,
)
from moesim.predictors.stack import Stack, Weighing, fit_stack
from moesim.traces import LoadTable, StepTokens, TokenTable

DISTANCES = 3
MOST_UNITS = 20_000
"""Fitting takes time with their square."""
CHECKED = 4096
"""Units, about, that probabilities are calibrated on."""
STARTS = 3
"""Sketches that are searched for from these, too."""
MOST = np.float32(400)
"""Steps that a token's number may be from 0, so that squared distances stay below FAR."""
FOLLOWED = (2, 1)
"""How many of the nearest units' neighbours are looked at: where a search begins, and later."""

UNWEIGHED: Weighing = (
    np.empty(0, np.float32),
    np.float32(0),
    np.float32(0),
    np.empty((0, 0), np.float32),
    np.empty((0, 0), np.int64),
    np.empty(0),
)
"""For who asks for scores alone."""
Beside = tuple[Described, tuple[NDArray[np.integer], NDArray[np.intp], Half, Half]]
"""What the tokens before have routed; the choices in the last layer, and what `Context.begun` says of the requests."""


@dataclass(slots=True, kw_only=True)
class Part:
    """Some rows of a running step; T are these."""

    rows: slice
    z_TR: Half
    z_TQ: NDArray[np.int16]
    found_2TN: NDArray[np.int32]
    far_2TN: NDArray[np.int32]
    """Those near now, and those found under the layer EARLY."""
    narrow_2: Half
    """On the distances of these and those."""


@dataclass(slots=True, kw_only=True)
class State:
    """Of a running step."""

    context: Context
    parts: list[Part]
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
        self._describe = Describer(
            predictor=self.name, experts=self.E, top_k=self.K, weighted=self.weighted, numbers=NUMBERS
        )
        self._prior = Frequency()
        self._prior.fit(table, router)
        units = _thinned(table)
        chosen_ULE = np.zeros((len(units), self.L, self.E), bool)
        np.put_along_axis(chosen_ULE, units.topk_ids.astype(np.int64), True, axis=2)
        context = Context(StepTokens(request=units.request, position=units.position), self.E, {})
        self._memory: Memory = {}
        width = self._describe.width
        fitting = Fitting(chosen_ULE, units.request.astype(np.int64), DISTANCES, width)
        self.units: list[Units] = []
        self.stack_LD: dict[tuple[int, int], Stack] = {}
        starts = [layer for layer in range(self.L - 1) if renews(layer, self.L)][:STARTS]
        self.orders = {layer: Order.of(units.topk_ids[:, layer], self.E) for layer in starts}
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
        self._try(units.take(slice(0, 1)))

    def _try(self, rows: TokenTable) -> None:
        """No forecast of a step waits for the compiler."""
        seen = Seen(step=0, tokens=StepTokens(request=rows.request, position=rows.position))
        for layer in range(min(self.L - 1, EARLY + EVERY + 1)):
            seen.routed.append(routed_layer(rows, layer))
            self.forecast(seen, layer + 1)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Of the layers within three of the last routed one; the frequency of others. Raises InputError where it was
        fitted with gate weights and there are none now."""
        distance = layer - len(seen.routed) + 1
        if queued or not seen.routed or not 1 <= distance <= DISTANCES:
            return self._prior.forecast(seen, layer, queued=queued)
        state: State = seen.memo.get(self.name) or self._begun(seen.tokens)
        seen.memo[self.name] = state
        unread = range(len(state.described), len(seen.routed))
        state.described += [self._describe(seen.routed[source], state.context.spare) for source in unread]
        beside = self._beside(state.context, state.described)

        def weigh(number: int, by: Weighing) -> None:
            for source in unread:
                self._follow(state.parts[number], state.described[: source + 1])
            self._scores(state.parts[number], state.described, beside, distance - 1, by)

        rows = [part.rows for part in state.parts]
        return self.stack_LD[layer, distance].gathered(weigh, rows, self.E, self.K)

    def observe(self, seen: Seen) -> None:
        """Remember the ends of the step's requests."""
        if self.L > 1 and len(seen.tokens):
            described = [self._describe(routed) for routed in seen.routed[: self.L - 1]]
            Context(seen.tokens, self.E, self._memory).remember(described)

    def cost(self) -> Cost:
        """Two matrices, the rows of the chosen experts, distances and residuals; all that the units hold."""
        if not self.units:
            return Cost()
        E, R, rows = self.E, SKETCH, self.K * (NUMBERS if self.weighted else 1)
        often = sum(units.sketch is not None for units in self.units) / len(self.units)
        renewed = (R * R + (NEIGHBOURS + FOLLOWED[-1] * LISTED) * MEASURED) * often + rows * R
        read = R * E + (rows * (RECENT + 1) + self.K + 1) * E + 2 * NEIGHBOURS * E
        return Cost(flops=2.0 * (renewed + read), parameters=sum(units.size() for units in self.units))

    def _begun(self, tokens: StepTokens) -> State:
        from moesim.predictors.halves import halves

        context = Context(tokens, self.E, self._memory)
        return State(context=context, parts=[self._part(rows) for rows in halves(len(tokens))])

    def _part(self, rows: slice) -> Part:
        T = rows.stop - rows.start
        return Part(
            rows=rows,
            z_TR=np.empty((T, SKETCH), np.float32),
            z_TQ=np.empty((T, MEASURED), np.int16),
            found_2TN=np.full((2, T, NEIGHBOURS), -1, np.int32),
            far_2TN=np.full((2, T, NEIGHBOURS), FAR),
            narrow_2=np.empty(2, np.float32),
        )

    def _beside(self, context: Context, described: list[Described]) -> Beside:
        source, last = len(described) - 1, described[-1]
        return context.before(last, source), (last.ids, *context.begun(source))

    def _follow(self, part: Part, described: list[Described]) -> None:
        """The sketches after one more layer, and the units that are nearest now."""
        from moesim.predictors.neighbours_kernels import followed, sketcher, started

        source, last = len(described) - 1, described[-1]
        if (sketch := self.units[source].sketch) is None:
            return
        last_TR, part.z_TR = part.z_TR, np.empty_like(part.z_TR)
        layers = tuple(one.read(part.rows) for one in described[-len(sketch.map_JXR) :])
        turned = sketch.turn_RR, sketch.map_JXR, sketch.shift_R
        make = sketcher(self.E, last.values_NKC.shape[2])
        make(last_TR, layers, turned, sketch.step, MOST, part.z_TR, part.z_TQ)
        search = part.z_TQ, sketch.unit_UQ, part.found_2TN[0], part.far_2TN[0]
        if source in self.orders:
            if source:
                followed(sketch.near_UN, *search, 0)
            started(self.orders[source].next_to(last.ids, last.row_T[part.rows]), self.orders[source].unit_U, *search)
        followed(sketch.near_UN, *search, FOLLOWED[source not in self.orders])
        part.narrow_2[0] = sketch.narrow
        if source <= EARLY:
            for kept_2 in (part.found_2TN, part.far_2TN, part.narrow_2):
                kept_2[1] = kept_2[0]

    def _scores(
        self, part: Part, described: list[Described], beside: Beside, at: int, by: Weighing, *, near: bool = True
    ) -> Half:
        """[T, E] about the probability that the expert is chosen, `at` + 1 layers after the last that was read, weighed
        into `by`; without what the neighbours say where they are not `near`."""
        from moesim.predictors.neighbours_kernels import reader

        units, (before, begun) = self.units[len(described) - 1], beside
        layers = [one.read(part.rows) for one in described[-RECENT:]]
        row_T, ids_NK, values_NKC, own_N = layers[-1]
        if len(layers) < RECENT:
            nothing = np.full_like(row_T, -1), ids_NK, values_NKC, own_N
            layers = [nothing] * (RECENT - len(layers)) + layers
        gain_JB, score_TE = units.gain_DJB[at], np.empty((len(row_T), self.E), np.float32)
        told = part.found_2TN, part.far_2TN, part.narrow_2, gain_JB[: len(gain_JB) * near]
        residuals = units.residual_DUE[at], np.float32(STEP)
        reader(self.E, values_NKC.shape[2])(
            units.usual_DE[at],
            part.z_TR,
            (*layers, before.read(part.rows)),
            begun,
            part.rows.start,
            units.read_DFE[at],
            (*told, *residuals),
            score_TE,
            by,
        )
        return score_TE


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

    def next_to(self, ids_NK: NDArray[np.integer], row_T: NDArray[np.intp]) -> NDArray[np.int64]:
        """[T] where those begin that are around each token, which has chosen `ids_NK[row]`."""
        from moesim.predictors.neighbours_kernels import next_to

        first_T = np.empty(len(row_T), np.int64)
        next_to(ids_NK, row_T, self.experts, places(ids_NK.shape[1], self.experts), self.word_U, first_T)
        return first_T


def places(top_k: int, experts: int) -> int:
    """Choices that there is room for in a word."""
    return min(top_k, int(62 / np.log2(max(experts, 2))))


def words(ids_TK: NDArray[np.integer], experts: int) -> NDArray[np.int64]:
    """As many choices as there is room for, the first one highest."""
    word_T = np.zeros(len(ids_TK), np.int64)
    for k in range(places(ids_TK.shape[1], experts)):
        word_T = word_T * experts + ids_TK[:, k]
    return word_T


def _thinned(table: TokenTable) -> TokenTable:
    """Whole requests, evenly, where there are more tokens than may be units."""
    number_T = np.unique(table.request, return_inverse=True)[1]
    rows_T = np.lexsort((table.position, number_T))
    return table.take(rows_T[number_T[rows_T] % -(-len(table) // MOST_UNITS) == 0])
