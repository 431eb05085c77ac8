"""What the ridge does for every token, compiled by numba; imported where it is needed only.

One thread: a decision is over before a second one is awake on a busy machine. Shape letters: T tokens, E experts, K
experts per token, P routed layers, C numbers that describe a chosen expert.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def linear(ids_TK: Any, values_TKC: Any, own_T: Any, map_XE: Any, score_TE: Any) -> None:
    """score[t] += sum over experts and numbers of values[t, k, c] * map[C * ids[t, k] + c], and own[t] * map[C * E]
    where the layer has a number of its own (map has C * E + 1 rows then)."""
    T, K = ids_TK.shape
    C, E = values_TKC.shape[2], score_TE.shape[1]
    own = map_XE.shape[0] > C * E
    for t in range(T):
        row_E = score_TE[t]
        for k in range(K):
            first = C * ids_TK[t, k]
            if C == 3:  # the usual case, three rows at a time
                a, b, c = values_TKC[t, k, 0], values_TKC[t, k, 1], values_TKC[t, k, 2]
                for e in range(E):
                    row_E[e] += a * map_XE[first, e] + b * map_XE[first + 1, e] + c * map_XE[first + 2, e]
            else:
                for i in range(C):
                    for e in range(E):
                        row_E[e] += values_TKC[t, k, i] * map_XE[first + i, e]
        if own:
            for e in range(E):
                row_E[e] += own_T[t] * map_XE[C * E, e]


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def included(p_TE: Any, top_TK: Any) -> None:
    """Scale each row to sum to K with none above 1, in place; and its likeliest experts, highest first."""
    for t in range(len(p_TE)):
        _scale(p_TE[t], top_TK.shape[1])
        _likeliest(p_TE[t], top_TK[t])


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _scale(row_E: Any, top: int) -> None:
    """Those that reach 1 stay there, the others share what is left; again until no other one reaches it."""
    full = 0
    for _ in range(top + 1):
        free = np.float32(0)
        for value in row_E:
            free += value if value < 1 else np.float32(0)
        scale = np.float32(top - full) / max(free, np.float32(1e-30))
        over = 0
        for e in range(len(row_E)):
            value = row_E[e]
            value = min(value * scale if value < 1 else value, np.float32(1))
            over += value >= 1
            row_E[e] = value
        if over == full:
            break
        full = over


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _likeliest(row_E: Any, top_K: Any) -> None:
    """Insertion into a short sorted list; ties stay with the lower id."""
    K, filled = len(top_K), 0
    for e in range(len(row_E)):
        if filled == K and row_E[e] <= row_E[top_K[K - 1]]:
            continue
        at = min(filled, K - 1)
        while at > 0 and row_E[top_K[at - 1]] < row_E[e]:
            top_K[at] = top_K[at - 1]
            at -= 1
        top_K[at] = e
        filled = min(filled + 1, K)
