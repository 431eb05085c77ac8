"""Counting for steps of policies that never move an expert, compiled by numba; imported where it is needed only.

Shape letters: S steps of a block, T their tokens, N tokens of the recording, L MoE layers, E experts, K experts per
token, G GPUs, A kinds of layers by the dense layers before them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.traces.compiled import compiled


@compiled()
def place(
    request_T: Any,
    position_T: Any,
    ends_S: Any,
    decode: bool,
    rank_T: Any,
    last_T: Any,
    tokens_SG: Any,
    pairs_SG: Any,
    cached_SG: Any,
) -> None:
    """`traces.assign_ranks` and `cost.rank_tokens` of every step; and where each token's request ends."""
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
            last_T[t:end] = end
            length, start = end - t, position_T[t]
            tokens_SG[s, rank] += length
            pairs_SG[s, rank] += length * (start + length)
            if decode or start > 0:
                cached_SG[s, rank] += start + length
            t = end
        begin = ends_S[s]


@compiled()
def count(
    ids_NLK: Any,
    dropped_NL: Any,
    drops: bool,
    rows_T: Any,
    rank_T: Any,
    last_T: Any,
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
    """What the layers of every step take (`drops`: some token is over capacity): vectors of the busiest sender or
    receiver inside and between nodes, seconds of the slowest GPU's experts (from the table `expert_s` [distinct,
    tiles]), each GPU's busy seconds, its loads where `load_SLG` has room for them, and the sums of mean / max, mean and
    max of the loads."""
    L, E = holder_LE.shape
    G, N = len(node_G), node_G[-1] + 1
    load_NE = np.empty((N, E), np.int64)
    place_N = np.empty(N, np.int64)
    sums_7G = np.empty((7, G), np.int64)
    begin = 0
    for s in range(len(ends_S)):
        nodes = _nodes(rank_T[begin : ends_S[s]], node_G, place_N)
        for layer in range(L):
            load_NE[:nodes] = 0
            sums_7G[:] = 0
            _route(
                ids_NLK, dropped_NL, drops, rows_T, rank_T, last_T, begin, ends_S[s], layer, holder_LE[layer], node_G,
                place_N, load_NE, sums_7G,
            )  # fmt: skip
            _on_gpus(load_NE[:nodes], holder_LE[layer], node_G, place_N, tile, sums_7G)
            _, local_G, sent_G, got_G, load_G, distinct_G, tiles_G = sums_7G
            near, far, slowest, total, peak = 0, 0, 0.0, 0, 0
            for g in range(G):
                near = max(near, sent_G[g] - local_G[g], got_G[g] - local_G[g])
                far = max(far, sums_7G[0, g] - sent_G[g], load_G[g] - got_G[g])
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


@compiled()
def _nodes(rank_T: Any, node_G: Any, place_N: Any) -> int:
    """Number the nodes that have tokens, -1 the others; returns how many there are."""
    place_N[:] = -1
    nodes = 0
    for rank in rank_T:
        if place_N[node_G[rank]] < 0:
            place_N[node_G[rank]] = nodes
            nodes += 1
    return nodes


@compiled()
def _route(
    ids_NLK: Any,
    dropped_NL: Any,
    drops: bool,
    rows_T: Any,
    rank_T: Any,
    last_T: Any,
    begin: int,
    until: int,
    layer: int,
    holder_E: Any,
    node_G: Any,
    place_N: Any,
    load_NE: Any,
    sums_7G: Any,
) -> None:
    """Count a layer's routed tokens by expert and by the node they are on; and of each rank all of them, those whose
    expert is there, and those whose expert is in its node."""
    K, many = ids_NLK.shape[2], len(place_N) > 1
    t = begin
    while t < until:  # a request after the other: its tokens are on one rank
        rank, end = rank_T[t], last_T[t]
        node, pairs, local, near = node_G[rank], (end - t) * K, 0, 0
        load_E = load_NE[place_N[node]]
        for u in range(t, end):
            row = rows_T[u]
            if drops and dropped_NL[row, layer]:
                pairs -= K
                continue
            for k in range(K):
                expert = ids_NLK[row, layer, k]
                load_E[expert] += 1
                holder = holder_E[expert]
                if holder == rank:
                    local += 1
                if many and node_G[holder] == node:
                    near += 1
        sums_7G[0, rank] += pairs
        sums_7G[1, rank] += local
        sums_7G[2, rank] += near if many else pairs
        t = end


@compiled()
def _on_gpus(load_NE: Any, holder_E: Any, node_G: Any, place_N: Any, tile: int, sums_7G: Any) -> None:
    """Add up by GPU what its experts got from its own node, all they got, how many have tokens, and their tiles."""
    for expert in range(len(holder_E)):
        tokens = 0
        for place in range(len(load_NE)):
            tokens += load_NE[place, expert]
        if tokens:
            holder = holder_E[expert]
            place = place_N[node_G[holder]]
            if place >= 0:
                sums_7G[3, holder] += load_NE[place, expert]
            sums_7G[4, holder] += tokens
            sums_7G[5, holder] += 1
            sums_7G[6, holder] += (tokens + tile - 1) // tile


@compiled()
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
