"""A draft's view of the target's gates; the draft is what the model itself has computed before its first MoE layer.

Shape letters: T tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from moesim.predictors.base import Cost, Floats, Forecast, Need, RouterSpec, Seen, from_probabilities, learnable
from moesim.predictors.counting import Frequency
from moesim.predictors.mixture import mixture_weights
from moesim.traces import LoadTable, TokenTable

FIT_TOKENS = 1024
"""Tokens that the temperatures are fitted on, spread over the recording."""
LOG_TEMPERATURES = (-4.0, 4.0)
"""Between what a temperature is searched for: a gate's logits are not scaled to be believed early."""


class DraftGate:
    """Router input of the first MoE layer through the gate of every later layer: all layers can be forecast as soon as
    the first has routed.

    Probabilities are a softmax of the logits, at a temperature fitted per layer by maximum likelihood, mixed with the
    frequency. Before the first layer has routed, and for a queued step, it is the frequency. Source: SP-MoE (arXiv
    2510.10302), cross-model prediction. Deviations: there a separate draft model runs ahead and its attention output in
    layer l goes through the target's gate of layer l; here the draft is the target's own shallow part, one hidden state
    for all layers, so forecasts get worse with depth, and tokens that are only queued, which a draft model could be fed
    with, are not spoken of.
    """

    name = "draft-gate"
    needs: tuple[Need, ...] = ("tokens", "router_input", "gates")

    def __init__(self) -> None:
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Fit temperature_L and trust_L, the share of the softmax in the mixture; layer 0 has none."""
        self._prior.fit(table, router)
        table = learnable(table, router, self)
        assert table.router_input is not None and router.gates is not None, "what a predictor needs is there"
        self.gates = router.gates
        rows = slice(None, None, -(-len(table) // FIT_TOKENS))
        input_Td = table.router_input[rows, 0].astype(np.float32)
        self.temperature_L, self.trust_L = np.ones(table.num_layers), np.zeros(table.num_layers)
        for layer in range(1, table.num_layers):
            ids_TK = table.topk_ids[rows, layer].astype(np.int64)
            fitted = _calibrated(self._logits(input_Td, layer), ids_TK, self._prior.share_LE[layer])
            self.temperature_L[layer], self.trust_L[layer] = fitted

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """The gate of `layer` on the first layer's input."""
        if queued or layer < max(len(seen.routed), 1) or not seen.routed or seen.routed[0].router_input is None:
            return self._prior.forecast(seen, layer, queued=queued)
        if self not in seen.memo:
            seen.memo[self] = seen.routed[0].router_input.astype(np.float32)
        told_TE = softmax(self._logits(seen.memo[self], layer) / self.temperature_L[layer], axis=1)
        trust, usual_E = self.trust_L[layer], self._prior.share_LE[layer]
        return from_probabilities(trust * told_TE + (1 - trust) * usual_E, self._prior.top_k)

    def _logits(self, input_Td: NDArray[np.float32], layer: int) -> Floats:
        """[T, E] what the gate of `layer` makes of `input_Td`."""
        return np.asarray(input_Td @ self.gates.weight[layer].T + self.gates.bias[layer], np.float64)

    def cost(self) -> Cost:
        """One gate; the gates are the model's own and were not learned here."""
        learned = self.temperature_L.size + self.trust_L.size + self._prior.share_LE.size
        return Cost(flops=2 * self.gates.weight[0].size, parameters=learned)


def _calibrated(logit_TE: Floats, ids_TK: NDArray[np.int64], usual_E: Floats) -> tuple[float, float]:
    """(temperature, share of the softmax) under which the chosen ids are likeliest, in a mixture with the frequency."""

    def explained(log_temperature: float) -> tuple[float, float]:
        told_TE = softmax(logit_TE / np.exp(log_temperature), axis=1)
        p_NM = np.stack([np.take_along_axis(told_TE, ids_TK, axis=1).ravel(), usual_E[ids_TK].ravel()], axis=1)
        weight_M = mixture_weights(p_NM)
        return float(np.log(p_NM @ weight_M).mean()), float(weight_M[0])

    best = minimize_scalar(lambda t: -explained(t)[0], bounds=LOG_TEMPERATURES, method="bounded")
    return float(np.exp(best.x)), explained(best.x)[1]
