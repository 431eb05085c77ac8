"""Fewer slots than experts: caches against an independent one, waves, the host's CPU, SSD, shared buffers, rounding."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import MS, decoding, node, quick_policy, scripted, two_layers

from helpers import make_spec, make_table
from moesim.sim.cost import expert_seconds, host_seconds
from moesim.sim.driver import Driver
from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.policies import POLICIES, make_policy, offloading
from moesim.sim.profile import HostLink, Link
from moesim.sim.residency import Cluster, Transfer
from moesim.sim.scenario import make_scenario, rank_counts
from moesim.traces import InputError, Phase, Workload

COPY = Transfer(layer=1, expert=0, source=0, target=1, slot=3)


def decode(resident, gpus=1, batch=1, requests=8, **table):
    return decoding(
        make_table(requests=requests, length=12, phase=Phase.DECODE, **table), resident, gpus=gpus, batch=batch
    )


def run(scene, policy, profile=None, **options):
    events = []
    made = quick_policy(policy, scene)
    return simulate(scene, made, profile or node(), events=events.append, **options), events


@given(resident=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_misses_equal_those_of_an_independent_lru_cache(resident, seed):
    scene = decode(resident, seed=seed)
    _, events = run(scene, "on-demand")
    placed = make_policy("on-demand", scene.cluster, scene.fit).placed_LGS[:, 0]
    caches = [OrderedDict((int(e), None) for e in sorted(row) if e >= 0) for row in placed]
    order = [list(map(int, row)) for row in placed]
    misses = 0
    for step in scene.steps():
        for layer, cache in enumerate(caches):
            if step.dropped[0, layer]:
                continue
            expert = int(step.ids[0, layer, 0])
            if expert not in cache:
                misses += 1
                # Among those never used the first slot goes first.
                unused = [e for e in order[layer] if e in cache and cache[e] is None]
                gone = unused[0] if unused else min(cache, key=cache.get)
                order[layer][order[layer].index(gone)] = expert
                del cache[gone]
            cache[expert] = step.tokens.position[0] + 1000 * int(step.tokens.request[0])
    assert sum(event["what"] == "transfer ends" for event in events) == misses


def belady_misses(wanted, held):
    """Misses of one cache that knows the future: what is used last, or never again, goes."""
    held, misses = set(held), 0
    for i, expert in enumerate(wanted):
        if expert in held:
            continue
        misses += 1
        following = {e: next((j for j in range(i + 1, len(wanted)) if wanted[j] == e), len(wanted)) for e in held}
        held.discard(max(following, key=following.get))
        held.add(expert)
    return misses


@pytest.mark.parametrize("policy", ["on-demand", "prefetch-layer"])
@given(resident=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_belady_bounds_every_cache(policy, resident, seed):
    scene = decode(resident, seed=seed)
    _, events = run(scene, policy)
    placed = make_policy(policy, scene.cluster, scene.fit).placed_LGS[:, 0]
    best = 0
    for layer in range(3):
        kept = [step for step in scene.steps() if not step.dropped[0, layer]]
        best += belady_misses([int(step.ids[0, layer, 0]) for step in kept], [int(e) for e in placed[layer]])
    assert sum(event["what"] == "transfer issued" for event in events) >= best


def test_hits_grow_with_the_slots_and_all_resident_misses_nothing():
    moved = [run(decode(slots, requests=24), "on-demand")[0].totals.moved_bytes for slots in range(1, 9)]
    assert moved == sorted(moved, reverse=True) and moved[-1] == 0


@pytest.mark.parametrize("policy", offloading())
@given(seed=st.integers(0, 99), gpus=st.integers(1, 4), batch=st.integers(1, 16), resident=st.integers(1, 2))
@settings(max_examples=4, deadline=None)
def test_every_token_is_computed_in_waves_where_experts_do_not_fit(policy, seed, gpus, batch, resident):
    scene = decode(resident, gpus, batch, seed=seed, top_k=2)
    result, events = run(scene, policy)
    for number, step in enumerate(scene.steps()):
        for layer in range(3):
            mine = [e for e in events if (e["step"], e.get("layer")) == (number, layer)]
            waves = [e for e in mine if e["what"] == "experts"]
            done = sum(sum(wave["tokens_G"]) + wave.get("host", 0) for wave in waves)
            done += sum(e.get("skipped", 0) for e in mine)
            assert done == 2 * int((~step.dropped[:, layer]).sum())
    assert result.totals.lost_tokens == 0


def test_copies_that_cost_nothing_are_as_good_as_everything_resident():
    free = HostLink(latency_s=0.0, bytes_per_s=1e300)
    profile = node(launch=0.0)
    profile = replace(profile, links=replace(profile.links, host=free))
    everything = run(decode(None, batch=4, requests=16), "contiguous", profile)[0]
    for policy in ("on-demand", "prefetch-layer"):
        # Four slots hold what four tokens need at once, so that there is one wave.
        assert run(decode(4, batch=4, requests=16), policy, profile)[0].total_s == pytest.approx(everything.total_s)


def test_prefetching_what_comes_hides_copies():
    """Routing that follows from the layer before, attention long enough to hide a copy."""
    profile = node(launch=0.0)
    slow = replace(profile, gpu=replace(profile.gpu, attention=replace(profile.gpu.attention, launch_s=20 * MS)))
    scene = decode(2, requests=48, noise=0.0)
    lazy, eager = (run(scene, policy, slow)[0] for policy in ("on-demand", "prefetch-layer"))
    assert eager.phase_s()["blocked"] < 0.7 * lazy.phase_s()["blocked"]
    assert eager.total_s < lazy.total_s and eager.totals.hidden_bytes > 0


def test_the_host_s_cpu_by_hand_and_only_where_it_is_faster():
    """A token takes 4 ms on the host plus its vector there and back (0.5 ms + 64 bytes each way); a copy takes 4.5
    ms."""
    scene = decode(1, requests=8)
    profile = node()
    one = host_seconds(np.array([1, 0]), profile, scene.spec, "float32")
    assert one == pytest.approx((4 + 2 * (0.5 + 64 / 1024)) * MS)
    result, _ = run(scene, "on-demand-cpu", profile)
    assert result.totals.host_tokens == 0, "the copy is faster"
    slow = replace(profile, links=replace(profile.links, host=HostLink(latency_s=0.5 * MS, bytes_per_s=0.5e6)))
    result, events = run(scene, "on-demand-cpu", slow)
    assert result.totals.host_tokens > 0 and result.totals.moved_bytes == 0
    host = [e for e in events if e.get("host")]
    expected = host_seconds(np.array([1]), slow, scene.spec, "float32")
    assert all(e["duration_s"] == pytest.approx(expected) for e in host)
    with pytest.raises(InputError, match="does not describe the host's CPU"):
        run(scene, "on-demand-cpu", replace(profile, cpu=None))


def test_a_copy_from_ssd_passes_through_the_host_s_memory():
    storage = Link(latency_s=1 * MS, bytes_per_s=0.4096e6)
    cold = node(cpu_memory=6 * 4096, storage=storage)  # 6 of 24 experts find room: the hottest ones
    scene = decode(1, requests=8)
    result, events = run(scene, "on-demand", cold)
    ways = {}
    for event in events:
        if event["what"] == "transfer begins":
            ways.setdefault(event["number"], []).append(event)
    seconds = {
        e["number"]: e["time_s"] - ways[e["number"]][0]["time_s"] for e in events if e["what"] == "transfer ends"
    }
    two = {number for number, way in ways.items() if len(way) == 2}
    assert two and all(seconds[n] == pytest.approx((11 + 4.5 if n in two else 4.5) * MS) for n in seconds)
    assert all(ways[n][0]["queues"] == ["storage of node 0"] for n in two)
    assert result.total_s > run(scene, "on-demand")[0].total_s
    with pytest.raises(InputError, match="24 of them, the host of profile test has room for 6 and it has no SSD"):
        run(scene, "on-demand", node(cpu_memory=6 * 4096))


def test_replicas_in_two_shared_buffers_take_memory_once():
    one = Cluster(layers=6, experts=8, gpus=4, extra_slots=2)
    two = replace(one, double_buffered=True)
    assert (one.gpu_slots, two.gpu_slots) == (6 * (2 + 2), 6 * 2 + 2 * 2)
    assert [list(two.replica_slots(layer)) for layer in range(3)] == [[12, 13], [14, 15], [12, 13]]
    made = make_table(requests=60, length=16, noise=0.05)
    scene = make_scenario(make_spec(), made, phase=Phase.ENCODER, gpus=4, workload=Workload(batch=128))
    found = {name: run(scene, name)[0] for name in ("balanced", "predictive-layer", "predictive-buffered")}
    balance = {name: r.metrics()["balancedness_mean_of_ratios"] for name, r in found.items()}
    assert balance["balanced"] < balance["predictive-buffered"] <= balance["predictive-layer"] + 1e-9
    assert found["predictive-buffered"].totals.moved_bytes > found["predictive-layer"].totals.moved_bytes


def test_a_buffer_is_not_overwritten_while_its_experts_compute():
    """Two micro-batches: what one of them computes with is not displaced by the other's copies before it ends."""
    made = make_table(requests=60, length=16, noise=0.05, layers=6)
    scene = make_scenario(make_spec(layers=6), made, phase=Phase.ENCODER, gpus=4, workload=Workload(batch=128))
    _, events = run(scene, "predictive-buffered", execution=Execution(micro_batches=2))
    computing = [(e["layer"], e["begin_s"], e["time_s"]) for e in events if e["what"] == "experts"]
    issued = {e["number"]: e for e in events if e["what"] == "transfer issued"}
    held = {}
    for event in events:
        if event["what"] != "transfer begins":
            continue
        copied = issued[event["number"]]["copied"]
        place = copied["target"], copied["slot"]
        before, held[place] = held.get(place), copied["layer"]
        if before is not None:
            at = event["time_s"]
            assert not [c for c in computing if c[0] == before and c[1] < at - 1e-12 and at + 1e-12 < c[2]]


def test_copies_in_fewer_bits_are_faster_and_counted_as_not_exact():
    scene = two_layers()

    def step(**execution):
        moves = {(0, 2): [replace(COPY, blocking=True)]}
        return simulate(scene, scripted(scene, moves), node(), execution=Execution(**execution)).steps[0]

    plain, int8, int4 = step(), step(copy_dtype="int8"), step(copy_dtype="int4")
    assert plain.phase_s["blocked"] == pytest.approx(4.5 * MS) and plain.rounded_tokens == 0
    assert int8.phase_s["blocked"] == pytest.approx((0.5 + 1024 * (1 + 2 / 128) / 1024) * MS)
    assert (int8.moved_bytes, int4.moved_bytes) == (1040, 528)
    assert int8.rounded_tokens == int4.rounded_tokens == 4, "what the copy computes, not the original"


def test_memory_bandwidth_that_copies_take_is_missing_to_the_experts():
    scene = two_layers()
    slow = node(hbm=4096 / (10 * MS), p2p=Link(latency_s=0.0, bytes_per_s=4096 / (30 * MS)))

    def experts(contention):
        made = scripted(scene, {(0, 0): [COPY]})
        return simulate(scene, made, slow, execution=Execution(contention=contention)).steps[0].phase_s["experts"]

    rate, taken = 4096 / (10 * MS), 4096 / (30 * MS)
    with_copy = expert_seconds(np.array([[4, 0], [0, 4]]), slow.gpu, scene.spec, "float32", np.array([taken, taken]))
    assert with_copy == pytest.approx([(0.25 + 10) * MS - 10 * MS + 4096 / (rate - taken)] * 2)
    assert experts("none") < experts("pause") and experts("none") < experts("share")


@pytest.mark.parametrize(("resident", "message"), [(0, "take 1 to 8"), (9, "take 1 to 8"), (-3, "take 1 to 8")])
def test_slots_that_make_no_sense(resident, message):
    with pytest.raises(InputError, match=message):
        decode(resident)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in offloading()])
def test_policies_that_need_every_expert_say_what_to_use_instead(name):
    scene = decode(2)
    with pytest.raises(InputError, match="with fewer resident slots use: on-demand, on-demand-cpu"):
        make_policy(name, scene.cluster, scene.fit)


def test_two_micro_batches_do_not_displace_each_other_s_experts_for_ever():
    """One slot a GPU and layer, and each part of a step wants another expert: they take turns at the layer."""
    scene = decode(1, gpus=2, batch=4, requests=40, noise=0.4)
    events = []

    def take(event):
        events.append(event)
        assert len(events) < 20_000, "the run does not end"

    policy = make_policy("on-demand", scene.cluster, scene.fit)
    result = simulate(scene, policy, node(), execution=Execution(micro_batches=2), events=take)
    assert sum(np.sum(step.load_LG) for step in result.steps) == sum(int((~s.dropped).sum()) for s in scene.steps())


def test_an_expert_whose_only_copy_another_micro_batch_is_moving_is_waited_for():
    """EPLB's new layout overwrites slots that the other part would still have computed with."""
    made = make_table(requests=160, length=6, noise=0.4, top_k=2)
    scene = make_scenario(make_spec(top_k=2), made, phase=Phase.ENCODER, gpus=2, workload=Workload(batch=24))
    slow = node(p2p=Link(latency_s=0.1 * MS, bytes_per_s=1e5))
    result, _ = run(scene, "eplb", slow, execution=Execution(micro_batches=2))
    kept = sum(2 * int((~step.dropped).sum()) for step in scene.steps())
    assert sum(np.sum(step.load_LG) for step in result.steps) == kept
    assert result.phase_s()["blocked"] > 0


def test_a_late_copy_is_counted_once_however_many_waves_its_layer_takes():
    scene = decode(2, batch=4, requests=8)
    driver = Driver(quick_policy("prefetch-layer", scene))
    step = next(scene.steps())
    driver.begin_step(step.tokens)
    counts = [rank_counts(step.ids[:, i], step.dropped[:, i], step.rank, scene.cluster) for i in range(2)]
    under_way = driver.routed(step.layer(0))
    driver.executed(step.dropped[:, 0])
    driver.fetch(counts[0])
    driver.dispatch(counts[0])
    assert [t for t in under_way if t.layer == 1], "nothing is copied ahead: the test tests nothing"
    before = driver.scores.late
    driver.routed(step.layer(1))
    driver.executed(step.dropped[:, 1])
    driver.dispatch(counts[1])
    late = driver.scores.late
    driver.dispatch(np.zeros_like(counts[1]))
    assert late > before and driver.scores.late == late
