"""What a router does, in numbers: skew, balance, activity, drift and overlap, beside the noise that no router escapes.

All load statistics start from loads per window, [W, L, E], so that recordings without tokens have them too. Shape
letters: W windows, L layers, E experts, T tokens, K experts per token. Pure numpy, knows nothing about files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.tokens import TokenTable
from moesim.traces.workload import held_out

Floats = NDArray[np.float64]


def window_loads(table: TokenTable, num_experts: int, window_tokens: int) -> NDArray[np.int64]:
    """[W, L, E] tokens routed to each expert in consecutive windows of `window_tokens` rows; a short rest is left out,
    unless it is all there is. Dropped tokens count: they were routed. Raises InputError for an empty table."""
    if window_tokens < 1:
        raise InputError(f"window tokens must be at least 1, got {window_tokens}")
    T, L = table.topk_ids.shape[:2]
    if not T:
        raise InputError("no tokens to count")
    window = min(window_tokens, T)
    W = T // window
    ids = table.topk_ids[: W * window].astype(np.int64)
    key = (np.arange(W * window) // window)[:, None, None] * (L * num_experts)
    key = key + np.arange(L)[None, :, None] * num_experts + ids
    return np.bincount(key.ravel(), minlength=W * L * num_experts).reshape(W, L, num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """One MoE layer; means over windows, in the units that the names say."""

    layer: int
    max_over_mean: float
    """Load of the busiest expert over the mean load."""
    noise_max_over_mean: float
    """What max_over_mean would be if every expert were equally likely: the floor of this window and E."""
    active_fraction: float
    """Share of the experts with at least one token in a window."""
    entropy_bits: float
    """Of the loads; log2(E) for a uniform router."""
    gini: float
    """0 for equal loads, towards 1 for one expert that takes all."""
    drift: float | None
    """Half the absolute difference of adjacent windows' load shares (0 equal, 1 disjoint); None for one window."""
    balancedness: dict[int, tuple[float, float]]
    """GPUs to (mean of ratios as SGLang, ratio of sums as vLLM) of contiguous placement."""
    top_experts: tuple[int, ...]
    """Experts with the most tokens over all windows, most loaded first."""


def layer_stats(
    loads_WLE: NDArray[np.integer], gpus: tuple[int, ...] = (), top: int = 5, seed: int = 0
) -> list[LayerStats]:
    """Statistics of every layer from its loads per window. Windows without tokens are left out.

    `seed` draws the multinomial windows of the noise floor (200 draws). Raises InputError where a GPU count does not
    suit the experts or nothing was counted.
    """
    E = loads_WLE.shape[2]
    for count in gpus:
        if not 1 <= count <= E:
            raise InputError(f"{count} GPUs for {E} experts: use 1 to {E}")
    out = []
    for layer in range(loads_WLE.shape[1]):
        load_WE = loads_WLE[:, layer][loads_WLE[:, layer].sum(axis=1) > 0].astype(np.float64)
        if not len(load_WE):
            raise InputError(f"layer {layer} has no tokens in any window")
        share_WE = load_WE / load_WE.sum(axis=1, keepdims=True)
        out.append(
            LayerStats(
                layer=layer,
                max_over_mean=float((share_WE.max(axis=1) * E).mean()),
                noise_max_over_mean=noise_floor(float(np.median(load_WE.sum(axis=1))), E, seed),
                active_fraction=float((load_WE > 0).mean()),
                entropy_bits=float(entropy_bits(share_WE).mean()),
                gini=float(gini(load_WE).mean()),
                drift=float(np.abs(np.diff(share_WE, axis=0)).sum(axis=1).mean() / 2) if len(share_WE) > 1 else None,
                balancedness={count: balancedness(load_WE, count) for count in gpus},
                top_experts=tuple(int(e) for e in np.argsort(-load_WE.sum(axis=0), kind="stable")[:top]),
            )
        )
    return out


def noise_floor(tokens: float, experts: int, seed: int = 0, draws: int = 200) -> float:
    """Mean max/mean of `tokens` routed uniformly at random over `experts`: skew below this is chance, not routing."""
    rng = np.random.default_rng(seed)
    counted = rng.multinomial(max(round(tokens), 1), np.full(experts, 1 / experts), size=draws)
    return float((counted.max(axis=1) / counted.mean(axis=1)).mean())


def entropy_bits(share_WE: Floats) -> Floats:
    """[W] Shannon entropy of load shares (rows sum to 1)."""
    logs = np.log2(share_WE, out=np.zeros_like(share_WE), where=share_WE > 0)
    return np.asarray(-(share_WE * logs).sum(axis=1))


def gini(load_WE: Floats) -> Floats:
    """[W] Gini coefficient of the loads of each window."""
    E = load_WE.shape[1]
    ordered = np.sort(load_WE, axis=1)
    weight_E = 2 * np.arange(1, E + 1) - E - 1
    return np.asarray((ordered * weight_E).sum(axis=1) / (E * ordered.sum(axis=1)))


def balancedness(load_WE: Floats, gpus: int) -> tuple[float, float]:
    """(mean over windows of mean/max, sum of means over sum of maxima) of GPU loads under contiguous placement."""
    load_WG = np.stack([part.sum(axis=1) for part in np.array_split(load_WE, gpus, axis=1)], axis=1)
    mean_W, max_W = load_WG.mean(axis=1), load_WG.max(axis=1)
    return float((mean_W / max_W).mean()), float(mean_W.sum() / max_W.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How much one choice says of the next; `chance` is what the same loads would give if choices were independent."""

    layer: int
    adjacent_tokens: float
    """Share of a token's experts that the token before it in the same request also chose."""
    adjacent_chance: float
    next_layer: float | None
    """Accuracy of guessing the next layer's first expert from this one's, by the most frequent follower (fitted on one
    half of the requests, scored on the other); None for the last layer."""
    next_layer_chance: float | None
    """The same, always guessing the next layer's most frequent expert."""


def overlaps(table: TokenTable, num_experts: int) -> list[Overlap]:
    """Adjacent-token and layer-to-layer overlap of every layer. Raises InputError where no two tokens are adjacent."""
    order = np.lexsort((table.position, table.request))
    ids = table.topk_ids[order].astype(np.int64)
    request = table.request[order]
    follows = (request[1:] == request[:-1]) & (np.diff(table.position[order]) == 1)
    if not follows.any():
        raise InputError("no two tokens of a request are adjacent: there is no overlap to measure")
    fit = ~held_out(request)
    out = []
    for layer in range(table.num_layers):
        here, before = ids[1:, layer][follows], ids[:-1, layer][follows]
        same = (here[:, :, None] == before[:, None, :]).any(axis=2).mean()
        share = np.bincount(ids[:, layer].ravel(), minlength=num_experts) / len(ids)
        chance = float((share**2).sum() / ids.shape[2])
        last = layer + 1 == table.num_layers
        ahead = (None, None) if last else _follower_accuracy(ids[:, layer, 0], ids[:, layer + 1, 0], fit, num_experts)
        out.append(
            Overlap(
                layer=layer,
                adjacent_tokens=float(same),
                adjacent_chance=chance,
                next_layer=ahead[0],
                next_layer_chance=ahead[1],
            )
        )
    return out


def _follower_accuracy(
    here_T: NDArray[np.int64], next_T: NDArray[np.int64], fit_T: NDArray[np.bool_], experts: int
) -> tuple[float | None, float | None]:
    if fit_T.all() or not fit_T.any():
        return None, None
    pairs = np.bincount(here_T[fit_T] * experts + next_T[fit_T], minlength=experts**2).reshape(experts, experts)
    favourite = int(pairs.sum(axis=0).argmax())
    follower = np.where(pairs.sum(axis=1) > 0, pairs.argmax(axis=1), favourite)
    scored = ~fit_T
    return float((follower[here_T[scored]] == next_T[scored]).mean()), float((next_T[scored] == favourite).mean())
