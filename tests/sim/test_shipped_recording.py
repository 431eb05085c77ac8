"""Every policy for too few slots on the recording that the repository ships, at three budgets: hits pinned."""

from pathlib import Path

import pytest
from nodes import node, quick_policy

from moesim.sim.engine import simulate
from moesim.sim.policies import offloading, recipe
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload
from moesim.traces.store import Trace

RECORDING = Path(__file__).parents[2] / "models/switch-mini/recording.moetrace"
BUDGETS = (4, 8, 16)
"""Slots a layer, of 32 experts."""
NEEDS = {"router": 252, "predicted": 160}
"""By whose choice is executed. A forecast that knows nothing of the step chooses one expert a layer."""

GOLDEN = {
    "on-demand": (133, 193, 213),
    "on-demand-cpu": (133, 193, 213),
    "fiddler": (133, 193, 213),
    "lfu": (137, 189, 213),
    "arc": (135, 194, 213),
    "belady": (167, 207, 227),
    "prefetch-layer": (77, 138, 183),
    "prefetch-ridge": (100, 144, 195),
    "hobbit": (150, 206, 219),
    "hobbit-exact": (147, 207, 220),
    "fate": (142, 193, 231),
    "sp-moe": (106, 199, 217),
    "moe-infinity": (69, 147, 183),
    "pre-gated": (144, 213, 226),
    "diff-moe": (83, 164, 213),
    "expertflow": (78, 138, 183),
    "sida": (160, 160, 160),
    "oracle-prefetch": (252, 252, 252),
}
"""Hits of each budget. Forty decode steps of two requests; nets by Markov's forecasts."""


@pytest.fixture(scope="module")
def scenes():
    trace = Trace.open(RECORDING)
    return [
        make_scenario(
            trace.spec,
            trace.table("decoder"),
            phase=Phase.DECODE,
            gpus=1,
            workload=Workload(batch=2, unit="requests"),
            resident=resident,
            max_steps=40,
            request_texts=trace.request_texts,
            gates=trace.gates("decoder"),
        )
        for resident in BUDGETS
    ]


@pytest.mark.parametrize("name", offloading())
def test_hits_at_every_budget(scenes, name):
    caches = [simulate(made, quick_policy(name, made), node(gpus=1)).totals.cache for made in scenes]
    assert {sum(cache.needs_L) for cache in caches} == {NEEDS[recipe(name).routing]}
    assert tuple(sum(cache.hits_L) for cache in caches) == GOLDEN[name]


def test_the_recording_is_whole():
    assert len(list(Trace.open(RECORDING).verify())) == 2
