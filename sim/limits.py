"""What cannot be simulated because it cannot be: experts that fit nowhere. Shape letters: L MoE layers, E experts."""

from __future__ import annotations

import numpy as np

from moesim.sim.dispatch import Ints
from moesim.sim.profile import HardwareProfile
from moesim.sim.residency import Cluster
from moesim.sim.scenario import Scenario
from moesim.traces import InputError, total_load_LE


def check_fits(scenario: Scenario, cluster: Cluster, profile: HardwareProfile, dtype: str) -> None:
    """Raise InputError where the profile has too few GPUs, no rate for the dtype, or too little memory."""
    stack = scenario.spec.stack(scenario.stack)
    profile.check_gpus(cluster.gpus)
    profile.gpu.matmul_rate(dtype)
    if len(stack.moe_layers) != cluster.layers:
        raise InputError(f"the trace has {cluster.layers} MoE layers, its {stack.name} has {len(stack.moe_layers)}")
    expert = scenario.spec.expert_bytes(dtype)
    need = cluster.gpu_slots * expert
    if need > profile.gpu.memory_bytes:
        most = profile.gpu.memory_bytes // (expert * cluster.layers)
        fewer = f", or at most {most} resident slots a layer and a policy that offloads" if most else ""
        raise InputError(
            f"the expert slots need {need / 2**30:.1f} GiB on each GPU, profile {profile.name} has "
            f"{profile.gpu.memory_bytes / 2**30:.1f} GiB; use more GPUs, fewer extra slots, a smaller dtype{fewer}"
        )


def on_disk(scenario: Scenario, profile: HardwareProfile, dtype: str) -> Ints | None:
    """[L, E] 1 where the host's memory has no room for an expert of an offloaded model, so that it lies on SSD: those
    with the smallest load in the fitted requests. None where the memory holds all or nothing is offloaded. Raises
    InputError where there is no SSD either."""
    c = scenario.cluster
    if c.resident is None or profile.cpu is None:
        return None
    room = profile.cpu.memory_bytes // scenario.spec.expert_bytes(dtype)
    if room >= c.layers * c.experts:
        return None
    if profile.links.storage is None:
        raise InputError(
            f"the experts fit nowhere: {c.layers * c.experts} of them, the host of profile {profile.name} has room for "
            f"{room} and it has no SSD (links.storage)"
        )
    load = total_load_LE(scenario.fit, c.experts).ravel()
    cold = np.ones(load.size, np.int64)
    cold[np.argsort(-load, kind="stable")[:room]] = 0
    return cold.reshape(c.layers, c.experts)
