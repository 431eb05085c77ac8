"""Ridge regression from everything that a token has routed so far to what it will route: our own, for any recording.

One linear map per last routed layer, from the experts and gate weights of all layers before to the experts of the next
ones; closed form, no torch, seconds to fit. Its scores become probabilities by a logistic stack that also hears the
token table, where there are vocabulary ids. The statistics that it is solved from add up, so it can go on learning:
observed steps join them with more weight than fitted ones, and the maps are solved again.

Shape letters: T tokens, L layers, E experts, K experts per token, F numbers that describe a layer, C numbers that
describe a chosen expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.predictors.base import (
    Cost,
    Floats,
    Forecast,
    Need,
    RouterSpec,
    Seen,
    learnable,
    routed_layer,
)
from moesim.predictors.counting import Frequency, TokenTableLookup
from moesim.predictors.described import Described, Describer, Half, described_width
from moesim.predictors.stack import Opinions, Stack, fit_stack
from moesim.traces import InputError, LoadTable, StepTokens, TokenTable, step_tokens

DISTANCES = 3
EVERY = slice(None)
"""All rows."""
PENALTY = 20.0
MOST_FEATURES = 16_384
"""Numbers that all layers together may be described by: the square of it is kept."""
HELD_OUT = 6
"""One request in so many is kept for the stack, then learned from like the others."""
FRESH = 10.0
"""Weight of an observed token beside a fitted one."""


@dataclass(slots=True)
class Statistics:
    """Sums over tokens that ridge regression is solved from; they add up."""

    tokens: float
    x_X: Floats
    y_Y: Floats
    xx_XX: Floats
    """[X, X], X = (L - 1) F numbers of all layers but the last."""
    xy_XY: Floats
    """[X, Y], Y = (L - 1) E experts of all layers but the first."""

    def plus(self, other: Statistics, weight: float) -> Statistics:
        """The sums of both, `other` counting `weight` times."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return Statistics(*(mine + weight * theirs for mine, theirs in pairs))

    def _parts(self) -> tuple[Any, ...]:
        return self.tokens, self.x_X, self.y_Y, self.xx_XX, self.xy_XY


class Ridge:
    """See the module: fitted once.

    Source: our own; ridge regression is Hoerl and Kennard (Technometrics 12(1), 1970), the stack Wolpert (Neural
    Networks 5(2), 1992).
    """

    name = "ridge"
    needs: tuple[Need, ...] = ("tokens",)

    def __init__(self) -> None:
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Solve the maps on most requests, fit the stack on the rest, solve again on all. Raises InputError where the
        layers and experts are too many."""
        table = learnable(table, router, self)
        self.E, self.K, self.L = router.num_experts, router.top_k, table.num_layers
        self.weighted = table.topk_weights is not None and self._features(weighted=True) <= MOST_FEATURES
        if self._features(weighted=self.weighted) > MOST_FEATURES:
            raise InputError(f"predictor {self.name!r}: {self.L} layers of {self.E} experts are too many for it")
        self._describe = Describer(predictor=self.name, experts=self.E, top_k=self.K, weighted=self.weighted)
        self._prior.fit(table, router)
        self._words = TokenTableLookup() if table.token_id is not None else None
        number_T = np.unique(table.request, return_inverse=True)[1]
        rest_T = number_T % HELD_OUT == HELD_OUT - 1
        if rest_T.all() or not rest_T.any():
            rest_T = np.arange(len(table)) % HELD_OUT == 0
        most, rest = table.take(~rest_T), table.take(rest_T)
        learned = self._statistics(most)
        self._solve(learned)
        if self._words:
            self._words.fit(most, router)
        self.stack_LD = self._fitted_stacks(rest)
        self.statistics = learned.plus(self._statistics(rest), 1.0)
        self._solve(self.statistics)
        if self._words:
            self._words.fit(table, router)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Of the layers within three of the last routed one; before any has routed, and of a queued step, what the
        vocabulary ids say. Raises InputError where it was fitted with gate weights and there are none now."""
        distance = layer - len(seen.routed) + 1
        if queued or not seen.routed or not 1 <= distance <= DISTANCES:
            known: Any = self._words or self._prior
            told: Forecast = known.forecast(seen, layer, queued=queued)
            return told
        from moesim.predictors.halves import halves  # compiled: only who forecasts pays for it

        parts = halves(len(seen.tokens))
        described: list[Described] = seen.memo.setdefault(self.name, [])
        described += [self._describe(one) for one in seen.routed[len(described) :]]
        word_TE, stack = self._word(seen.tokens, layer), self.stack_LD[layer, distance]

        def opinions(number: int) -> Opinions:
            rows = parts[number]
            return self._opinions(self._scores(described, distance, rows), word_TE, rows)

        return stack.forecast(opinions, parts, self.E, self.K)

    def cost(self) -> Cost:
        """The maps' rows of the chosen experts are added, over half of the layers on average."""
        kinds = 3 if self.weighted else 1
        words = self._words.cost().parameters if self._words else 0
        size = sum(m.size for m in self.maps.values())
        return Cost(flops=2.0 * kinds * self.K * self.E * self.L / 2, parameters=size + words)

    def _features(self, *, weighted: bool) -> int:
        return max(self.L - 1, 1) * described_width(self.E, weighted=weighted)

    def _statistics(self, table: TokenTable, block: int = 4096) -> Statistics:
        sums = self._none()
        for begin in range(0, len(table) if self.L > 1 else 0, block):
            part = table.take(slice(begin, begin + block))
            step = [self._describe(routed_layer(part, layer)) for layer in range(self.L)]
            sums = sums.plus(self._summed(step), 1.0)
        return sums

    def _none(self) -> Statistics:
        X, Y = self._features(weighted=self.weighted), max(self.L - 1, 0) * self.E
        return Statistics(0.0, np.zeros(X), np.zeros(Y), np.zeros((X, X)), np.zeros((X, Y)))

    def _summed(self, step: list[Described]) -> Statistics:
        x_TX = np.concatenate([self._describe.dense(one) for one in step[:-1]], axis=1)
        y_TLE = np.zeros((len(x_TX), self.L - 1, self.E), np.float32)
        for layer, one in enumerate(step[1:]):
            np.put_along_axis(y_TLE[:, layer], one.ids.astype(np.int64), 1.0, axis=1)
        y_TY = y_TLE.reshape(len(x_TX), -1)
        return Statistics(len(x_TX), x_TX.sum(axis=0), y_TY.sum(axis=0), x_TX.T @ x_TX, x_TX.T @ y_TY)

    def _solve(self, sums: Statistics) -> None:
        """All maps from one Cholesky factor: the first rows of it are the factor of the first layers alone."""
        from scipy.linalg import cholesky, solve_triangular

        self.maps: dict[int, Half] = {}
        self.means: dict[int, Half] = {}
        if self.L == 1:
            return
        n = max(sums.tokens, 1.0)
        mean_X, mean_Y = sums.x_X / n, sums.y_Y / n
        xx_XX = sums.xx_XX - n * np.outer(mean_X, mean_X)
        xx_XX[np.diag_indices_from(xx_XX)] += PENALTY
        factor = cholesky(xx_XX, lower=True, overwrite_a=True, check_finite=False)
        half_XY = solve_triangular(factor, sums.xy_XY - n * np.outer(mean_X, mean_Y), lower=True, check_finite=False)
        width = self._describe.width
        for last in range(self.L - 1):
            m, to = (last + 1) * width, slice(last * self.E, (last + DISTANCES) * self.E)
            map_XY = solve_triangular(factor[:m, :m], half_XY[:m, to], lower=True, trans=1, check_finite=False)
            self.means[last] = (mean_Y[to] - mean_X[:m] @ map_XY).astype(np.float32).reshape(-1, self.E)
            by_distance = map_XY.reshape(last + 1, width, -1, self.E).transpose(2, 0, 1, 3)
            self.maps[last] = np.ascontiguousarray(by_distance, dtype=np.float32)

    def _scores(self, described: list[Described], distance: int, rows: slice = EVERY) -> Half:
        """[T, E] the linear forecast of these rows: about the probability that the expert is chosen."""
        from moesim.predictors.kernels import linear  # compiled: only who forecasts pays for it

        last, add = len(described) - 1, linear(self.E, described[0].values_NKC.shape[2])
        score_TE = np.repeat(self.means[last][distance - 1][None], len(described[0].row_T[rows]), axis=0)
        for one, map_XE in zip(described, self.maps[last][distance - 1], strict=True):
            add(*one.read(rows), map_XE, score_TE)
        return score_TE

    def _opinions(self, score_TE: Half, word_TE: Half | None, rows: slice = EVERY) -> Opinions:
        return score_TE[None] if word_TE is None else np.stack([score_TE, word_TE[rows]])

    def _word(self, tokens: StepTokens, layer: int) -> Half | None:
        """[T, E] what the token table says, where there is one."""
        if not self._words:
            return None
        told = self._words.forecast(Seen(step=0, tokens=tokens), layer).inclusion
        assert told is not None, "the token table speaks of every token"
        return told.astype(np.float32)

    def _fitted_stacks(self, rest: TokenTable) -> dict[tuple[int, int], Stack]:
        tokens = step_tokens(rest, np.arange(len(rest)))
        described = [self._describe(routed_layer(rest, layer)) for layer in range(self.L)]
        found = {}
        for layer in range(1, self.L):
            for distance in range(1, min(DISTANCES, layer) + 1):
                score_TE = self._scores(described[: layer - distance + 1], distance)
                opinion_JTE = self._opinions(score_TE, self._word(tokens, layer))
                stack = found[layer, distance] = fit_stack(opinion_JTE, rest.topk_ids[:, layer])
                # No forecast of a step waits for the compiler.
                stack.forecast([opinion_JTE].__getitem__, [slice(0, len(rest))], self.E, self.K)
        return found


class OnlineRidge(Ridge):
    """See the module: goes on learning, `every` so many observed tokens."""

    name = "ridge-online"

    def __init__(self, every: int = 1024) -> None:
        super().__init__()
        self.every = every
        self._waiting: list[list[Described]] = []

    def observe(self, seen: Seen) -> None:
        """Remember the step, and solve the maps again when enough tokens have come."""
        if self.L == 1:
            return
        self._waiting.append([self._describe(one) for one in seen.routed])
        if sum(len(step[0].ids) for step in self._waiting) < self.every:
            return
        for step in self._waiting:
            self.statistics = self.statistics.plus(self._summed(step), FRESH)
        self._waiting.clear()
        self._solve(self.statistics)
