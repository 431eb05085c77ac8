"""GPUs that die or slow down, links that degrade: who takes over, what is lost, and that policies see it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import MS, node, quick_policy, scripted, two_layers
from scipy.optimize import linprog

from helpers import make_spec, make_table, with_router_inputs
from moesim.sim.dispatch import exact_split
from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.faults import Fault, parse_fault
from moesim.sim.planner import eplb, replicas
from moesim.sim.policies import POLICIES, offloading
from moesim.sim.residency import HOST, Transfer
from moesim.sim.scenario import make_scenario
from moesim.traces import InputError, Phase, Workload

COPY = Transfer(layer=1, expert=0, source=0, target=1, slot=3)


def scenario(gpus=4, requests=80, extra_slots=2, resident=None, **table):
    made, gates = with_router_inputs(make_table(requests=requests, length=16, **table))
    return make_scenario(
        make_spec(top_k=made.topk_ids.shape[2]),
        made,
        phase=Phase.ENCODER,
        gpus=gpus,
        workload=Workload(batch=96),
        extra_slots=extra_slots,
        resident=resident,
        gates=gates,
    )


def run(scene, policy, *faults, profile=None, **options):
    events = []
    made = quick_policy(policy, scene)
    found = [parse_fault(text) for text in faults]
    return simulate(scene, made, profile or node(), faults=found, events=events.append, **options), events


def test_of_a_static_placement_everything_on_the_dead_gpu_is_lost():
    scene = scenario()
    result, events = run(scene, "contiguous", "gpu:1:dies@0.1")
    died = next(e["time_s"] for e in events if e["what"] == "fault")
    assert died == 0.1
    lost = expected = 0
    for event in (e for e in events if e["what"] == "experts" and e["begin_s"] > died):
        step = list(scene.steps())[event["step"]]
        ids = step.ids[~step.dropped[:, event["layer"]], event["layer"]]
        expected += int(np.isin(ids, [2, 3]).sum())
        lost += event.get("lost", 0)
        assert event["tokens_G"][1] == 0 and event["gpu_s"][1] == 0
    assert lost == expected == result.totals.lost_tokens > 0
    attended = [e["gpu_s"][1] for e in events if e["what"] == "attention" and e["begin_s"] > died]
    assert attended and not any(attended), "its requests have gone elsewhere"


@pytest.mark.parametrize("policy", ["eplb", "predictive-layer", "predictive-batch", "predictive-buffered"])
def test_policies_that_replicate_bring_lost_experts_back_from_the_host(policy):
    scene = scenario(requests=260)  # EPLB lays out anew every eight steps
    result, events = run(scene, policy, "gpu:1:dies@0.1")
    static = run(scene, "balanced", "gpu:1:dies@0.1")[0]
    assert 0 < result.totals.lost_tokens < 0.5 * static.totals.lost_tokens
    after = [e["copied"] for e in events if e["what"] == "transfer issued" and e["time_s"] > 0.1]
    assert any(copied["source"] == HOST for copied in after)
    assert all(1 not in (copied["source"], copied["target"]) for copied in after)
    if policy == "eplb":
        assert result.steps[-1].lost_tokens == 0, "laid out anew on the three that live"


@pytest.mark.parametrize("policy", offloading())
def test_what_the_host_backs_is_never_lost(policy):
    scene = scenario(resident=1)
    result, events = run(scene, policy, "gpu:0:dies@0.05", "gpu:2:dies@0.1")
    assert result.totals.lost_tokens == 0
    late = [e for e in events if e["what"] == "experts" and e["begin_s"] > 0.1]
    assert late and all(e["tokens_G"][0] == e["tokens_G"][2] == 0 for e in late)


def test_a_copy_from_or_to_a_gpu_that_dies_never_arrives():
    slow = node(gpus=2)
    scene = two_layers(steps=2)
    made = scripted(scene, {(0, 0): [COPY]})
    plain = simulate(scene, made, slow)
    assert plain.steps[0].load_LG[1] == [4, 4]
    events = []
    fault = Fault(what="gpu", where="0", factor=0.0, time_s=2 * MS)
    result = simulate(scene, made, slow, faults=[fault], events=events.append)
    assert result.steps[0].load_LG[1] == [0, 0] and result.steps[0].lost_tokens == 4 + 8
    assert result.steps[1].load_LG == [[0, 4], [0, 0]]


def test_a_slow_gpu_takes_longer_and_an_exact_split_gives_it_less():
    scene = scenario(noise=0.05)
    usual, slow = (run(scene, "predictive-layer", *fault)[0] for fault in ((), ("gpu:0:x0.25@0",)))
    static = {f: run(scene, "balanced", *faults)[0] for f, faults in (("no", ()), ("slow", ("gpu:0:x0.25@0",)))}
    share = {name: np.sum([s.load_LG for s in r.steps], axis=(0, 1))[0] for name, r in (("a", usual), ("b", slow))}
    assert share["b"] < 0.8 * share["a"]
    assert slow.total_s / usual.total_s < 0.9 * static["slow"].total_s / static["no"].total_s
    assert static["slow"].phase_s()["attention"] == pytest.approx(4 * static["no"].phase_s()["attention"], rel=0.02)


def test_a_link_that_degrades_slows_what_begins_after_it():
    scene = two_layers(steps=2)
    made = scripted(scene, {(1, 2): [replace(COPY, blocking=True)]})
    plain = simulate(scene, made, node())
    faults = [parse_fault("link:p2p:x0.5@0.001"), parse_fault("link:all_to_all:x0.25@0.001")]
    result = simulate(scene, made, node(), faults=faults)
    assert result.steps[1].phase_s["blocked"] == pytest.approx((0.5 + 8) * MS)
    # Four vectors take 4 ms; a quarter as fast 16, latency stays; the first step had begun before.
    assert plain.steps[0].phase_s["communication"] == pytest.approx(12 * MS)
    assert result.steps[0].phase_s["communication"] == pytest.approx((2 * 1 + 2 * 17) * MS)


def test_a_group_of_tensor_parallel_gpus_dies_with_any_of_them():
    result, events = run(scenario(), "contiguous", "gpu:3:dies@0.05", execution=Execution(tensor_parallel=2))
    late = [e for e in events if e["what"] in ("experts", "attention") and e["begin_s"] > 0.05]
    assert late and all(e["gpu_s"][2] == e["gpu_s"][3] == 0 for e in late)
    assert result.totals.lost_tokens > 0


@given(
    policy=st.sampled_from([name for name in POLICIES if name not in offloading()]),
    gpu=st.integers(0, 3),
    time_s=st.floats(0, 0.4),
    seed=st.integers(0, 99),
    parts=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_whenever_a_gpu_dies_every_pair_is_computed_or_reported_lost(policy, gpu, time_s, seed, parts):
    scene = scenario(requests=30, extra_slots=1, seed=seed, top_k=2)
    fault = f"gpu:{gpu}:dies@{time_s}"
    result, events = run(scene, policy, fault, execution=Execution(micro_batches=parts))
    kept = sum(2 * int((~step.dropped).sum()) for step in scene.steps())
    assert int(sum(np.sum(step.load_LG) for step in result.steps)) + result.totals.lost_tokens == kept
    assert run(scene, policy, fault, execution=Execution(micro_batches=parts))[1] == events


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_exact_split_is_optimal_on_gpus_of_different_speed(data):
    gpus, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
    usable = rng.random((experts, gpus)) < 0.4
    usable[np.arange(experts), rng.integers(0, gpus, experts)] = True
    load = rng.integers(0, 400, experts)
    slow = rng.choice([1.0, 1.5, 2.0, 4.0], gpus)
    found = exact_split(load, usable, slow)
    assert (found.sum(axis=1) == load).all() and not found[~usable].any()
    pairs = np.argwhere(usable)
    n = len(pairs)
    carry, cap = np.zeros((experts, n + 1)), np.zeros((gpus, n + 1))
    carry[pairs[:, 0], np.arange(n)] = 1
    cap[pairs[:, 1], np.arange(n)] = slow[pairs[:, 1]]
    cap[:, n] = -1
    cost = np.append(np.zeros(n), 1.0)
    best = linprog(cost, A_ub=cap, b_ub=np.zeros(gpus), A_eq=carry, b_eq=load, method="highs").fun
    # Whole tokens: within one of them, at the slowest GPU's pace, for every GPU that chains pass.
    assert best - 1e-6 <= (found.sum(axis=0) * slow).max() <= best + slow.max() * gpus


def test_replicas_go_where_gpus_are_fast():
    load = np.array([30.0, 10.0, 10.0, 10.0])
    home = np.eye(4, dtype=bool)
    slow = np.array([1.0, 4.0, 1.0, 1.0])
    first = replicas(load, home, np.zeros_like(home), np.array([1, 1, 1, 1]), slow)[0]
    assert first[0] == 1 and first[1] in (2, 3), "GPU 1 is as busy as with 40 tokens"


def test_a_layout_on_fewer_slots_than_experts_keeps_the_hottest():
    placed = eplb(np.array([5.0, 1, 9, 3, 7, 2]), 2, 2)
    assert sorted(placed.ravel().tolist()) == [0, 2, 3, 4]


@pytest.mark.parametrize("text", ["gpu:3:dies@0.5", "gpu:2:x0.5@0.1", "link:network:x0.25@1"])
def test_faults_are_read_as_they_are_written(text):
    assert parse_fault(text).text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu:3", "not of the form"),
        ("gpu:3:explodes@1", "not of the form"),
        ("cpu:3:dies@1", "not of the form"),
        ("gpu:3:dies@soon", "not of the form"),
        ("gpu:3:dies@-1", "seconds, not negative"),
        ("gpu:3:dies@nan", "seconds, not negative"),
        ("gpu:3:x0@1", r"must lie in \(0, 1\]"),
        ("gpu:3:x2@1", r"must lie in \(0, 1\]"),
        ("gpu:-1:dies@1", "is not the number of a GPU"),
        ("link:host:dies@1", "they slow down"),
        ("link:telegraph:x0.5@1", "links are p2p, host"),
    ],
)
def test_faults_that_make_no_sense(text, message):
    with pytest.raises(InputError, match=message):
        parse_fault(text)


def test_faults_of_what_is_not_there():
    scene = scenario()
    with pytest.raises(InputError, match="there are GPUs 0 to 3"):
        run(scene, "balanced", "gpu:4:dies@1")
    with pytest.raises(InputError, match="profile test has no such link"):
        run(scene, "balanced", "link:network:x0.5@1")
    with pytest.raises(InputError, match="at least one must live"):
        run(scene, "balanced", *(f"gpu:{gpu}:dies@1" for gpu in range(4)))
