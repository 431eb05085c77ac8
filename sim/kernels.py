"""Counting for steps of policies that never move an expert, compiled by numba; imported where it is needed only.

Shape letters: T tokens, L MoE layers, E experts, K experts per token, G GPUs.
"""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def route(
    ids_TLK: Any, dropped_TL: Any, rank_T: Any, holder_LE: Any, node_G: Any, load_LE: Any, sent_2LG: Any, got_2LG: Any
) -> None:
    """Add every routed token to the load of its expert and, where the expert lies on another GPU than the token, to
    what its rank sends and the holder gets: [0] inside a node, [1] between nodes. Dropped tokens do not count."""
    T, L, K = ids_TLK.shape
    for layer in range(L):
        for t in range(T):
            if dropped_TL[t, layer]:
                continue
            rank = rank_T[t]
            for k in range(K):
                expert = ids_TLK[t, layer, k]
                load_LE[layer, expert] += 1
                holder = holder_LE[layer, expert]
                if holder != rank:
                    far = int(node_G[holder] != node_G[rank])
                    sent_2LG[far, layer, rank] += 1
                    got_2LG[far, layer, holder] += 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def on_gpus(load_LE: Any, holder_LE: Any, tile: int, load_LG: Any, distinct_LG: Any, rows_LG: Any) -> None:
    """Add up what each GPU computes: tokens, distinct experts that have any, rows in whole tiles."""
    L, E = load_LE.shape
    for layer in range(L):
        for expert in range(E):
            tokens = load_LE[layer, expert]
            if tokens:
                holder = holder_LE[layer, expert]
                load_LG[layer, holder] += tokens
                distinct_LG[layer, holder] += 1
                rows_LG[layer, holder] += (tokens + tile - 1) // tile * tile
