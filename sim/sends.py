"""What an all-to-all carries between GPUs, and how often a token's hidden vector is sent (execution.py, `Send`).

Shape letters: T tokens, E experts, G GPUs, K experts per token, N GPUs that share a token's attention. Pure numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.sim.dispatch import Ints
from moesim.sim.execution import Send
from moesim.sim.residency import EMPTY


def vectors(
    send_GEG: Ints,
    ids_TK: NDArray[np.integer],
    dropped_T: NDArray[np.bool_],
    rank_T: Ints,
    *,
    how: Send,
    shared: int,
    node_size: int,
) -> Ints:
    """[G_from, G_to] hidden vectors that cross a link on the way to the experts; the way back is the transposed.

    `send_GEG`: tokens of each rank for each replica; with `shared` GPUs a group, ranks are the groups' first GPUs, the
    group's GPU of the target's number sends, and what stays in the group is not sent. Which of a rank's tokens goes to
    which replica follows the order of the tokens and of the GPUs.
    """
    G = len(send_GEG)
    if how == "per-expert":
        needed_GG = send_GEG.sum(axis=1)
        return _from_group(needed_GG, shared)
    token_X, gpu_X = _targets(send_GEG, ids_TK, dropped_T, rank_T)
    pair_X = np.unique(token_X * G + gpu_X)
    token_X, gpu_X = pair_X // G, pair_X % G
    if how == "per-gpu":
        return _from_group(_count(rank_T[token_X], gpu_X, G), shared)
    own_X = rank_T[token_X] // node_size == gpu_X // node_size
    near_GG = _from_group(_count(rank_T[token_X[own_X]], gpu_X[own_X], G), shared)
    token_X, gpu_X = token_X[~own_X], gpu_X[~own_X]
    # Once over the network to the GPU of the same number in its node, which hands it on.
    first = rank_T[token_X] % node_size
    relay_X = gpu_X // node_size * node_size + first
    hop_X = np.unique(token_X * G + relay_X)
    far_GG = _count(rank_T[hop_X // G], hop_X % G, G)
    hand_GG = _count(relay_X, gpu_X, G)
    return near_GG + far_GG + hand_GG


def _count(from_X: Ints, to_X: Ints, G: int) -> Ints:
    count = np.bincount(from_X * G + to_X, minlength=G * G).reshape(G, G)
    np.fill_diagonal(count, 0)
    return np.asarray(count)


def _from_group(needed_GG: Ints, shared: int) -> Ints:
    """Sends of groups' first GPUs, spread over the groups; what a group has itself is not sent."""
    if shared == 1:
        return needed_GG
    G = len(needed_GG)
    sends = np.zeros((G, G), np.int64)
    to = np.arange(G)
    for leader in range(0, G, shared):
        outside = to // shared != leader // shared
        sends[leader + to[outside] % shared, to[outside]] += needed_GG[leader, outside]
    return sends


def _targets(
    send_GEG: Ints, ids_TK: NDArray[np.integer], dropped_T: NDArray[np.bool_], rank_T: Ints
) -> tuple[Ints, Ints]:
    """(token, GPU) of every routed pair that is computed on a GPU."""
    G, E, _ = send_GEG.shape
    K = ids_TK.shape[1]
    key_X = (rank_T[:, None] * E + ids_TK).ravel()
    kept = np.flatnonzero(np.repeat(~dropped_T, K) & (ids_TK.ravel() != EMPTY))
    order = kept[np.argsort(key_X[kept], kind="stable")]
    rows = send_GEG.reshape(G * E, G)
    sent, wanted = rows.sum(axis=1), np.bincount(key_X[order], minlength=G * E)
    # Pairs beyond what is sent (nobody holds their expert, or the host computes them) are the last of their group.
    place = np.arange(len(order)) - np.repeat(np.cumsum(wanted) - wanted, wanted)
    order = order[place < np.repeat(sent, wanted)]
    full = np.flatnonzero(rows)
    return order // K, np.repeat(full % G, rows.ravel()[full])
