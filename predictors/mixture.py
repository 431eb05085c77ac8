"""A weighted sum of several predictors, weights by how well each explains what it was not fitted on.

Shape letters: T tokens, L layers, E experts, K experts per token, M members, N choices (tokens x K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import (
    Cost,
    Floats,
    Forecast,
    Need,
    Predictor,
    RouterSpec,
    Seen,
    from_inclusion,
    learnable,
    missing,
    routed_layer,
)
from moesim.predictors.counting import Frequency, Markov, TokenTableLookup
from moesim.predictors.gates import CrossGate
from moesim.predictors.markov2 import Markov2
from moesim.predictors.paths import Paths
from moesim.traces import LoadTable, TokenTable, step_tokens

MEMBERS: tuple[Callable[[], Predictor], ...] = (
    Frequency,
    Markov,
    Markov2,
    Paths,
    TokenTableLookup,
    lambda: CrossGate(over=True, name="cross-gate-over"),
)
HELD_TOKENS = 1024
"""Held-out tokens that weights are fitted on, spread over the held-out requests."""
FAR = 4
"""Distances from here on share their weights."""
ROUNDS = 30
"""Of expectation maximisation."""
HEARD = 0.01
"""Members with less weight are not asked."""


class Mixture:
    """Members' inclusion probabilities, summed with weights per layer and distance.

    A fourth of the fitted requests is held out; members are fitted on the others, weights on it by expectation
    maximisation of the likelihood of its choices, then members on everything. Members that need what the recording
    lacks are left out; all must say inclusion probabilities. With one request there is nothing to hold out, and weights
    are equal. Members that read earlier steps are weighed as if there were none. Source: linear interpolation with
    held-out weights (Jelinek and Mercer, 1980); no published system.
    """

    name = "mixture"
    needs: tuple[Need, ...] = ("tokens",)

    def __init__(self, members: Sequence[Callable[[], Predictor]] = MEMBERS) -> None:
        self._candidates = members

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Weights weight_LDM[layer, d] for distance d, 0 where no layer has routed; then the members."""
        table = learnable(table, router, self)
        self.top_k = router.top_k
        self.members = [m for m in (candidate() for candidate in self._candidates) if not missing(m, table, router)]
        self.weight_LDM = np.full((table.num_layers, FAR + 1, len(self.members)), 1 / len(self.members))
        _, request_T = np.unique(table.request, return_inverse=True)
        count = int(request_T.max()) + 1
        if count > 1:
            held_T = request_T % min(count, 4) == 0
            self._fit_members(table.take(~held_T), router)
            rows = np.flatnonzero(held_T)
            self._weigh(table.take(rows[:: -(-len(rows) // HELD_TOKENS)]))
        self._fit_members(table, router)

    def _fit_members(self, table: TokenTable, router: RouterSpec) -> None:
        for member in self.members:
            member.fit(table, router)

    def _weigh(self, held: TokenTable) -> None:
        """Replay the held-out tokens as one step and fit the weights at every decision point."""
        seen = Seen(step=0, tokens=step_tokens(held, np.arange(len(held))))
        for point in range(held.num_layers):
            for layer in range(point, min(point + FAR, held.num_layers) if point else held.num_layers):
                ids_TK = held.topk_ids[:, layer].astype(np.int64)
                inclusions = [_inclusion(member, seen, layer, False) for member in self.members]
                p_NM = np.stack([np.take_along_axis(i, ids_TK, axis=1).ravel() for i in inclusions], axis=1)
                weight_M = mixture_weights(p_NM)
                weight_M[weight_M < HEARD] = 0
                self.weight_LDM[layer, _distance(point, layer)] = weight_M / weight_M.sum()
            seen.routed.append(routed_layer(held, point))

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """The weighted sum of what the members say."""
        weight_M = self.weight_LDM[layer, _distance(0 if queued else len(seen.routed), layer)]
        heard = np.flatnonzero(weight_M)
        inclusion_TE = weight_M[heard[0]] * _inclusion(self.members[heard[0]], seen, layer, queued)
        for m in heard[1:]:
            inclusion_TE += weight_M[m] * _inclusion(self.members[m], seen, layer, queued)
        return from_inclusion(inclusion_TE, self.top_k)

    def cost(self) -> Cost:
        """All members, and their sum."""
        costs = [member.cost() for member in self.members]
        return Cost(
            flops=sum(c.flops for c in costs), parameters=sum(c.parameters for c in costs) + self.weight_LDM.size
        )


def mixture_weights(p_NM: NDArray[np.floating]) -> Floats:
    """[M] the weights under which N observations are likeliest, when member m gives observation n `p_NM[n, m]`."""
    weight_M = np.full(p_NM.shape[1], 1 / p_NM.shape[1])
    for _ in range(ROUNDS):
        share_NM = p_NM * weight_M
        weight_M = (share_NM / np.maximum(share_NM.sum(axis=1, keepdims=True), 1e-30)).mean(axis=0)
    return np.asarray(weight_M / weight_M.sum())


def _inclusion(member: Predictor, seen: Seen, layer: int, queued: bool) -> NDArray[np.floating]:
    """[T, E] what a member says."""
    inclusion = member.forecast(seen, layer, queued=queued).inclusion
    assert inclusion is not None, f"{member.name} says nothing of single tokens"
    return inclusion


def _distance(point: int, layer: int) -> int:
    """How many layers ahead `layer` is, at most FAR; 0 where no layer has routed."""
    return min(max(layer - point + 1, 1), FAR) if point else 0
