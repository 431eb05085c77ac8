"""What must hold for every cluster, recording, policy and way of executing: hundreds of random small runs, judged from
their logs alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import MS, node, quick_policy, scripted, two_layers

from helpers import make_spec, make_table, with_router_inputs
from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.lane import Compute
from moesim.sim.policies import POLICIES, make_policy, offloading
from moesim.sim.profile import Link
from moesim.sim.residency import HOST, Transfer
from moesim.sim.scenario import make_scenario
from moesim.sim.static import StaticSteps
from moesim.traces import Phase, StackSpec, Workload


@st.composite
def runs(draw):
    """(scenario, policy, profile, execution)."""
    name = draw(st.sampled_from(list(POLICIES)))
    gpus, top_k = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    phase = draw(st.sampled_from(list(Phase)))
    stack = StackSpec(name="encoder" if phase is Phase.ENCODER else "decoder", num_layers=4, moe_layers=(0, 1, 3))
    experts = draw(st.sampled_from([4, 6, 8]))
    table = make_table(12, draw(st.integers(2, 10)), 3, experts, top_k, draw(st.integers(0, 999)), phase, noise=0.4)
    table, gates = with_router_inputs(table, experts)
    resident = draw(st.integers(1, -(-experts // gpus))) if name in offloading() else None
    scene = make_scenario(
        make_spec(experts=experts, top_k=top_k, stacks=(stack,)),
        table,
        phase=phase,
        gpus=gpus,
        workload=Workload(batch=draw(st.sampled_from([3, 20, 60])), split="alternate"),
        extra_slots=draw(st.integers(0, 2)),
        resident=resident,
        gates=gates,
    )
    size = draw(st.sampled_from([n for n in (1, 2) if gpus % n == 0]))
    execution = Execution(
        contention=draw(st.sampled_from(["none", "pause", "share"])),
        tensor_parallel=size,
        micro_batches=draw(st.integers(1, 3)),
        overlap=draw(st.booleans()),
        send=draw(st.sampled_from(["per-expert", "per-gpu", "per-node"])),
        copy_dtype=draw(st.sampled_from([None, "int8"])),
    )
    p2p = draw(st.sampled_from([None, Link(latency_s=0.1 * MS, bytes_per_s=draw(st.sampled_from([1e5, 1e6, 1e8])))]))
    profile = node(
        gpus=gpus, p2p=p2p, shared_by=draw(st.integers(1, 4)), decide_s={name: draw(st.sampled_from([0, 1e-3]))}
    )
    return scene, name, profile, execution


def executed(case, **options):
    scene, name, profile, execution = case
    happened = []

    def take(event):
        happened.append(("event", event))
        assert len(happened) < 50_000, "the run does not end"

    policy = quick_policy(name, scene)
    result = simulate(
        scene,
        policy,
        profile,
        execution=execution,
        events=take,
        sink=lambda d: happened.append(("decision", d)),
        **options,
    )
    return policy, result, happened


@given(case=runs())
@settings(max_examples=250, deadline=None)
def test_every_run_keeps_the_invariants(case):
    scene = case[0]
    policy, result, happened = executed(case)
    events = [record for kind, record in happened if kind == "event"]
    check_tokens(scene, events)
    check_slots(scene, policy, happened)
    check_queues(events)
    times = [event["time_s"] for event in events]
    assert times == sorted(times)
    for step in result.steps:
        assert sum(step.phase_s.values()) == pytest.approx(step.duration_s, rel=1e-9)
        assert all(0 <= busy <= step.duration_s * (1 + 1e-9) for busy in step.busy_s)
        assert 0 <= step.hidden_bytes <= step.moved_bytes
    shares = result.totals.time_shares()
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert result.totals.lost_tokens == 0


def check_tokens(scene, events):
    """Every token is computed exactly K times in every layer, on a GPU or on the host."""
    for number, step in enumerate(scene.steps()):
        for layer in range(3):
            mine = [e for e in events if e["what"] == "experts" and (e["step"], e["layer"]) == (number, layer)]
            needs = [e for e in events if e["what"] == "needed" and (e["step"], e["layer"]) == (number, layer)]
            done = sum(sum(e["tokens_G"]) + e.get("host", 0) for e in mine)
            done += sum(e.get("skipped", 0) for e in needs)
            assert done == scene.spec.top_k * int((~step.dropped[:, layer]).sum())


def check_slots(scene, policy, happened):
    """No more experts than slots, none twice on a GPU, and a replica computes only after it has arrived."""
    c = policy.cluster
    slots, usable = {}, set()
    start = policy.start()
    for gpu, slot in np.argwhere(start.expert_GS >= 0).tolist():
        slots[gpu, slot] = (int(start.layer_GS[gpu, slot]), int(start.expert_GS[gpu, slot]))
    usable = {(gpu, *held) for (gpu, _), held in slots.items()}
    coming = {}
    for kind, record in happened:
        if kind == "decision" and record["decision"] == "transfers":
            for t in record["transfers"]:
                usable.discard((t["target"], *slots.pop((t["target"], t["slot"]), (None, None))))
            for t in record["transfers"]:
                assert 0 <= t["slot"] < c.gpu_slots
                held = (t["layer"], t["expert"])
                assert held not in [h for (gpu, _), h in slots.items() if gpu == t["target"]], "twice on a GPU"
                assert (t["target"], t["slot"]) not in slots
                slots[t["target"], t["slot"]] = held
                assert t["source"] == HOST or (t["source"], *held) in usable or t["source"] != t["target"]
        elif kind == "decision":
            for expert, gpu, _ in record["expert_gpu_tokens"]:
                assert (gpu, record["layer"], expert) in usable
        elif record["what"] == "transfer issued":
            coming[record["number"]] = record["copied"]
        elif record["what"] in ("transfer ends", "transfer free"):
            t = record["copied"] if "copied" in record else coming.pop(record["number"])
            if slots.get((t["target"], t["slot"])) == (t["layer"], t["expert"]):
                usable.add((t["target"], t["layer"], t["expert"]))


def check_queues(events):
    """A queue of a link carries one copy at a time."""
    begun, spans = {}, {}
    for event in events:
        if event["what"] == "transfer begins":
            for queue in begun.pop(event["number"], []):
                spans[queue][-1][1] = event["time_s"]
            begun[event["number"]] = event["queues"]
            for queue in event["queues"]:
                before = spans.setdefault(queue, [])
                assert not before or before[-1][1] is not None, "the one before has not ended"
                before.append([event["time_s"], None])
        elif event["what"] == "transfer ends":
            for queue in begun.pop(event["number"]):
                spans[queue][-1][1] = event["time_s"]


@given(case=runs())
@settings(max_examples=40, deadline=None)
def test_the_same_inputs_give_the_same_log_and_looking_changes_nothing(case):
    scene, name, profile, execution = case
    _, first, happened = executed(case)
    _, again, other = executed(case)
    assert repr(happened) == repr(other) and first == again
    policy = quick_policy(name, scene)
    blind = simulate(scene, policy, profile, execution=execution, keep_steps=False)
    assert blind.totals == first.totals and blind.steps == []


@given(
    copies=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12),
    shared_by=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_makespan_of_forked_copies_that_are_joined(copies, shared_by):
    """Blocking copies from the host: each root carries its GPUs' one after the other, so the slowest root is waited
    for."""
    scene = two_layers(gpus=4, extra_slots=12)
    profile = node(gpus=4, p2p=None, shared_by=shared_by)
    moves, taken = [], set()
    for i, (gpu, _) in enumerate(copies):
        layer, expert = i % 2, (i // 2) % 4
        if expert != gpu and (layer, expert, gpu) not in taken:
            taken.add((layer, expert, gpu))
            slot = layer * scene.cluster.layer_slots + 1 + len(taken) % 12
            if slot not in {m.slot for m in moves if m.target == gpu}:
                moves.append(Transfer(layer=layer, expert=expert, source=HOST, target=gpu, slot=slot, blocking=True))
    result = simulate(scene, scripted(scene, {(0, 0): moves}), profile)
    per_root = np.bincount([move.target // shared_by for move in moves], minlength=1)
    assert result.steps[0].phase_s["blocked"] == pytest.approx(4.5 * MS * per_root.max(), rel=1e-9)


@given(
    jobs=st.lists(
        st.tuples(st.floats(0, 3), st.lists(st.floats(0, 2), min_size=3, max_size=3)), min_size=1, max_size=12
    )
)
@settings(max_examples=100, deadline=None)
def test_the_queues_of_gpus_serve_one_job_after_the_other(jobs):
    """Against Lindley's recursion, GPU by GPU."""

    class Clock:
        now = 0.0

    clock, free = Clock(), [0.0] * 3
    compute = Compute(clock, 3)
    for gap, seconds in jobs:
        clock.now += gap
        start_G, wait = compute.submit(np.array(seconds))
        for gpu, work in enumerate(seconds):
            if work > 0:
                begin = max(free[gpu], clock.now)
                assert start_G[gpu] == begin
                free[gpu] = begin + work
        ends = [start + work for start, work in zip(start_G, seconds, strict=True)]
        assert wait == max(ends) - clock.now


def test_what_arrives_in_order_is_served_in_order_whatever_its_kind():
    """Ties are broken by the order of issue: three equal copies from one GPU, issued at the same instant."""
    scene = two_layers(gpus=4)
    moves = [Transfer(layer=1, expert=0, source=0, target=gpu, slot=3) for gpu in (3, 1, 2)]
    events = []
    simulate(scene, scripted(scene, {(0, 0): moves}), node(), events=events.append)
    assert [e["number"] for e in events if e["what"] == "transfer ends"] == [0, 1, 2]


def test_static_steps_are_only_taken_without_options(monkeypatch):
    scene = two_layers()
    taken = []
    original = StaticSteps.run
    monkeypatch.setattr(StaticSteps, "run", lambda self, *args: taken.append(1) or original(self, *args))
    policy = make_policy("contiguous", scene.cluster, scene.fit)
    plain = simulate(scene, policy, node())
    assert taken == [1]
    simulate(scene, policy, node(), execution=Execution(micro_batches=2))
    simulate(scene, policy, node(), events=[].append)
    assert taken == [1] and simulate(scene, policy, node()) == plain
