"""Loops over routed tokens that numpy has no fast form for, compiled by numba. Imported where they are needed only.

Shape letters: T tokens, L MoE layers, E experts, K experts per token, C columns, G GPU counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.traces.compiled import compiled

EPSILON = 1e-5
"""SGLang's, in both parts of its ratio."""
VALUES = 5
"""Columns of `summarise_window` before the GPU counts: max/mean, active, entropy, Gini, drift."""


@compiled()
def count(ids_TLK: Any, load_LE: Any) -> None:
    """Add the load of tokens to `load_LE`."""
    T, L, K = ids_TLK.shape
    for t in range(T):
        for layer in range(L):
            for k in range(K):
                load_LE[layer, ids_TLK[t, layer, k]] += 1


@compiled()
def follow(ids_TLK: Any, follows_T: Any, half_T: Any, last_LE: Any, base: int, same_L: Any, pairs_2LEE: Any) -> int:
    """Overlap of rows that stand in order of request and position; returns the number of rows that follow one.

    `follows_T` says whether a row's token comes right after the row before it. `last_LE` remembers the last row (from
    `base` on) that chose each expert. `same_L` counts choices that the token before made, too; `pairs_2LEE` counts
    pairs of first choices in adjacent layers, for each half (`half_T`) of the requests.
    """
    T, L, K = ids_TLK.shape
    followed = 0
    for t in range(T):
        followed += follows_T[t]
        # No row has a negative number, so what does not follow overlaps with nothing.
        before = base + t - 1 if follows_T[t] else -1
        for layer in range(L):
            same = 0
            for k in range(K):
                expert = ids_TLK[t, layer, k]
                same += last_LE[layer, expert] == before
                last_LE[layer, expert] = base + t
            same_L[layer] += same
        for layer in range(L - 1):
            pairs_2LEE[half_T[t], layer, ids_TLK[t, layer, 0], ids_TLK[t, layer + 1, 0]] += 1
    return followed


@compiled()
def summarise_window(load_LE: Any, before_LE: Any, log_table: Any, bounds_GC: Any, out_LC: Any) -> None:
    """Write the statistics of one window, [L, VALUES + 3 G]: see VALUES, then for each GPU count SGLang's balancedness,
    the mean and the maximum of the GPU loads. NaN where a layer has no tokens, or for drift the window before has none.

    `log_table[n]` is n log2 n for small n. `bounds_GC` are the first experts of the GPUs, padded with E.
    """
    L, E = load_LE.shape
    for layer in range(L):
        total, most, active, logs = 0, 0, 0, 0.0
        for e in range(E):
            n = load_LE[layer, e]
            total += n
            most = max(most, n)
            active += n > 0
            if n > 0:
                logs += log_table[n] if n < len(log_table) else n * np.log2(n)
        if total == 0:
            out_LC[layer, :] = np.nan
            continue
        out_LC[layer, 0] = most * E / total
        out_LC[layer, 1] = active / E
        out_LC[layer, 2] = np.log2(total) - logs / total
        out_LC[layer, 3] = _gini(load_LE[layer], most, total)
        before = before_LE[layer].sum()
        moved = 0.0
        for e in range(E):
            moved += abs(load_LE[layer, e] / total - before_LE[layer, e] / before) if before > 0 else np.nan
        out_LC[layer, 4] = moved / 2
        for g in range(len(bounds_GC)):
            gpus, busiest = 0, 0
            while gpus + 1 < bounds_GC.shape[1] and bounds_GC[g, gpus] < E:
                busiest = max(busiest, load_LE[layer, bounds_GC[g, gpus] : bounds_GC[g, gpus + 1]].sum())
                gpus += 1
            mean = total / gpus
            out_LC[layer, VALUES + 3 * g] = (mean + EPSILON) / (busiest + EPSILON)
            out_LC[layer, VALUES + 3 * g + 1] = mean
            out_LC[layer, VALUES + 3 * g + 2] = busiest


@compiled()
def _gini(load_E: Any, most: int, total: int) -> float:
    """Sum of (2 rank - E - 1) x load over E x total. Small loads are sorted by counting them."""
    E = len(load_E)
    weighted = 0.0
    if most <= 8 * E:
        having = np.zeros(most + 1, np.int64)
        for n in load_E:
            having[n] += 1
        below = 0
        for n in range(most + 1):
            # The ranks below + 1 .. below + having share the load n; their sum is an arithmetic series.
            ranks = having[n] * below + having[n] * (having[n] + 1) / 2
            weighted += n * (2 * ranks - having[n] * (E + 1))
            below += having[n]
    else:
        ordered = np.sort(load_E)
        for rank in range(E):
            weighted += ordered[rank] * (2.0 * (rank + 1) - E - 1)
    return weighted / (E * total)
