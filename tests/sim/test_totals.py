"""Sums and quantiles that do not grow; memory of a run that does not grow with its steps."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import node, scripted, two_layers

from helpers import make_spec, make_table
from moesim.sim import totals as module
from moesim.sim.engine import Machine, simulate
from moesim.sim.policies import make_policy
from moesim.sim.residency import Transfer
from moesim.sim.scenario import make_scenario
from moesim.sim.totals import Quantiles, Totals
from moesim.traces import InputError, Phase, Workload


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=60), percents=st.lists(st.floats(0, 100), max_size=5))
@settings(max_examples=150, deadline=None)
def test_few_values_give_the_percentiles_of_numpy(values, percents):
    kept = Quantiles()
    for value in values:
        kept.add(value)
    assert kept.percentiles(percents) == pytest.approx([np.percentile(values, p) for p in percents], rel=1e-12)


@given(seed=st.integers(0, 999), zeros=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_many_values_give_them_to_a_tenth_of_a_percent(seed, zeros):
    rng = np.random.default_rng(seed)
    values = rng.permutation(np.append(rng.lognormal(0, 2, 3000), np.zeros(zeros))).tolist()
    kept = Quantiles()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXACT", 100)
        for value in values:
            kept.add(value)
    assert len(kept) == len(values) and not kept.values
    low, high = (np.percentile(values, [5, 50, 95, 99], method=m) for m in ("lower", "higher"))
    found = kept.percentiles([5, 50, 95, 99])
    assert all(a * 0.999 - 1e-12 <= f <= b * 1.001 + 1e-12 for a, f, b in zip(low, found, high, strict=True))
    assert len(kept.bins) < 20_000


def test_totals_come_back_from_json():
    totals = Totals()
    for step in simulate(two_layers(steps=3), scripted(two_layers(steps=3), {}), node()).steps:
        totals.add(step)
    assert Totals.from_dict(totals.to_dict()) == totals
    with pytest.raises(InputError, match="damaged"):
        Totals.from_dict({**totals.to_dict(), "steps": 0})
    with pytest.raises(InputError, match="damaged"):
        Totals.from_dict({k: v for k, v in totals.to_dict().items() if k != "busy_s"})


@pytest.mark.parametrize("policy", ["contiguous", "eplb", "predictive-layer"])
def test_memory_does_not_grow_with_the_steps(policy, monkeypatch):
    monkeypatch.setattr(module, "EXACT", 16)  # durations go into bins from the start
    made = make_table(requests=700, length=4)
    scene = make_scenario(make_spec(), made, phase=Phase.ENCODER, gpus=4, workload=Workload(batch=8))
    fitted = make_policy(policy, scene.cluster, scene.fit)

    def peak(steps):
        some = replace(scene, batches=scene.batches[:steps])
        simulate(some, fitted, node(), keep_steps=False)  # compiles, fills caches
        gc.collect()
        tracemalloc.start()
        simulate(some, fitted, node(), keep_steps=False)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(70), peak(150)  # both beyond the 64 steps that a predictor may look back on
    assert len(scene.batches) >= 150 and many < 1.1 * few + 4096


def test_little_s_law_on_every_queue_of_a_run(monkeypatch):
    """Mean number of copies in a queue = arrivals a second x mean stay, over a run in which all have left."""
    machines = []
    original = Machine.__init__
    monkeypatch.setattr(Machine, "__init__", lambda self, *args: original(self, *args) or machines.append(self))
    scene = two_layers(gpus=4, extra_slots=3)
    moves = [
        Transfer(layer=1, expert=s, source=s, target=t, slot=5 + (s - t) % 4 - 1, blocking=True)
        for s in range(4)
        for t in range(4)
        if s != t
    ]
    simulate(scene, scripted(scene, {(0, 0): moves}), node(p2p=None, shared_by=2))
    queues = list(machines[0].fabric)
    assert len(queues) == 4 + 4 + 2
    for queue in queues:
        found = queue.measure()
        assert found["here"] == pytest.approx(found["arrivals_per_s"] * found["stay_s"], rel=1e-9), queue.name
        assert 0 < found["utilisation"] <= 1
