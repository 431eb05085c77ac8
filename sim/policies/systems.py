"""The named policies: each published system as a composition of parts, so that the difference between two of them can
be read. This is the one place where a policy is registered; the command line derives its choices from it.
"""

from __future__ import annotations

from moesim.sim.dispatch import even_split
from moesim.sim.policies.offloading_systems import OFFLOADING
from moesim.sim.policies.parallel_systems import PARALLEL
from moesim.sim.policies.placements import balanced_placement, contiguous_placement
from moesim.sim.policies.recipe import Recipe
from moesim.sim.policies.rules import Periodic, Replicate

POLICIES: dict[str, Recipe] = {
    "contiguous": Recipe(
        summary="experts in order, no replicas: static expert parallelism", placement=contiguous_placement
    ),
    "balanced": Recipe(summary="experts packed by recorded load, no replicas", placement=balanced_placement),
    "eplb": Recipe(
        summary="every 8 steps replicate and pack by the last 16 steps' load, copies block (DeepSeek EPLB)",
        placement=balanced_placement,
        predictor="window",
        rule=Periodic(interval=8),
        split=even_split,
    ),
    "predictive-layer": Recipe(
        summary="replicate the next layer's hot experts, forecast from this layer's true routing",
        placement=balanced_placement,
        predictor="markov",
        rule=Replicate(next_batch=False),
    ),
    "predictive-buffered": Recipe(
        summary="predictive-layer in two buffers that all layers share, so that replicas take memory once (PROBE)",
        placement=balanced_placement,
        predictor="markov",
        rule=Replicate(next_batch=False),
        double_buffered=True,
        simulated_only=True,
    ),
    "predictive-batch": Recipe(
        summary="replicate the next batch's hot experts, forecast from queued tokens (arXiv 2605.11537, true router)",
        placement=balanced_placement,
        predictor="token-table",
        rule=Replicate(next_batch=True),
    ),
    "oracle-batch": Recipe(
        summary="predictive-batch with a perfect forecast; copies still take their time",
        placement=balanced_placement,
        predictor="oracle",
        rule=Replicate(next_batch=True),
    ),
    "oracle": Recipe(
        summary="perfect forecast and copies that cost nothing: what forecasting can gain, in the simulator only",
        placement=balanced_placement,
        predictor="oracle",
        rule=Replicate(next_batch=False, free=True),
        simulated_only=True,
    ),
    **OFFLOADING,
    **PARALLEL,
}
