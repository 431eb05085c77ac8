"""Tokens shifted away from the GPU that takes longest, one shift after the other: the step that plans of replicas and
splits that weigh time are made of.

Pure numpy. Shape letters: E experts, G GPUs, C amounts that are tried for a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.sim.rates import Floats, Rates

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """So many tokens of an expert go from the slowest GPU to another."""

    expert: int
    source: int
    target: int
    amount: float
    gain_s: float
    """By how much the slower of the two then ends before the slowest GPU did."""


def seconds_of(tokens_EG: NDArray[Any], rates: Rates, slowdown_G: Floats) -> Floats:
    """[G] how long every GPU takes for its tokens."""
    busy_G = rates.seconds((tokens_EG > 0).sum(axis=0), rates.rows(tokens_EG).sum(axis=0))
    return np.asarray(busy_G * slowdown_G)


def best_shift(
    tokens_EG: NDArray[Any], allowed_EG: Bools, rates: Rates, slowdown_G: Floats, bonus_EG: Floats | None = None
) -> Shift | None:
    """The shift from the slowest GPU that gains most, an expert's tokens going to one GPU where that is allowed; None
    where none gains. Tried are all of its tokens, which saves a read of its weights, what makes both GPUs hold equally
    many, and that in whole tiles. `bonus_EG` multiplies gains. Ties to the lowest expert and GPU."""
    busy_G = seconds_of(tokens_EG, rates, slowdown_G)
    source = int(np.argmax(busy_G))
    here = np.flatnonzero(tokens_EG[:, source] > 0)
    open_XG = allowed_EG[here]
    if not open_XG.any():
        return None
    distinct_G, rows_G, load_G = (tokens_EG > 0).sum(axis=0), rates.rows(tokens_EG).sum(axis=0), tokens_EG.sum(axis=0)
    have_X1, there_XG = tokens_EG[here, source][:, None], tokens_EG[here]
    level_G = (load_G[source] * slowdown_G[source] - load_G * slowdown_G) / (slowdown_G[source] + slowdown_G)
    level_XG = np.minimum(have_X1, np.maximum(level_G, 0.0))
    if np.issubdtype(tokens_EG.dtype, np.integer):
        level_XG = np.floor(level_XG)
    tiles_XG = np.floor(level_XG / rates.tile_rows) * rates.tile_rows
    amount_CXG = np.stack([np.broadcast_to(have_X1, level_XG.shape), level_XG, tiles_XG]).astype(np.float64)

    left = have_X1 - amount_CXG
    after_source = rates.seconds(
        distinct_G[source] - (left <= 0), rows_G[source] - rates.rows(have_X1) + rates.rows(left)
    )
    after_target = rates.seconds(
        distinct_G + (there_XG == 0), rows_G - rates.rows(there_XG) + rates.rows(there_XG + amount_CXG)
    )
    gain_CXG = busy_G[source] - np.maximum(after_source * slowdown_G[source], after_target * slowdown_G)
    gain_CXG = np.where(open_XG & (amount_CXG > 0), gain_CXG, -np.inf)
    gain_CXG[:, :, source] = -np.inf
    weighed = gain_CXG if bonus_EG is None else gain_CXG * bonus_EG[here]
    choice, x, target = np.unravel_index(int(np.argmax(weighed)), weighed.shape)
    gain_s = float(gain_CXG[choice, x, target])
    if gain_s <= 1e-9 * busy_G[source]:
        return None
    amount = float(amount_CXG[choice, x, target])
    return Shift(expert=int(here[x]), source=source, target=int(target), amount=amount, gain_s=gain_s)
