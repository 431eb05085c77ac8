"""Predictors that count: frequency, window, layer-to-layer Markov, token table.

Shape letters: T tokens, L layers, E experts, K experts per token, V vocabulary ids of the fitted requests.
"""

from __future__ import annotations

import numpy as np

from moesim.predictors.base import (
    Cost,
    Floats,
    Forecast,
    Need,
    RouterSpec,
    Seen,
    from_probabilities,
    inclusion_of,
    learnable,
    tokens_of,
)
from moesim.traces import LoadTable, TokenTable, load_LE, vocabulary_ids


class Frequency:
    """Each expert's share of the fitted tokens, whatever the tokens are now.

    Source: the static profile that every published comparison starts from.
    """

    name = "frequency"
    needs: tuple[Need, ...] = ()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Count the tokens of every expert, dropped ones too: share_LE sums to 1 in each layer."""
        E, self.top_k = router.num_experts, router.top_k
        counted = table.load.sum(axis=0) if isinstance(table, LoadTable) else load_LE(table.topk_ids, E)
        load = counted + 1e-9
        self.share_LE: Floats = load / load.sum(axis=1, keepdims=True)
        self._inclusion_LE = inclusion_of(self.share_LE, self.top_k)
        self._order_LE = np.argsort(-self.share_LE, axis=1, kind="stable")

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Tokens x K split by the fitted shares; the most frequent experts stand for every token's choice."""
        tokens = len(tokens_of(seen, queued))
        return Forecast(
            load=self.share_LE[layer] * tokens * self.top_k,
            topk=np.broadcast_to(self._order_LE[layer, : self.top_k], (tokens, self.top_k)),
            inclusion_UE=self._inclusion_LE[layer : layer + 1],
            kind_T=np.zeros(tokens, np.int64),
        )

    def cost(self) -> Cost:
        """A row of shares."""
        return Cost(parameters=self.share_LE.size)


class Window:
    """Mean load of the last `steps` steps, scaled to this step's tokens; the fitted frequency before there are any.

    Source: the load history that EPLB (DeepSeek) balances on. steps=1 is the "previous batch".
    """

    needs: tuple[Need, ...] = ()

    def __init__(self, steps: int = 16, name: str = "window") -> None:
        self.steps = steps
        self.name = name
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Fit the frequency that stands in while there is no history."""
        self.num_experts = router.num_experts
        self._prior.fit(table, router)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Loads only: history says nothing of single tokens."""
        recent = list(seen.past)[-self.steps :]
        if not recent:
            return Forecast(load=self._prior.forecast(seen, layer, queued=queued).load)
        counted = [np.bincount(step.topk_ids[:, layer].ravel(), minlength=self.num_experts) for step in recent]
        share = np.sum(counted, axis=0) / sum(step.topk_ids[:, layer].size for step in recent)
        return Forecast(load=share * len(tokens_of(seen, queued)) * self._prior.top_k)

    def cost(self) -> Cost:
        """Counts are kept anyway."""
        return self._prior.cost()


class Markov:
    """P(expert of layer l | experts of the last layer that has routed), by counting; chained over the layers between.

    Before any layer has routed, and for a queued step, it falls back on the frequency. Source: first-order
    layer-to-layer affinity (ExFlow; Lina's path profile with a path of one).
    """

    name = "markov"
    needs: tuple[Need, ...] = ("tokens",)

    def __init__(self, smoothing: float = 0.5) -> None:
        self.smoothing = smoothing
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Count pairs of experts in adjacent layers: step_LEE[l][i, j] = P(j in layer l+1 | i in layer l)."""
        self._prior.fit(table, router)
        E = router.num_experts
        ids = learnable(table, router, self).topk_ids.astype(np.int64)
        steps = []
        for layer in range(ids.shape[1] - 1):
            pair = ids[:, layer, :, None] * E + ids[:, layer + 1, None, :]
            count = np.bincount(pair.ravel(), minlength=E**2).reshape(E, E)
            smooth = count + self.smoothing * E * self._prior.share_LE[layer + 1]
            steps.append(smooth / smooth.sum(axis=1, keepdims=True))
        self.step_LEE = steps

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Chain the transition matrices from the last routed layer to `layer`."""
        routed = len(seen.routed)
        if queued or routed == 0 or layer < routed:
            return self._prior.forecast(seen, layer, queued=queued)
        chain = self.step_LEE[routed - 1]
        for between in range(routed, layer):
            chain = chain @ self.step_LEE[between]
        ids_TK = seen.routed[-1].ids.astype(np.int64)
        if ids_TK.shape[1] == 1:
            return from_probabilities(chain, self._prior.top_k, ids_TK[:, 0])
        return from_probabilities(chain[ids_TK].mean(axis=1), self._prior.top_k)

    def cost(self) -> Cost:
        """K rows of E are added."""
        return Cost(
            flops=self._prior.top_k * self._prior.share_LE.shape[1], parameters=sum(m.size for m in self.step_LEE)
        )


class TokenTableLookup:
    """P(expert of layer l | vocabulary id), by counting; unseen ids get the frequency.

    Source: the embedding-only end of the token-to-expert forecasts (SiDA, predictive replication, MoE-GPS), without a
    network. The only counting predictor that can speak of a step that is still queued.
    """

    name = "token-table"
    needs: tuple[Need, ...] = ("tokens", "vocabulary")

    def __init__(self, smoothing: float = 1.0) -> None:
        self.smoothing = smoothing
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Count experts per vocabulary id; the last row of p_LVE is the frequency, for unseen ids."""
        self._prior.fit(table, router)
        table = learnable(table, router, self)
        self.ids_V, row_T = np.unique(vocabulary_ids(table), return_inverse=True)
        V, E = len(self.ids_V), router.num_experts
        p_LVE = []
        for layer in range(table.num_layers):
            key = row_T[:, None] * E + table.topk_ids[:, layer].astype(np.int64)
            count = np.bincount(key.ravel(), minlength=(V + 1) * E).reshape(V + 1, E)
            smooth = count + self.smoothing * self._prior.share_LE[layer]
            p_LVE.append((smooth / smooth.sum(axis=1, keepdims=True)).astype(np.float32))
        self.p_LVE = p_LVE

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Look every token's vocabulary id up."""
        wanted = vocabulary_ids(tokens_of(seen, queued))
        row = np.minimum(np.searchsorted(self.ids_V, wanted), len(self.ids_V) - 1)
        row = np.where(self.ids_V[row] == wanted, row, len(self.ids_V))
        row_U, kind_T = np.unique(row, return_inverse=True)
        return from_probabilities(self.p_LVE[layer][row_U].astype(np.float64), self._prior.top_k, kind_T)

    def cost(self) -> Cost:
        """A row is looked up."""
        return Cost(parameters=sum(p.size for p in self.p_LVE))
