"""Predictors that count: frequency, window, layer-to-layer Markov, token table.

Shape letters: T tokens, L layers, E experts, K experts per token, V vocabulary ids of the fitted requests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import Forecast, Seen, from_probabilities, token_table, tokens_of
from moesim.traces import LoadTable, TokenTable, load_LE, vocabulary_ids

Floats = NDArray[np.float64]


class Frequency:
    """Each expert's share of the fitted tokens, whatever the tokens are now.

    Source: the static profile that every published comparison starts from.
    """

    name = "frequency"
    needs_tokens = False

    def fit(self, table: TokenTable | LoadTable, num_experts: int, top_k: int) -> None:
        """Count the tokens of every expert, dropped ones too: share_LE sums to 1 in each layer."""
        counted = table.load.sum(axis=0) if isinstance(table, LoadTable) else load_LE(table.topk_ids, num_experts)
        load = counted + 1e-9
        self.share_LE: Floats = load / load.sum(axis=1, keepdims=True)
        self.top_k = top_k

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Tokens x K split by the fitted shares; the most frequent experts stand for every token's choice."""
        tokens = len(tokens_of(seen, queued))
        favourites = np.argsort(-self.share_LE[layer], kind="stable")[: self.top_k]
        return Forecast(
            load=self.share_LE[layer] * tokens * self.top_k,
            topk=np.broadcast_to(favourites, (tokens, self.top_k)),
        )


class Window:
    """Mean load of the last `steps` steps, scaled to this step's tokens; the fitted frequency before there are any.

    Source: the load history that EPLB (DeepSeek) balances on. steps=1 is the "previous batch".
    """

    needs_tokens = False

    def __init__(self, steps: int = 16, name: str = "window") -> None:
        self.steps = steps
        self.name = name
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, num_experts: int, top_k: int) -> None:
        """Fit the frequency that stands in while there is no history."""
        self.num_experts = num_experts
        self._prior.fit(table, num_experts, top_k)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Loads only: history says nothing of single tokens."""
        recent = list(seen.past)[-self.steps :]
        if not recent:
            return Forecast(load=self._prior.forecast(seen, layer, queued=queued).load)
        counted = [np.bincount(step.topk_ids[:, layer].ravel(), minlength=self.num_experts) for step in recent]
        share = np.sum(counted, axis=0) / sum(step.topk_ids[:, layer].size for step in recent)
        return Forecast(load=share * len(tokens_of(seen, queued)) * self._prior.top_k)


class Markov:
    """P(expert of layer l | experts of the last layer that has routed), by counting; chained over the layers between.

    Before any layer has routed, and for a queued step, it falls back on the frequency. Source: first-order
    layer-to-layer affinity (ExFlow; Lina's path profile with a path of one).
    """

    name = "markov"
    needs_tokens = True

    def __init__(self, smoothing: float = 0.5) -> None:
        self.smoothing = smoothing
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, num_experts: int, top_k: int) -> None:
        """Count pairs of experts in adjacent layers: step_LEE[l][i, j] = P(j in layer l+1 | i in layer l)."""
        self._prior.fit(table, num_experts, top_k)
        ids = token_table(table, self.name).topk_ids.astype(np.int64)
        steps = []
        for layer in range(ids.shape[1] - 1):
            pair = ids[:, layer, :, None] * num_experts + ids[:, layer + 1, None, :]
            count = np.bincount(pair.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
            smooth = count + self.smoothing * num_experts * self._prior.share_LE[layer + 1]
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
        p_TE = chain[seen.routed[-1].astype(np.int64)].mean(axis=1)
        return from_probabilities(p_TE, self._prior.top_k)


class TokenTableLookup:
    """P(expert of layer l | vocabulary id), by counting; unseen ids get the frequency.

    Source: the embedding-only end of the token-to-expert forecasts (SiDA, predictive replication, MoE-GPS), without a
    network. The only counting predictor that can speak of a step that is still queued.
    """

    name = "token-table"
    needs_tokens = True

    def __init__(self, smoothing: float = 1.0) -> None:
        self.smoothing = smoothing
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, num_experts: int, top_k: int) -> None:
        """Count experts per vocabulary id; the last row of p_LVE is the frequency, for unseen ids."""
        self._prior.fit(table, num_experts, top_k)
        table = token_table(table, self.name)
        self.ids_V, row_T = np.unique(vocabulary_ids(table), return_inverse=True)
        V, E = len(self.ids_V), num_experts
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
        return from_probabilities(self.p_LVE[layer][row].astype(np.float64), self._prior.top_k)
