"""Counting for steps of policies that never move an expert, compiled by numba; imported where it is needed only.

Shape letters: S steps of a block, T their tokens, N tokens of the recording, L MoE layers, E experts, K experts per
token, G GPUs, A kinds of layers by the dense layers before them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def place(
    request_T: Any,
    position_T: Any,
    ends_S: Any,
    decode: bool,
    rank_T: Any,
    tokens_SG: Any,
    pairs_SG: Any,
    cached_SG: Any,
) -> None:
    """`traces.assign_ranks` and `cost.rank_tokens` of every step."""
    G = tokens_SG.shape[1]
    begin = 0
    for s in range(len(ends_S)):
        t = begin
        while t < ends_S[s]:
            end = t + 1
            while end < ends_S[s] and request_T[end] == request_T[t]:
                end += 1
            rank = 0
            for g in range(1, G):
                if tokens_SG[s, g] < tokens_SG[s, rank]:
                    rank = g
            rank_T[t:end] = rank
            length, start = end - t, position_T[t]
            tokens_SG[s, rank] += length
            pairs_SG[s, rank] += length * (start + length)
            if decode or start > 0:
                cached_SG[s, rank] += start + length
            t = end
        begin = ends_S[s]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def count(
    ids_NLK: Any,
    dropped_NL: Any,
    rows_T: Any,
    rank_T: Any,
    ends_S: Any,
    holder_LE: Any,
    node_G: Any,
    tile: int,
    expert_s: Any,
    attention_SAG: Any,
    kind_L: Any,
    near_SL: Any,
    far_SL: Any,
    experts_SL: Any,
    busy_SG: Any,
    load_SLG: Any,
    balance_S3: Any,
) -> None:
    """What the layers of every step take: vectors of the busiest sender or receiver inside and between nodes, seconds
    of the slowest GPU's experts (from the table `expert_s` [distinct, tiles]), each GPU's busy seconds, its loads where
    `load_SLG` has room for them, and the sums of mean / max, mean and max of the loads."""
    L, E = holder_LE.shape
    G, K = len(node_G), ids_NLK.shape[2]
    load_E = np.empty(E, np.int64)
    sent_2G, got_2G = np.empty((2, G), np.int64), np.empty((2, G), np.int64)
    load_G, distinct_G, tiles_G = np.empty(G, np.int64), np.empty(G, np.int64), np.empty(G, np.int64)
    begin = 0
    for s in range(len(ends_S)):
        for layer in range(L):
            load_E[:] = 0
            sent_2G[:] = 0
            got_2G[:] = 0
            load_G[:] = 0
            distinct_G[:] = 0
            tiles_G[:] = 0
            for t in range(begin, ends_S[s]):
                row, rank = rows_T[t], rank_T[t]
                if dropped_NL[row, layer]:
                    continue
                for k in range(K):
                    expert = ids_NLK[row, layer, k]
                    load_E[expert] += 1
                    holder = holder_LE[layer, expert]
                    if holder != rank:
                        far = int(node_G[holder] != node_G[rank])
                        sent_2G[far, rank] += 1
                        got_2G[far, holder] += 1
            for expert in range(E):
                tokens = load_E[expert]
                if tokens:
                    holder = holder_LE[layer, expert]
                    load_G[holder] += tokens
                    distinct_G[holder] += 1
                    tiles_G[holder] += (tokens + tile - 1) // tile
            near, far, slowest, total, peak = 0, 0, 0.0, 0, 0
            for g in range(G):
                near = max(near, sent_2G[0, g], got_2G[0, g])
                far = max(far, sent_2G[1, g], got_2G[1, g])
                seconds = expert_s[distinct_G[g], tiles_G[g]]
                slowest = max(slowest, seconds)
                total += load_G[g]
                peak = max(peak, load_G[g])
                busy_SG[s, g] += attention_SAG[s, kind_L[layer], g]
                busy_SG[s, g] += seconds
            near_SL[s, layer], far_SL[s, layer], experts_SL[s, layer] = near, far, slowest
            mean = total / G
            balance_S3[s, 0] += mean / peak if peak else 1.0
            balance_S3[s, 1] += mean
            balance_S3[s, 2] += peak
            if len(load_SLG):
                load_SLG[s, layer] = load_G
        begin = ends_S[s]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def sums(attention_SL: Any, exchange_SL: Any, experts_SL: Any, decide_s: float, sums_S4: Any) -> None:
    """Seconds of attention, decisions, communication and experts of every step, added in the order in which they pass,
    so that they are the same to the bit as elsewhere."""
    for s in range(len(sums_S4)):
        sums_S4[s, 1] = decide_s
        for layer in range(attention_SL.shape[1]):
            sums_S4[s, 0] += attention_SL[s, layer]
            sums_S4[s, 1] += decide_s
            sums_S4[s, 2] += exchange_SL[s, layer]
            sums_S4[s, 2] += exchange_SL[s, layer]
            sums_S4[s, 3] += experts_SL[s, layer]
