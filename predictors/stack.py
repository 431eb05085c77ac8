"""Several opinions about each (token, expert) pair, weighed by logistic regression on held-out tokens.

Shape letters: J opinions, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import Floats, Forecast
from moesim.predictors.described import Half

LEAST = 4e-3
"""Opinions are kept this far from never and always: they are not that sure."""
Opinions = NDArray[np.float32]
"""[J, T, E] each about the probability that the expert is chosen; may lie outside 0 and 1 a little."""
Weighing = tuple[Half, np.float32, np.float32, Half, NDArray[np.int64], Floats]
"""Weights, bias and LEAST; and of a part the probabilities, the likeliest experts and the load, to be filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The fitted weights on the opinions' log odds."""

    weight_J: NDArray[np.float32]
    bias: float

    def forecast(
        self, opinions: Callable[[int], Opinions], parts: Sequence[slice], experts: int, top_k: int
    ) -> Forecast:
        """Inclusion probabilities scaled to rows that sum to K, none above 1. `opinions` is asked for each of the parts
        that make up the tokens, by its number, two at once."""
        from moesim.predictors.kernels import weighed  # compiled: only who forecasts pays for it

        return self.gathered(lambda number, by: weighed(opinions(number), *by), parts, experts, top_k)

    def gathered(
        self, weigh: Callable[[int, Weighing], None], parts: Sequence[slice], experts: int, top_k: int
    ) -> Forecast:
        """The same, but `weigh` sees to a part: of its number and what the kernel `weighed` takes behind opinions."""
        from moesim.predictors.halves import together

        T = parts[-1].stop
        inclusion_TE, topk_TK = np.empty((T, experts), np.float32), np.empty((T, top_k), np.int64)
        load_PE = np.zeros((len(parts), experts))
        by = self.weight_J, np.float32(self.bias), np.float32(LEAST)
        made = [(*by, inclusion_TE[rows], topk_TK[rows], load_PE[number]) for number, rows in enumerate(parts)]
        together(lambda number: weigh(number, made[number]), range(len(parts)))
        return Forecast(load=load_PE.sum(axis=0), topk=topk_TK, inclusion_UE=inclusion_TE)


def fit_stack(opinion_JTE: Opinions, ids_TK: NDArray[np.integer], most: int = 4096) -> Stack:
    """Logistic regression by Newton's method with a little ridge, on at most `most` tokens."""
    opinion_JTE, ids_TK = opinion_JTE[:, :most], ids_TK[:most]
    J = len(opinion_JTE)
    p_JN = np.clip(opinion_JTE.reshape(J, -1).astype(np.float64), LEAST, 1 - LEAST)
    x_JN = np.concatenate([np.log(p_JN / (1 - p_JN)), np.ones((1, p_JN.shape[1]))])
    chosen = np.zeros(opinion_JTE.shape[1:])
    np.put_along_axis(chosen, ids_TK.astype(np.int64), 1.0, axis=1)
    weight = np.zeros(J + 1)
    weight[0] = 1.0
    for _ in range(15):
        told_N = 1 / (1 + np.exp(-(weight @ x_JN)))
        slope = x_JN @ (chosen.ravel() - told_N) - 1e-3 * weight
        curve = (x_JN * (told_N * (1 - told_N))) @ x_JN.T + 1e-3 * np.eye(J + 1)
        step = np.linalg.solve(curve, slope)
        weight += step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
    return Stack(weight_J=weight[:-1].astype(np.float32), bias=float(weight[-1]))
