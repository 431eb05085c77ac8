"""Placements: where every expert lies before the first step. Shape letters: L layers, E experts, G GPUs, S slots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moesim.sim.eviction import shallow_layers
from moesim.sim.planner import contiguous, pack
from moesim.sim.policies.together import (
    affinity_placement,
    balanced_affinity_placement,
    group_placement,
    node_placement,
)
from moesim.sim.residency import EMPTY, Cluster
from moesim.traces import LoadTable, TokenTable, total_load_LE

Placement = Callable[[Cluster, TokenTable | LoadTable], NDArray[np.int32]]
"""(cluster, fitted requests) -> experts [L, G, layer_slots], EMPTY in the replica slots."""


def contiguous_placement(cluster: Cluster, _fit_on: TokenTable | LoadTable) -> NDArray[np.int32]:
    """Experts in order of their number, whatever their load."""
    one = contiguous(cluster.experts, cluster.gpus, cluster.layer_slots)
    return np.broadcast_to(one, (cluster.layers, *one.shape))


def balanced_placement(cluster: Cluster, fit_on: TokenTable | LoadTable) -> NDArray[np.int32]:
    """Experts packed by the load of the fitted requests, each once."""
    placed = np.full((cluster.layers, cluster.gpus, cluster.layer_slots), EMPTY, np.int32)
    for layer, load_E in enumerate(total_load_LE(fit_on, cluster.experts)):
        placed[layer, :, : cluster.home_slots] = pack(
            load_E.astype(float), np.arange(cluster.experts), cluster.gpus, cluster.home_slots
        )
    return placed


def resident_placement(cluster: Cluster, fit_on: TokenTable | LoadTable) -> NDArray[np.int32]:
    """On each GPU those of its experts that had the largest load, as many as there are slots."""
    placed = np.full((cluster.layers, cluster.gpus, cluster.layer_slots), EMPTY, np.int32)
    for layer, load_E in enumerate(total_load_LE(fit_on, cluster.experts)):
        for gpu, hottest in enumerate(_hottest(load_E, cluster, cluster.layer_slots)):
            placed[layer, gpu, : len(hottest)] = hottest
    return placed


def shallow_placement(cluster: Cluster, fit_on: TokenTable | LoadTable) -> NDArray[np.int32]:
    """[L, G, any] all experts of the first layers (eviction.shallow_layers), and in equal parts of the slots that are
    left the hottest of the others: for slots that all layers share."""
    shallow = shallow_layers(cluster)
    most = -(-cluster.experts // cluster.gpus)
    whole = np.full((cluster.layers, cluster.gpus, most), EMPTY, np.int32)
    left = cluster.gpu_slots - shallow * most
    for layer, load_E in enumerate(total_load_LE(fit_on, cluster.experts)):
        deep = cluster.layers - shallow
        room = most if layer < shallow else left // deep + (layer - shallow < left % deep)
        for gpu, hottest in enumerate(_hottest(load_E, cluster, room)):
            whole[layer, gpu, : len(hottest)] = hottest
    return whole


def _hottest(load_E: NDArray[np.int64], cluster: Cluster, room: int) -> list[NDArray[np.intp]]:
    """Per GPU those of its experts that had the largest load, hottest first, at most `room`."""
    order = np.argsort(-load_E, kind="stable")
    return [order[cluster.home_E[order] == gpu][:room] for gpu in range(cluster.gpus)]


PLACEMENTS: dict[str, Placement] = {
    "contiguous": contiguous_placement,
    "balanced": balanced_placement,
    "resident": resident_placement,
    "shallow": shallow_placement,
    "affinity": affinity_placement,
    "affinity-balanced": balanced_affinity_placement,
    "node-aware": node_placement,
    "group-limited": group_placement,
}
"""By the name that a policy file gives them."""
OF_TOKENS: tuple[Placement, ...] = (affinity_placement, balanced_affinity_placement, node_placement)
"""Those that learn from what every token chose."""
