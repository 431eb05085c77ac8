"""In which precision a missing expert comes, as a part of a policy: fewer bits travel faster and are not exact.

What is there already in the wanted precision or better is used as it is. Decisions are per expert: of its pairs in a
step the one that wants most decides. Shape letters: T tokens, K experts per token, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import Forecast
from moesim.sim.dispatch import Ints
from moesim.sim.residency import PRECISIONS
from moesim.traces import InputError

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Of every expert of a layer, what is good enough."""

    code_E: NDArray[np.uint8]
    """[E] place in PRECISIONS."""
    skip_E: Bools
    """[E] experts that may be left out where they are missing."""


class Precision(Protocol):
    """In which precision experts come; `Full` is the only one whose results are the model's."""

    @property
    def lossy(self) -> bool:
        """Whether results differ from the model's."""

    @property
    def needs_weights(self) -> bool:
        """Whether gate weights decide, where a token has several experts."""

    def placed_LE(self, popularity_LE: Ints) -> NDArray[np.uint8]:
        """[L, E] in which precision experts lie on GPUs before the first step."""

    def wanted(
        self, layer: int, ids_TK: Ints, weights_TK: NDArray[np.floating] | None, kept_T: Bools, popularity_LE: Ints
    ) -> Wanted:
        """For a layer that has routed. Raises InputError where gate weights decide and there are none."""

    def expected(self, layer: int, forecast: Forecast, popularity_LE: Ints, top_k: int) -> Wanted:
        """For a layer that has not routed yet."""


@dataclass(frozen=True, slots=True)
class Full:
    """As the model's weights are."""

    lossy = False
    needs_weights = False

    def placed_LE(self, popularity_LE: Ints) -> NDArray[np.uint8]:
        """All full."""
        return np.zeros(popularity_LE.shape, np.uint8)

    def wanted(
        self, layer: int, ids_TK: Ints, weights_TK: NDArray[np.floating] | None, kept_T: Bools, popularity_LE: Ints
    ) -> Wanted:
        """All full."""
        return _all(popularity_LE.shape[1])

    def expected(self, layer: int, forecast: Forecast, popularity_LE: Ints, top_k: int) -> Wanted:
        """All full."""
        return _all(popularity_LE.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ByScore:
    """Missing experts come in full, in `low` or not at all, by how much their token leans on them.

    The score of a token's expert is the share of the gate weights that its higher-ranked experts have together: 0 for
    the first. Up to `full_below` a missing expert is wanted in full, up to `low_below` in `low`, beyond it is skipped;
    so the only expert of a top-1 router always comes in full. Source: HOBBIT (arXiv 2411.01433), dynamic expert
    loading, with its thresholds for Mixtral. Ahead of the routing the forecast's inclusion probabilities stand in for
    the gate weights (deviation: there the gate's own, applied early).
    """

    full_below: float = 0.6
    low_below: float = 0.9
    low: str = "int4"

    lossy = True
    needs_weights = True

    def __post_init__(self) -> None:
        _check(self.low)
        if not 0 <= self.full_below <= self.low_below:
            raise InputError(f"thresholds must grow from 0, got {self.full_below} and {self.low_below}")

    def placed_LE(self, popularity_LE: Ints) -> NDArray[np.uint8]:
        """All full."""
        return np.zeros(popularity_LE.shape, np.uint8)

    def wanted(
        self, layer: int, ids_TK: Ints, weights_TK: NDArray[np.floating] | None, kept_T: Bools, popularity_LE: Ints
    ) -> Wanted:
        """By the gate weights."""
        if weights_TK is None:
            if ids_TK.shape[1] > 1:
                raise InputError(
                    "precision by-score reads gate weights, and this recording has none: record them, or use a policy "
                    "without it, such as hobbit-exact"
                )
            weights_TK = np.ones(ids_TK.shape)
        return self._by_score(ids_TK[kept_T], weights_TK[kept_T], popularity_LE.shape[1])

    def expected(self, layer: int, forecast: Forecast, popularity_LE: Ints, top_k: int) -> Wanted:
        """By the forecast: what no token's likeliest K name is left alone, the rest comes in full or in `low`. All full
        where nothing is said of single tokens."""
        if forecast.topk is None or forecast.inclusion is None:
            return _all(popularity_LE.shape[1])
        ids_TK = forecast.topk[:, :top_k].astype(np.int64)
        likely_TK = np.take_along_axis(forecast.inclusion, ids_TK, axis=1)
        found = self._by_score(ids_TK, likely_TK, popularity_LE.shape[1])
        unnamed_E = np.ones(popularity_LE.shape[1], np.bool_)
        unnamed_E[ids_TK] = False
        return Wanted(code_E=found.code_E, skip_E=unnamed_E)

    def _by_score(self, ids_TK: Ints, weights_TK: NDArray[np.floating], experts: int) -> Wanted:
        low, skip = PRECISIONS.index(self.low), len(PRECISIONS)
        score_TK = scores(weights_TK)
        code_TK = np.where(score_TK <= self.full_below, 0, np.where(score_TK <= self.low_below, low, skip))
        code_E = np.full(experts, skip)
        np.minimum.at(code_E, ids_TK.ravel(), code_TK.ravel())
        return Wanted(code_E=np.minimum(code_E, low).astype(np.uint8), skip_E=code_E == skip)


def scores(weights_TK: NDArray[np.floating]) -> NDArray[np.float64]:
    """[T, K] share of a token's gate weights that its higher-ranked experts have together, in [0, 1); of equal ones the
    first in the row ranks higher."""
    order_TK = np.argsort(-weights_TK, axis=1, kind="stable")
    sorted_TK = np.take_along_axis(weights_TK.astype(np.float64), order_TK, axis=1)
    before_TK = np.cumsum(sorted_TK, axis=1) - sorted_TK
    before_TK /= np.maximum(sorted_TK.sum(axis=1, keepdims=True), 1e-30)
    found = np.empty_like(before_TK)
    np.put_along_axis(found, order_TK, before_TK, axis=1)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ByPopularity:
    """All experts in `usual`, but the `rare_share` of each layer with the smallest load in the fitted requests in
    `rare`. Source: Fate (arXiv 2502.12224), popularity-aware hybrid quantisation. Deviation: there popularity is
    counted in the prefill that is running, and decode takes `usual` for all."""

    usual: str = "int4"
    rare: str = "int2"
    rare_share: float = 0.25

    lossy = True
    needs_weights = False

    def __post_init__(self) -> None:
        _check(self.usual)
        _check(self.rare)
        if not 0 <= self.rare_share <= 1:
            raise InputError(f"rare_share must lie in 0 .. 1, got {self.rare_share}")

    def placed_LE(self, popularity_LE: Ints) -> NDArray[np.uint8]:
        """As wanted."""
        code_LE = np.full(popularity_LE.shape, PRECISIONS.index(self.usual), np.uint8)
        rarest: NDArray[np.intp] = np.argsort(popularity_LE, axis=1, kind="stable")
        rare = int(self.rare_share * popularity_LE.shape[1])
        np.put_along_axis(code_LE, rarest[:, :rare], np.uint8(PRECISIONS.index(self.rare)), axis=1)
        return code_LE

    def wanted(
        self, layer: int, ids_TK: Ints, weights_TK: NDArray[np.floating] | None, kept_T: Bools, popularity_LE: Ints
    ) -> Wanted:
        """By the fitted load."""
        code_E = self.placed_LE(popularity_LE[layer : layer + 1])[0]
        return Wanted(code_E=code_E, skip_E=np.zeros(len(code_E), np.bool_))

    def expected(self, layer: int, forecast: Forecast, popularity_LE: Ints, top_k: int) -> Wanted:
        """By the fitted load."""
        code_E = self.placed_LE(popularity_LE[layer : layer + 1])[0]
        return Wanted(code_E=code_E, skip_E=np.zeros(len(code_E), np.bool_))


def _all(experts: int) -> Wanted:
    return Wanted(code_E=np.zeros(experts, np.uint8), skip_E=np.zeros(experts, np.bool_))


def _check(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")


FULL = Full()
PRECISION_RULES: dict[str, type[Full] | type[ByScore] | type[ByPopularity]] = {
    "full": Full,
    "by-score": ByScore,
    "by-popularity": ByPopularity,
}
"""By the name that a policy file gives them; its other keys are the fields of the class."""
