"""Tensor-parallel attention, micro-batches in flight, and how often tokens are sent: by hand and by brute force."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import MS, node, scripted, two_layers

from helpers import make_spec, make_table
from moesim.sim.cost import all_reduce_seconds, all_to_all_seconds, attention_seconds, expert_seconds, rank_tokens
from moesim.sim.dispatch import exact_split, send_matrix
from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.policies import make_policy
from moesim.sim.profile import Attention, Link
from moesim.sim.residency import Cluster
from moesim.sim.scenario import make_scenario, micro_batches, rank_counts
from moesim.sim.sends import vectors
from moesim.traces import InputError, Phase, Workload, assign_ranks


def scenario(gpus=4, experts=8, batch=96, **table):
    made = make_table(**{"requests": 40, "length": 16, "experts": experts, **table})
    spec = make_spec(experts=experts, top_k=made.topk_ids.shape[2])
    return make_scenario(spec, made, phase=Phase.ENCODER, gpus=gpus, workload=Workload(batch=batch))


def run(scene, policy="balanced", profile=None, **execution):
    made = make_policy(policy, scene.cluster, scene.fit)
    return simulate(scene, made, profile or node(), execution=Execution(**execution))


@st.composite
def routed(draw):
    G = draw(st.sampled_from([1, 2, 4, 6]))
    E, K, T = draw(st.integers(G, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 25))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    usable = rng.random((E, G)) < 0.4
    usable[np.arange(E), rng.integers(0, G, E)] = True
    ids = np.argsort(rng.random((T, E)), axis=1)[:, :K]
    shared = draw(st.sampled_from([n for n in (1, 2, 3) if G % n == 0]))
    rank = np.sort(rng.integers(0, G // shared, T)) * shared
    return (
        G,
        shared,
        ids,
        rng.random(T) < 0.1,
        rank,
        usable,
        draw(st.sampled_from([n for n in (1, 2, 3) if G % n == 0])),
    )


@given(case=routed(), how=st.sampled_from(["per-expert", "per-gpu", "per-node"]))
@settings(max_examples=200, deadline=None)
def test_what_is_sent_equals_a_count_token_by_token(case, how):
    G, shared, ids, dropped, rank, usable, nodes = case
    node_size = G // nodes
    if node_size % shared:
        return  # a group lies within a node
    cluster = Cluster(layers=1, experts=len(usable), gpus=G)
    counts = rank_counts(ids, dropped, rank, cluster)
    send = send_matrix(counts, exact_split(counts.sum(axis=0), usable))
    found = vectors(send, ids, dropped, rank, how=how, shared=shared, node_size=node_size)
    found[np.arange(G), np.arange(G)] = 0
    # Tokens of a rank go to an expert's replicas in order of the tokens and of the GPUs.
    left, expected = send.copy(), np.zeros((G, G), int)

    def add(source, to):
        expected[source, to] += source != to

    for t in np.flatnonzero(~dropped):
        targets = []
        for e in ids[t]:
            to = int(np.flatnonzero(left[rank[t], e])[0])
            left[rank[t], e, to] -= 1
            targets.append(to)
        if how == "per-expert":
            for to in targets:
                if shared == 1 or to // shared != rank[t] // shared:
                    add(rank[t] // shared * shared + to % shared if shared > 1 else rank[t], to)
            continue
        relays = set()
        for to in sorted(set(targets)):
            near = to // node_size == rank[t] // node_size
            if how == "per-gpu" or near:
                if shared == 1 or to // shared != rank[t] // shared:
                    add(rank[t] // shared * shared + to % shared if shared > 1 else rank[t], to)
                continue
            relay = to // node_size * node_size + rank[t] % node_size
            if relay not in relays:
                add(rank[t], relay)
                relays.add(relay)
            add(relay, to)
    assert (found == expected).all()


def test_sending_less_often_never_takes_longer_and_pays_between_nodes():
    slow = Link(latency_s=0.0, bytes_per_s=16e3)
    profile = node(network=slow, gpus_per_node=2, a2a=Link(latency_s=0.0, bytes_per_s=64e3))
    scene = scenario(top_k=3)
    spent = {
        how: run(scene, profile=profile, send=how).phase_s()["communication"]
        for how in ("per-expert", "per-gpu", "per-node")
    }
    assert spent["per-node"] < spent["per-gpu"] < spent["per-expert"]


def test_tensor_parallel_attention_by_hand():
    """Two GPUs hold the same 8 tokens: half the dense work each, three all-reduces a layer of 8 vectors, no
    all-to-all."""
    scene = two_layers()
    profile = node()
    result = simulate(scene, scripted(scene, {}), profile, execution=Execution(tensor_parallel=2))
    spec = scene.spec
    step = next(scene.steps(1))
    ranks = rank_tokens(step.tokens, step.rank, 1, False)
    flops = 2 * 8 * (4 * 16 * 16) / 2 + 2 * 8 * 16 * 2 + 4 * (4 * 4 + 4 * 4) * 16 / 2
    attention = flops / 2.048e6
    whole = attention_seconds(ranks, spec.stack("encoder"), profile.gpu, spec, "float32", 2)
    assert whole[0, 0] == pytest.approx(attention)
    reduce = all_reduce_seconds(8, 2, profile, spec, "float32")
    assert reduce == pytest.approx(1 * MS + 2 * (1 / 2) * 8 * 64 / 64e3)
    experts = (0.25 + 4) * MS, (0.25 + 8) * MS
    assert result.steps[0].phase_s["communication"] == pytest.approx(2 * 2 * reduce)
    assert result.steps[0].duration_s == pytest.approx(2 * attention + 4 * reduce + sum(experts))
    assert result.steps[0].load_LG == [[4, 4], [8, 0]]


def test_groups_of_tensor_parallel_gpus_exchange_only_what_they_do_not_have():
    scene = scenario(gpus=4)
    result = {n: run(scene, tensor_parallel=n) for n in (1, 2, 4)}
    tokens = {n: [step.load_LG for step in r.steps] for n, r in result.items()}
    assert tokens[1] == tokens[2] == tokens[4], "the same experts compute the same tokens"
    with pytest.raises(InputError, match="3 must divide the 4 GPUs"):
        run(scene, tensor_parallel=3)
    with pytest.raises(InputError, match="4 must divide the 4 GPUs and the 2 of a node"):
        run(scene, profile=node(network=Link(latency_s=0, bytes_per_s=1e9), gpus_per_node=2), tensor_parallel=4)


def even():
    """One GPU pair, one layer with experts: each micro-batch attends, sends, computes and sends back in 1 ms each."""
    scene = two_layers(gpus=2, steps=2)
    one = node(launch=1 * MS, a2a=Link(latency_s=1 * MS, bytes_per_s=1e18))
    gpu = replace(one.gpu, matmul_flops_per_s={"float32": 1e18}, attention=Attention(launch_s=1 * MS, efficiency=1.0))
    scene = replace(scene, batches=(merged(scene),))
    return scene, replace(one, gpu=gpu)


def merged(scene):
    first, second = scene.batches
    rows = np.concatenate([first.rows, second.rows])
    tokens = replace(
        first.tokens,
        **{
            name: np.concatenate([getattr(first.tokens, name), getattr(second.tokens, name)])
            for name in ("request", "position", "token_id")
        },
    )
    return replace(first, rows=rows, tokens=tokens)


def test_two_batch_overlap_by_hand():
    """A: 0-1 attention, 1-2 all-to-all, 2-3 experts, 3-4 all-to-all; B follows a millisecond later; both layers
    alike."""
    scene, profile = even()
    policy = make_policy("contiguous", scene.cluster, scene.fit)

    def steps(**execution):
        return simulate(scene, policy, profile, execution=Execution(**execution)).steps[0]

    whole, turns, both = steps(), steps(micro_batches=2, overlap=False), steps(micro_batches=2)
    assert whole.duration_s == pytest.approx(8 * MS) and turns.duration_s == pytest.approx(16 * MS)
    assert both.duration_s == pytest.approx(9 * MS)
    # Exposed: in all but the first and the last millisecond of communication somebody computes.
    assert both.phase_s["communication"] == pytest.approx(1 * MS)
    assert both.phase_s["attention"] + both.phase_s["experts"] == pytest.approx(8 * MS)
    assert np.sum(both.load_LG) == np.sum(whole.load_LG) and len(both.load_LG) == 2 * len(whole.load_LG)


@given(
    seed=st.integers(0, 999),
    gpus=st.sampled_from([1, 2, 4]),
    parts=st.integers(2, 4),
    policy=st.sampled_from(["balanced", "eplb", "predictive-layer"]),
)
@settings(max_examples=30, deadline=None)
def test_overlap_helps_or_does_nothing_and_no_gpu_does_two_things_at_once(seed, gpus, parts, policy):
    scene = scenario(gpus=gpus, seed=seed)
    events = []
    made = make_policy(policy, scene.cluster, scene.fit)
    together = simulate(scene, made, node(), execution=Execution(micro_batches=parts), events=events.append)
    turns = run(scene, policy, micro_batches=parts, overlap=False)
    if policy == "balanced":  # the others plan on other histories
        assert together.total_s <= turns.total_s * (1 + 1e-9)
        assert together.totals.busy_s == pytest.approx(turns.totals.busy_s)
    for gpu in range(gpus):
        slices = sorted(
            (event.get("start_s", [event["begin_s"]] * gpus)[gpu], event["gpu_s"][gpu])
            for event in events
            if "gpu_s" in event and event["gpu_s"][gpu] > 0
        )
        ends = np.cumsum([0.0])
        for begin, seconds in slices:
            assert begin >= ends - 1e-9
            ends = begin + seconds
    talks = sorted((e["begin_s"], e["time_s"]) for e in events if e["what"] == "communication")
    assert all(b[0] >= a[1] - 1e-9 for a, b in pairwise(talks)), "one all-to-all at a time"
    for step in together.steps:
        assert sum(step.phase_s.values()) == pytest.approx(step.duration_s, rel=1e-9)


@given(seed=st.integers(0, 999), count=st.integers(1, 4), groups=st.integers(1, 4), together=st.booleans())
@settings(max_examples=50, deadline=None)
def test_micro_batches_hold_every_token_once_and_whole_requests(seed, count, groups, together):
    scene = scenario(gpus=4, seed=seed)
    for step in scene.steps(groups):
        parts = micro_batches(step, count, groups, together)
        assert len(parts) <= count
        assert sorted(np.concatenate([p.tokens.request for p in parts]).tolist()) == sorted(
            step.tokens.request.tolist()
        )
        held = [set(part.tokens.request.tolist()) for part in parts]
        assert sum(map(len, held)) == len(set().union(*held))
        for rank in range(groups):
            sizes = [int((part.rank == rank).sum()) for part in parts]
            assert max(sizes) - min(sizes) <= 16 or count > len(parts), "a request of 16 tokens apart at most"
        assert (assign_ranks(step.tokens.request, groups) == step.rank).all()


def test_a_static_step_takes_what_its_cost_terms_say():
    """Closed form of the fork-joins of a step: the sum over layers of the slowest GPU's phases and both exchanges."""
    scene = scenario(gpus=4, top_k=2)
    policy = make_policy("balanced", scene.cluster, scene.fit)
    profile, spec = node(), scene.spec
    result = simulate(scene, policy, profile)
    usable = policy.start().usable_LEG
    for step, record in zip(scene.steps(), result.steps, strict=True):
        ranks = rank_tokens(step.tokens, step.rank, 4, False)
        expected = attention_seconds(ranks, spec.stack("encoder"), profile.gpu, spec, "float32").max(axis=1).sum()
        for layer in range(3):
            counts = rank_counts(step.ids[:, layer], step.dropped[:, layer], step.rank, scene.cluster)
            tokens_EG = counts.sum(axis=0)[:, None] * usable[layer]
            send = send_matrix(counts, tokens_EG).sum(axis=1)
            expected += 2 * all_to_all_seconds(send, profile, spec, "float32")
            expected += expert_seconds(tokens_EG, profile.gpu, spec, "float32").max()
        assert record.duration_s == pytest.approx(expected, rel=1e-9)


def test_options_that_make_no_sense():
    for bad, message in (
        ({"contention": "some"}, "none, pause, share"),
        ({"send": "twice"}, "per-expert"),
        ({"copy_dtype": "int1"}, "int8"),
        ({"micro_batches": 0}, "at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            Execution(**bad)
