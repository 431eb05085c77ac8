"""Predictors that continue what has been: decayed loads, the distribution so far, the request's previous token.

Shape letters: T tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import (
    Cost,
    Floats,
    Forecast,
    Need,
    PastStep,
    RouterSpec,
    Seen,
    filled,
    from_inclusion,
    inclusion_of,
    learnable,
    tokens_of,
)
from moesim.predictors.counting import Frequency
from moesim.traces import LoadTable, StepTokens, TokenTable

Found = tuple[NDArray[np.intp], NDArray[np.intp], PastStep]
"""(rows of this step, rows of their predecessors there, an earlier step)."""


class Ema:
    """Loads of the earlier steps, each step counting `decay` times the next one, upon a Dirichlet prior: the fitted
    frequency, worth `prior_tokens` tokens.

    Source: the exponential moving average that training systems rebalance on (FlexMoE, Prophet) in place of a window.
    """

    needs: tuple[Need, ...] = ()

    def __init__(self, decay: float = 0.8, prior_tokens: float = 64, name: str = "ema") -> None:
        self.decay = decay
        self.prior_tokens = prior_tokens
        self.name = name
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Fit the frequency that the loads are added to."""
        self._prior.fit(table, router)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Loads only: history says nothing of single tokens."""
        key = (self, layer)
        if key not in seen.memo:
            seen.memo[key] = self._share(seen, layer)
        return Forecast(load=seen.memo[key] * (len(tokens_of(seen, queued)) * self._prior.top_k))

    def _share(self, seen: Seen, layer: int) -> Floats:
        """[E] the expected share of each expert after the steps seen."""
        usual_E = self._prior.share_LE[layer]
        count_E = self.prior_tokens * self._prior.top_k * usual_E
        for age, step in enumerate(reversed(seen.past)):
            load_E = np.bincount(step.topk_ids[:, layer].ravel(), minlength=len(usual_E))
            count_E = count_E + self.decay**age * load_E
        return np.asarray(count_E / count_E.sum())

    def cost(self) -> Cost:
        """Counts are kept anyway."""
        return self._prior.cost()


class Distribution(Ema):
    """The layer's distribution over experts as one multinomial, by maximum likelihood over all steps seen, every token
    alike, with the fitted frequency as a prior of `prior_tokens` tokens.

    Source: MoE-GPS (arXiv 2506.07366), distribution-only prediction. Deviation: there the distribution is estimated
    once, on training batches; here it follows the steps that are run, as far as the driver keeps them.
    """

    def __init__(self, prior_tokens: float = 1024) -> None:
        super().__init__(decay=1.0, prior_tokens=prior_tokens, name="distribution")


class PreviousToken:
    """The experts that the request's previous token had in the same layer, where an earlier step routed that token.

    So it speaks in decode only. In encoder and prefill the previous token is in the same step, and this layer of it has
    not routed either: every token falls back on the frequency. Source: the temporal locality that caches of experts
    live on (Mixtral-offloading's LRU; "previous token" among the baselines of next-layer prediction).
    """

    name = "previous-token"
    needs: tuple[Need, ...] = ("tokens",)

    def __init__(self, smoothing: float = 8.0) -> None:
        self.smoothing = smoothing
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Count over adjacent tokens of a request: repeat_LE = P(the next token has the expert | this one has it)."""
        self._prior.fit(table, router)
        table = learnable(table, router, self)
        self.usual_LE = inclusion_of(self._prior.share_LE, router.top_k)
        order = np.lexsort((table.position, table.request))
        key = _key(table.request, table.position)[order]
        adjacent = np.flatnonzero(np.diff(key) == 1)
        repeats = []
        for layer in range(table.num_layers):
            ids = table.topk_ids[order, layer]
            before, after = ids[adjacent], ids[adjacent + 1]
            again = (before[:, :, None] == after[:, None, :]).any(axis=2)
            had_E, again_E = (np.bincount(e, minlength=router.num_experts) for e in (before.ravel(), before[again]))
            repeats.append((again_E + self.smoothing * self.usual_LE[layer]) / (had_E + self.smoothing))
        self.repeat_LE: Floats = np.array(repeats)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """The fitted chance of a repeat for the previous token's experts, the rest by frequency."""
        tokens, key = tokens_of(seen, queued), (self, queued)
        if key not in seen.memo:
            seen.memo[key] = list(_predecessors(tokens, seen))
        usual_E = self.usual_LE[layer]
        inclusion_TE = np.tile(usual_E, (len(tokens), 1))
        for rows, there, step in seen.memo[key]:
            ids_TK = step.topk_ids[there, layer].astype(np.int64)
            known_TE = np.zeros((len(rows), len(usual_E)))
            np.put_along_axis(known_TE, ids_TK, self.repeat_LE[layer][ids_TK], axis=1)
            inclusion_TE[rows] = filled(known_TE, usual_E, self._prior.top_k)
        return from_inclusion(inclusion_TE, self._prior.top_k)

    def cost(self) -> Cost:
        """K chances are looked up, E frequencies scaled."""
        return Cost(flops=self.repeat_LE.shape[1], parameters=self.repeat_LE.size + self.usual_LE.size)


def _predecessors(tokens: StepTokens, seen: Seen) -> Iterator[Found]:
    """Where each token's predecessor is, the latest steps first; those that no step has are left out."""
    wanted = _key(tokens.request, tokens.position) - 1
    left = np.arange(len(tokens))
    for step in reversed(seen.past):
        if not len(left):
            return
        _, here, there = np.intersect1d(
            wanted[left], _key(step.tokens.request, step.tokens.position), return_indices=True
        )
        if len(here):
            yield left[here], there, step
            left = np.delete(left, here)


def _key(request: NDArray[np.int32], position: NDArray[np.int32]) -> NDArray[np.int64]:
    """One number a token; the next token of a request has the next number."""
    return request.astype(np.int64) * 2**32 + position
