"""Placements that keep together what belongs together: experts that follow each other, that one token chooses, or that
one group of the router holds. Shape letters: L layers, E experts, G GPUs, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.sim.affinity import Affinity, arranged, companions, followers
from moesim.sim.planner import contiguous, pack
from moesim.sim.replication import nodes_of_groups
from moesim.sim.residency import EMPTY, Cluster
from moesim.traces import InputError, LoadTable, TokenTable, total_load_LE

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
HEAVIER = 1.05
"""How much more than the busiest GPU (or node) of the balanced placement one may have, for the sake of affinity."""
FOLLOWING = 0.1
"""What it counts in a node that experts follow each other, beside that they are chosen together: tokens return to the
GPU of their request after every layer, so only the latter saves sends."""


def affinity_placement(cluster: Cluster, fit_on: TokenTable | LoadTable) -> Ids:
    """Experts that follow each other from layer to layer on one GPU, equally many on each, whatever their load.

    Source: ExFlow. Raises InputError where the recording has loads only.
    """
    table = _tokens(fit_on, "affinity")
    load_LE = total_load_LE(table, cluster.experts).astype(np.float64)
    one = _bins(contiguous(cluster.experts, cluster.gpus, cluster.home_slots), cluster.experts)
    wanted = Affinity(
        between_LEE=followers(table, cluster.experts),
        within_LEE=None,
        load_LE=load_LE,
        bins=cluster.gpus,
        slots=cluster.home_slots,
        most_L=np.full(cluster.layers, np.inf),
    )
    return _placed(cluster, arranged(wanted, np.tile(one, (cluster.layers, 1))))


def balanced_affinity_placement(cluster: Cluster, fit_on: TokenTable | LoadTable) -> Ids:
    """The same where no GPU may have over HEAVIER times the load of the busiest one of the balanced placement.

    Source: MoETuner. Raises InputError where the recording has loads only.
    """
    table = _tokens(fit_on, "affinity-balanced")
    start_LE, most_L, load_LE = _level(table, cluster.experts, cluster.gpus, cluster.home_slots)
    wanted = Affinity(
        between_LEE=followers(table, cluster.experts),
        within_LEE=None,
        load_LE=load_LE,
        bins=cluster.gpus,
        slots=cluster.home_slots,
        most_L=most_L,
    )
    return _placed(cluster, arranged(wanted, start_LE))


def node_placement(cluster: Cluster, fit_on: TokenTable | LoadTable) -> Ids:
    """Experts that one token chooses, and that follow each other, in one node, within HEAVIER times the balanced load
    of nodes; packed by load onto the GPUs of their node. With one node: the balanced placement. What is saved shows
    where a token is sent once to a node. Raises InputError where the recording has loads only."""
    table = _tokens(fit_on, "node-aware")
    nodes = cluster.nodes
    size = cluster.gpus // nodes
    start_LE, most_L, load_LE = _level(table, cluster.experts, nodes, size * cluster.home_slots)
    wanted = Affinity(
        between_LEE=FOLLOWING * followers(table, cluster.experts),
        within_LEE=companions(table, cluster.experts),
        load_LE=load_LE,
        bins=nodes,
        slots=size * cluster.home_slots,
        most_L=most_L,
    )
    return _within_nodes(cluster, load_LE, arranged(wanted, start_LE) if nodes > 1 else start_LE, nodes)


def group_placement(cluster: Cluster, fit_on: TokenTable | LoadTable) -> Ids:
    """Groups of neighbouring experts, as the router limits itself to them, in one node, equally many in each, packed by
    load; then packed by load onto the GPUs of their node. The balanced placement where nodes do not divide the groups.

    Source: DeepSeek-V3 (arXiv 2412.19437), whose routing sends a token to few nodes for this reason.
    """
    load_LE = total_load_LE(fit_on, cluster.experts).astype(np.float64)
    found = [nodes_of_groups(load_E, cluster.nodes, cluster.groups) for load_E in load_LE]
    node_LE = [node_E for node_E in found if node_E is not None]
    if len(node_LE) < len(found):
        return _within_nodes(cluster, load_LE, np.zeros(load_LE.shape, np.int64), 1)
    return _within_nodes(cluster, load_LE, np.stack(node_LE), cluster.nodes)


def _tokens(fit_on: TokenTable | LoadTable, name: str) -> TokenTable:
    if isinstance(fit_on, LoadTable):
        raise InputError(f"placement {name!r} learns from what every token chose, and this recording has loads only")
    return fit_on


def _level(table: TokenTable, experts: int, bins: int, slots: int) -> tuple[Ints, Floats, Floats]:
    """([L, E] bins packed by load, [L] the load that a bin may have, [L, E] loads)."""
    load_LE = total_load_LE(table, experts).astype(np.float64)
    start_LE = np.stack([_bins(pack(load_E, np.arange(experts), bins, slots), experts) for load_E in load_LE])
    most_L = [HEAVIER * np.bincount(b, load, bins).max() for b, load in zip(start_LE, load_LE, strict=True)]
    return start_LE, np.array(most_L), load_LE


def _bins(placed_BS: Ids, experts: int) -> Ints:
    """[E] the row of `placed_BS` that holds each expert."""
    row, slot = np.nonzero(placed_BS != EMPTY)
    bin_E = np.empty(experts, np.int64)
    bin_E[placed_BS[row, slot]] = row
    return bin_E


def _placed(cluster: Cluster, gpu_LE: Ints) -> Ids:
    """[L, G, layer_slots] experts in order of their number on their GPUs."""
    placed = np.full((cluster.layers, cluster.gpus, cluster.layer_slots), EMPTY, np.int32)
    for layer, gpu_E in enumerate(gpu_LE):
        for gpu in range(cluster.gpus):
            mine = np.flatnonzero(gpu_E == gpu)
            placed[layer, gpu, : len(mine)] = mine
    return placed


def _within_nodes(cluster: Cluster, load_LE: Floats, node_LE: Ints, nodes: int) -> Ids:
    """[L, G, layer_slots] the experts of every node packed by load onto its GPUs."""
    size = cluster.gpus // nodes
    placed = np.full((cluster.layers, cluster.gpus, cluster.layer_slots), EMPTY, np.int32)
    for layer, (load_E, node_E) in enumerate(zip(load_LE, node_LE, strict=True)):
        for node in range(nodes):
            mine = np.flatnonzero(node_E == node)
            gpus = slice(node * size, (node + 1) * size)
            placed[layer, gpus, : cluster.home_slots] = pack(load_E[mine], mine, size, cluster.home_slots)
    return placed
