"""Predicted routing: what a predictor said of each token is executed, and the router is not obeyed.

Source: SiDA-MoE (arXiv 2310.18859), whose hash function replaces the router, and the published artifact of predictive
replication (arXiv 2605.11537), which scales every expert's output by a fixed factor. The model's outputs change: this
is a mode of its own, whose quality quality.py measures. Shape letters: N tokens, E experts, D = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.traces import InputError, TokenTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What is executed in a layer, [N] each."""

    ids_N: torch.Tensor
    dropped_N: torch.Tensor
    """Over the capacity of the predicted expert in the token's sequence: the model's rule, on what is predicted."""
    weight_N: torch.Tensor
    """By which the expert's output is multiplied."""


class PredictedRouting:
    """Turns forecasts into what is executed.

    `factor_L`: [L] one factor a layer, known without the router; None: the router's own probability of the predicted
    expert, which no system that skips the router has: it isolates what choosing wrongly costs.
    """

    def __init__(self, routers: list[Any], factor_L: NDArray[np.floating] | None) -> None:
        self._routers, self._factor_L = routers, factor_L

    def choose(self, ids_TK: NDArray[np.integer], layer: int, x_ND: torch.Tensor, sequence_N: torch.Tensor) -> Chosen:
        """The first expert forecast for each token, `ids_TK` being the driver's."""
        router = self._routers[layer]
        ids_N = torch.from_numpy(np.ascontiguousarray(ids_TK[:, 0], np.int64)).to(x_ND.device)
        if self._factor_L is not None:
            weight_N = x_ND.new_full((len(x_ND),), float(self._factor_L[layer]))
        else:
            probs_NE = logits(router, x_ND).softmax(dim=-1).to(x_ND.dtype)
            weight_N = probs_NE.gather(1, ids_N[:, None])[:, 0]
        return Chosen(
            ids_N=ids_N,
            dropped_N=over_capacity(ids_N, sequence_N, int(router.expert_capacity)),
            weight_N=weight_N,
        )


def over_capacity(ids_N: torch.Tensor, sequence_N: torch.Tensor, capacity: int) -> torch.Tensor:
    """[N] True where the token's expert has taken `capacity` earlier tokens of its sequence, tokens in order."""
    key_N = sequence_N * (int(ids_N.max()) + 1) + ids_N
    _, group_N, count_X = torch.unique(key_N, return_inverse=True, return_counts=True)
    order_N = group_N.argsort(stable=True)
    first_X = count_X.cumsum(0) - count_X
    place_N = torch.empty_like(group_N)
    place_N[order_N] = torch.arange(len(group_N), device=group_N.device) - first_X[group_N[order_N]]
    return place_N >= capacity


def mean_weights(fit: TokenTable) -> NDArray[np.float64]:
    """[L] the mean weight by which the fitted requests' routers multiplied an expert's output.

    Raises InputError where the recording has no weights.
    """
    if fit.topk_weights is None:
        raise InputError("a fixed factor for predicted experts comes from recorded gate weights, and there are none")
    return np.asarray(fit.topk_weights[:, :, 0].astype(np.float64).mean(axis=0))


def logits(router: Any, x_ND: torch.Tensor) -> torch.Tensor:
    """[N, E] of the model's own router, in its own dtype."""
    # The router converts its classifier in its first call, which may be still to come.
    given: torch.Tensor = router.classifier.to(router.dtype)(x_ND.to(router.dtype))
    return given
