"""Steps of policies that never move an expert: all layers at once, so that large clusters are simulated fast.

Gives the same numbers, to the bit, as deciding and dispatching layer by layer (tests/sim/test_static.py); the engine
takes this way where nobody wants a log. Shape letters: L MoE layers, E experts, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.sim.cost import Seconds, attention_seconds, exchange_seconds, expert_seconds_of, rank_tokens
from moesim.sim.dispatch import Ints
from moesim.sim.policies import Never, Policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.scenario import Scenario, StepInput


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticWork:
    """What the phases of one step take."""

    attention_LG: Seconds
    experts_LG: Seconds
    exchange_L: list[float]
    """[L] one all-to-all."""
    load_LG: Ints
    """[L, G] tokens that each GPU computes."""


class StaticSteps:
    """Work of the steps of a scenario under a placement in which every expert lies on one GPU."""

    def __init__(self, scenario: Scenario, usable_LEG: NDArray[np.bool_], profile: HardwareProfile, dtype: str) -> None:
        self._scenario, self._profile, self._dtype = scenario, profile, dtype
        self._holder_LE = usable_LEG.argmax(axis=2)
        self._node_G = np.arange(scenario.cluster.gpus) // profile.node_size

    def of(self, step: StepInput) -> StaticWork:
        """Count one step."""
        from moesim.sim.kernels import on_gpus, route  # compiled: only who runs a static policy pays for it

        c, spec, gpu = self._scenario.cluster, self._scenario.spec, self._profile.gpu
        load_LE = np.zeros((c.layers, c.experts), np.int64)
        sent_2LG, got_2LG = np.zeros((2, 2, c.layers, c.gpus), np.int64)
        load_LG, distinct_LG, rows_LG = np.zeros((3, c.layers, c.gpus), np.int64)
        ids = np.ascontiguousarray(step.ids)
        route(ids, step.dropped, step.rank, self._holder_LE, self._node_G, load_LE, sent_2LG, got_2LG)
        on_gpus(load_LE, self._holder_LE, gpu.tile_rows, load_LG, distinct_LG, rows_LG)
        near_L, far_L = np.maximum(sent_2LG.max(axis=2), got_2LG.max(axis=2))
        ranks = rank_tokens(step.tokens, step.rank, c.gpus, self._scenario.phase)
        return StaticWork(
            attention_LG=attention_seconds(ranks, spec.stack(self._scenario.stack), gpu, spec, self._dtype),
            experts_LG=expert_seconds_of(distinct_LG, rows_LG, gpu, spec, self._dtype),
            exchange_L=exchange_seconds(near_L, far_L, c.gpus, self._profile, spec, self._dtype).tolist(),
            load_LG=load_LG,
        )


def is_static(policy: Policy, usable_LEG: NDArray[np.bool_]) -> bool:
    """Whether the policy never moves an expert and begins with one copy of each."""
    never = isinstance(policy.recipe.rule, Never) and policy.predictor is None
    return never and bool((usable_LEG.sum(axis=2) == 1).all())
