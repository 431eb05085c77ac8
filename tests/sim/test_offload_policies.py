"""Policies for too few slots: hits layer by layer against caches of the test's own, the named ones pinned on one small
recording, no clairvoyance, rules and statistics by hand."""

from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import decoding, node, quick_policy

from helpers import make_table
from moesim.predictors import Forecast
from moesim.sim.cachestats import CacheBook
from moesim.sim.driver import DecisionLog, Driver
from moesim.sim.engine import simulate
from moesim.sim.policies import (
    POLICIES,
    Prefetch,
    PrefetchDeeper,
    PrefetchDraft,
    PrefetchOver,
    PrefetchSequence,
    Target,
    decides_like,
    make_policy,
    offloading,
)
from moesim.sim.policies.prefetching import expected_needs
from moesim.sim.profile import HostLink
from moesim.sim.residency import EMPTY, Cluster
from moesim.sim.station import Station
from moesim.traces import InputError, Phase

LAYERS = 3


def scene(resident=3, top_k=1, batch=1, seed=0, requests=8, drops=True):
    table = make_table(requests=requests, length=10, top_k=top_k, seed=seed, phase=Phase.DECODE, noise=0.3)
    if not drops:
        table = replace(table, dropped=np.zeros_like(table.dropped))
    return decoding(table, resident, batch=batch)


def run(made, name, profile=None):
    return simulate(made, quick_policy(name, made), profile or node())


def needs(made, layer):
    """The experts of one layer, step after step, of recordings with a token a step."""
    return [int(step.ids[0, layer, 0]) for step in made.steps() if not step.dropped[0, layer]]


def plain_hits(name, sequence, slots):
    """Hits of a cache that begins with `slots`, a list of experts."""
    slots, last, count, hits = list(slots), {}, {}, 0
    for i, expert in enumerate(sequence):
        last[expert], count[expert] = i, count.get(expert, 0) + 1
        if expert in slots:
            hits += 1
            continue
        rest = sequence[i + 1 :]
        worth = {
            "on-demand": [last.get(e, -1) for e in slots],
            "lfu": [(count.get(e, 0), last.get(e, -1)) for e in slots],
            "belady": [-(rest.index(e) if e in rest else len(rest)) for e in slots],
        }[name]
        slots[worth.index(min(worth))] = expert
    return hits


@pytest.mark.parametrize("name", ["on-demand", "lfu", "belady"])
@given(resident=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_hits_of_every_layer_equal_those_of_a_cache_written_for_the_test(name, resident, seed):
    made = scene(resident, seed=seed)
    placed_LS = make_policy(name, made.cluster, made.fit).placed_LGS[:, 0]
    cache = run(made, name).totals.cache
    for layer in range(LAYERS):
        sequence = needs(made, layer)
        assert cache.needs_L[layer] == len(sequence)
        assert cache.hits_L[layer] == plain_hits(name, sequence, placed_LS[layer].tolist())


@given(resident=st.integers(1, 7), seed=st.integers(0, 99), top_k=st.integers(1, 2))
@settings(max_examples=5, deadline=None)
def test_belady_hits_at_least_as_often_as_every_cache_without_prefetch(resident, seed, top_k):
    made = scene(resident, top_k, seed=seed)
    best = sum(run(made, "belady").totals.cache.hits_L)
    for name in ("on-demand", "lfu", "arc"):
        assert sum(run(made, name).totals.cache.hits_L) <= best


GOLDEN = {
    "on-demand": (43, 73, 117),
    "on-demand-cpu": (43, 73, 117),
    "fiddler": (43, 73, 117),
    "lfu": (41, 75, 121),
    "arc": (43, 73, 116),
    "belady": (43, 88, 136),
    "prefetch-layer": (34, 82, 129),
    "prefetch-ridge": (30, 68, 121),
    "hobbit": (20, 67, 123),
    "hobbit-exact": (16, 65, 123),
    "fate": (73, 107, 144),
    "sp-moe": (44, 77, 127),
    "moe-infinity": (29, 73, 125),
    "pre-gated": (35, 72, 129),
    "diff-moe": (49, 87, 131),
    "expertflow": (25, 79, 129),
    "sida": (58, 116, 116),
    "oracle-prefetch": (56, 115, 150),
}
"""Hits of 2, 4 and 6 resident slots, of 161 needs each (sida executes its forecasts, which need others); nets by
Markov's forecasts."""


@pytest.mark.parametrize("name", offloading())
def test_hits_on_one_small_recording(name):
    found = tuple(sum(run(scene(slots, top_k=2, batch=2), name).totals.cache.hits_L) for slots in (2, 4, 6))
    assert found == GOLDEN[name]


def decisions(made, name, until, change=None):
    """The decision log up to the routing of layer `until[1]` in step `until[0]`; copies arrive at once."""
    log = DecisionLog()
    driver = Driver(quick_policy(name, made), log)
    for number, step in enumerate(made.steps()):
        ids = step.ids if change is None else change(number, step.ids.copy())
        coming = driver.begin_step(step.tokens)
        for layer in range(LAYERS):
            for t in coming:
                driver.arrived(t)
            if (number, layer) == until:
                return log.text()
            coming = driver.routed(replace(step.layer(layer), ids=ids[:, layer]))
            chosen, dropped_T = driver.executed(step.dropped[:, layer]), step.dropped[:, layer]
            kept_TK = ~dropped_T[:, None] & (chosen.ids_TK != EMPTY)
            left_E = np.bincount(chosen.ids_TK[kept_TK], minlength=8)
            while left_E.any():
                fetch = driver.fetch(left_E[None])
                left_E = np.where(fetch.host_E, 0, left_E)
                for t in fetch.moves:
                    driver.arrived(t)
                left_E = left_E - driver.dispatch(left_E[None]).sum(axis=(0, 2))
        driver.end_step()
    raise AssertionError("the run ends before")


@pytest.mark.parametrize("name", [name for name in offloading() if not POLICIES[name].clairvoyant])
def test_scrambling_the_future_changes_no_earlier_decision_about_slots(name):
    made, until, rng = scene(3, top_k=2, batch=2), (4, 1), np.random.default_rng(7)

    def scramble(number, ids_TLK):
        if number > until[0]:
            return rng.integers(0, 8, ids_TLK.shape)
        if number == until[0]:
            ids_TLK[:, until[1] :] = rng.integers(0, 8, ids_TLK[:, until[1] :].shape)
        return ids_TLK

    plain = decisions(made, name, until)
    assert '"transfers"' in plain and plain == decisions(made, name, until, scramble)


def test_belady_does_see_the_future_and_says_where_it_cannot():
    assert POLICIES["belady"].clairvoyant and POLICIES["oracle-prefetch"].clairvoyant
    made = scene(3, top_k=2, batch=2)
    with pytest.raises(InputError, match="shown the future"):
        decisions(made, "belady", (4, 1))


EXACT = [name for name in offloading() if not POLICIES[name].lossy and POLICIES[name].miss == "wait"]


@pytest.mark.parametrize("name", EXACT)
def test_copies_that_cost_nothing_make_it_as_good_as_everything_resident(name):
    profile = node(launch=0.0)
    free = replace(profile, links=replace(profile.links, host=HostLink(latency_s=0.0, bytes_per_s=1e300)))
    everything = simulate(scene(None, batch=4), quick_policy("contiguous", scene(None, batch=4)), free)
    assert run(scene(4, batch=4), name, free).total_s == pytest.approx(everything.total_s)


def test_a_perfect_prefetch_is_as_precise_as_can_be_and_faster_than_on_demand():
    """Long attention, so that there is time to copy."""
    profile = node(launch=0.0)
    gpu = replace(profile.gpu, attention=replace(profile.gpu.attention, launch_s=0.02))
    slow, made = replace(profile, gpu=gpu), scene(2, drops=False)
    lazy, perfect = run(made, "on-demand", slow), run(made, "oracle-prefetch", slow)
    cache = perfect.metrics()["cache"]
    assert cache["prefetch_precision"] == 1 and cache["wasted_bytes"] == 0 and cache["hit_rate"] > 0.9
    assert perfect.phase_s()["blocked"] < 0.1 * lazy.phase_s()["blocked"]


def forecast(load, **more):
    return Forecast(load=np.array(load, float), **more)


def cluster(**changes):
    return Cluster(**{"layers": 6, "experts": 8, "gpus": 1, "resident": 4, "top_k": 2, **changes})


def test_rules_name_layers_and_experts():
    said = forecast([0.1, 0.9, 0, 0.6, 0.4, 0, 0, 0])
    assert [t.layer for t in Prefetch(depth=2).targets(0, 5, 6)] == [5]
    assert Prefetch().experts(Target(layer=1), said, cluster()) == [1, 3], "as many as a token has"
    assert Prefetch(least=0.7).experts(Target(layer=1), said, cluster()) == [1]
    assert [t.layer for t in PrefetchSequence().targets(0, 2, 6)] == [2, 3, 4, 5]
    assert PrefetchDeeper().enough(1) and not PrefetchDeeper().enough(0) and not Prefetch().enough(3)
    two = cluster(gpus=2)
    assert Prefetch().experts(Target(layer=1), forecast([0.1, 3, 0.9, 2, 1, 0.4, 0, 0]), two) == [1, 3, 4, 2]
    one = cluster(gpus=2, resident=1)
    assert Prefetch().experts(Target(layer=1), forecast([0.1, 3, 0.9, 2, 1, 0.4, 0, 0]), one) == [1, 4]


def test_as_many_experts_as_are_expected_to_be_needed():
    sure = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], float)
    assert expected_needs(Forecast(load=sure.sum(axis=0), inclusion_UE=sure)) == 3
    half = np.full((3, 4), 0.5)
    assert expected_needs(Forecast(load=half.sum(axis=0), inclusion_UE=half)) == pytest.approx(4 * (1 - 0.5**3))
    assert expected_needs(forecast([0.5, 3, 0, 0.25])) == 1.75


def test_over_fetching_brings_what_lies_above_the_percentile_of_each_token():
    inclusion = np.array([[0.9, 0.5, 0.3, 0.2, 0.1, 0, 0, 0], [0.1, 0.5, 0, 0, 0, 0.2, 0.3, 0.9]])
    said = Forecast(load=inclusion.sum(axis=0), inclusion_UE=inclusion)
    wide = cluster(pooled=True)
    assert sorted(PrefetchOver(percentile=75).experts(Target(layer=1), said, wide)) == [0, 1, 7]
    assert sorted(PrefetchOver(percentile=50).experts(Target(layer=1), said, wide)) == [0, 1, 2, 3, 5, 6, 7]


def test_the_cutoff_is_where_the_draft_or_the_memory_ends():
    """l * K * t_io <= t_draft and l * K experts in the GPU's slots."""
    assert PrefetchDraft(draft_s=0.010, copy_s=0.001).cutoff(cluster()) == 5
    assert PrefetchDraft(draft_s=0.009, copy_s=0.001).cutoff(cluster()) == 4
    assert PrefetchDraft(draft_s=1.0, copy_s=0.001).cutoff(cluster(resident=1)) == 3
    rule, said = PrefetchDraft(draft_s=0.004, copy_s=0.001), forecast([1, 1, 0, 0, 0, 0, 0, 0])
    assert [t.layer for t in rule.targets(0, 1, 6)] == [1, 2, 3, 4, 5] and rule.targets(0, 2, 6) == ()
    assert [bool(rule.experts(t, said, cluster())) for t in rule.targets(0, 1, 6)] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prefetch(depth=0), "depth must be at least 1"),
        (lambda: PrefetchOver(percentile=100.0), "percentile must lie in"),
        (lambda: PrefetchDraft(copy_s=0.0), "copy_s must be a finite time above 0"),
    ],
)
def test_options_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"miss": None}, "say what to do about what is missing"),
        ({"predictor": None}, "give it a predictor"),
        ({"eviction": "shallow-arc"}, "pooled = true"),
    ],
)
def test_parts_that_do_not_go_together(parts, message, monkeypatch):
    monkeypatch.setitem(POLICIES, "odd", replace(POLICIES["prefetch-layer"], **parts))
    made = scene(None)
    with pytest.raises(InputError, match=message):
        make_policy("odd", made.cluster, made.fit)


def test_prefetching_does_not_displace_what_is_computed_or_expected():
    """Six slots that three layers share: what a layer has just chosen, and what was copied ahead, stays."""
    made = scene(2, top_k=2)
    driver = Driver(quick_policy("hobbit-exact", made))
    for step in made.steps():
        ahead = set()
        coming = driver.begin_step(step.tokens)
        for layer in range(LAYERS):
            ahead |= {(t.layer, t.expert) for t in coming}
            for t in coming:
                driver.arrived(t)
            before = held(driver)
            coming = driver.routed(step.layer(layer))
            ahead = {key for key in ahead if key[0] > layer}
            now = {(layer, int(e)) for e in step.ids[:, layer].ravel()}
            for t in coming:
                assert before[t.slot] not in now | ahead
        driver.end_step()


def held(driver):
    r = driver.residency
    return list(zip(r.layer_GS[0].tolist(), r.expert_GS[0].tolist(), strict=True))


def test_who_is_waited_for_goes_first_in_the_queue():
    env = simpy.Environment()
    station, order = Station(env, "link"), []

    def customer(name, priority):
        visit = yield from station.enter(priority, name)
        yield env.timeout(1)
        order.append(name)
        visit.leave()

    for name in range(4):
        env.process(customer(name, 5 + name))

    def change():
        yield env.timeout(0.5)
        station.hurry(3, 0)
        station.hurry(0, 9)

    env.process(change())
    env.run()
    assert order == [0, 3, 1, 2]


def test_what_became_of_copies_by_hand():
    """Slot 0: demand, then a prefetch that is used, then one that is displaced before; slot 1: one that comes too
    late for its layer, slot 2: one that is displaced on its way."""
    book = CacheBook()
    book.needed(0, hit=[4], awaited=[], missed=[1])
    book.issued(0, 0, 1, (0, 0), True)
    book.ended(0, 100, "full")
    book.issued(1, 1, 2, (0, 0), False)
    book.ended(1, 100, "full")
    book.issued(2, 1, 3, (0, 1), False)
    book.needed(1, hit=[2], awaited=[3], missed=[5])
    book.ended(2, 25, "int4")
    book.issued(3, 0, 7, (0, 0), False)
    book.ended(3, 100, "full")
    book.issued(4, 0, 6, (0, 0), False)
    book.issued(5, 0, 5, (0, 2), False)
    book.issued(6, 0, 4, (0, 2), False)
    book.ended(5, 100, "full")
    told = book.totals.summary()
    assert (book.totals.needs_L, book.totals.hits_L) == ([2, 3], [1, 1])
    assert told["hit_rate"] == pytest.approx(2 / 5) and told["hit_rate_L"] == [0.5, pytest.approx(1 / 3)]
    assert told["prefetch_precision"] == 2 / 4 and told["prefetch_recall"] == 2 / (2 + 2)
    assert told["wasted_bytes"] == 200 and told["late_bytes"] == 25
    assert told["bytes_by_precision"] == {"full": 400, "int4": 25}


def test_an_own_policy_decides_as_long_as_the_named_one_it_resembles():
    """Profiles know seconds of named policies; tune and policy files give others names that nobody has timed."""
    made = scene()
    own = make_policy("on-demand", made.cluster, made.fit)
    timed = {"contiguous": 1e-3, "lfu": 2e-3, "on-demand": 3e-3, "prefetch-ridge": 4e-3}
    assert decides_like(own, timed) == "on-demand"
    mine = replace(own, name="mine.toml", recipe=replace(own.recipe, eviction="lfu"))
    assert decides_like(mine, timed) == "lfu"
    assert decides_like(mine, ["contiguous", "on-demand"]) == "on-demand"
    assert decides_like(mine, ["contiguous", "prefetch-ridge"]) is None
    result = simulate(made, mine, replace(node(), decide_s=timed))
    assert result.phase_s()["decide"] == pytest.approx(2e-3 * (LAYERS + 1) * len(made.batches))
    assert (result.config["decide_s"], result.config["decide_s_of"]) == (2e-3, "lfu")
