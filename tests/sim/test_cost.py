"""Each term of the cost model against its closed form."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import node

from helpers import make_spec
from moesim.sim.cost import (
    RankTokens,
    all_to_all_seconds,
    attention_seconds,
    dense_layers_before,
    expert_seconds,
    layer_seconds,
    rank_tokens,
)
from moesim.sim.profile import Attention, Gpu, Link
from moesim.traces import Phase, StackSpec, StepTokens

SPEC = make_spec()  # d_model 16, d_ff 32, 2 heads of 8, 8 experts, float32: an expert has 1024 weights, 4096 bytes
GPU = Gpu(
    memory_bytes=2**30,
    hbm_bytes_per_s=1e6,
    matmul_flops_per_s={"float32": 1e7, "bfloat16": 4e7},
    tile_rows=4,
    launch_s=1e-3,
    expert_s=1e-4,
    attention=Attention(launch_s=2e-3, efficiency=0.5),
    matmul_efficiency=0.8,
    hbm_efficiency=0.5,
)


def column(*tokens):
    return np.array(tokens, np.int64)[:, None]


def test_few_tokens_cost_their_weights():
    seconds = expert_seconds(column(1, 0, 2), GPU, SPEC, "float32")
    assert seconds[0] == pytest.approx(1e-3 + 2e-4 + 2 * 4096 / 5e5, rel=1e-12)
    halved = expert_seconds(column(1, 0, 2), GPU, SPEC, "bfloat16")
    assert halved[0] == pytest.approx(1e-3 + 2e-4 + 2 * 2048 / 5e5, rel=1e-12)


def test_many_tokens_cost_whole_tiles_of_flops():
    seconds = expert_seconds(column(401, 3, 0), GPU, SPEC, "float32")
    assert seconds[0] == pytest.approx(1e-3 + 2e-4 + (404 + 4) * 2048 / 8e6, rel=1e-12)
    gated = expert_seconds(column(401, 3, 0), GPU, make_spec(widths=replace(SPEC.sized(), gated=True)), "float32")
    assert gated[0] == pytest.approx(1e-3 + 2e-4 + (404 + 4) * 3072 / 8e6, rel=1e-12)


def test_a_gpu_without_tokens_costs_nothing():
    assert expert_seconds(np.zeros((8, 3), np.int64), GPU, SPEC, "float32").tolist() == [0, 0, 0]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_more_tokens_never_cost_less(tokens, where):
    more = list(tokens)
    more[where % len(more)] += 1
    plain, grown = (expert_seconds(column(*t), GPU, SPEC, "float32")[0] for t in (tokens, more))
    assert grown >= plain


def test_a_replica_pays_at_many_tokens_and_costs_at_few():
    def slowest(load, *, split):
        one, two = (load - load // 2, load // 2) if split else (load, 0)
        tokens_EG = np.array([[one, two], [0, load // 8]], np.int64)
        return expert_seconds(tokens_EG, replace(GPU, tile_rows=1), SPEC, "float32").max()

    assert slowest(4000, split=True) < 0.7 * slowest(4000, split=False)
    assert slowest(8, split=True) > slowest(8, split=False)


def tokens(request, position):
    request, position = np.array(request, np.int32), np.array(position, np.int32)
    return StepTokens(token_id=np.zeros_like(request), request=request, position=position)


def test_attention_counts_squares_of_lengths_and_in_decode_the_context():
    step = tokens([1, 1, 1, 3, 3, 9], [0, 1, 2, 0, 1, 0])
    whole = rank_tokens(step, np.array([0, 0, 0, 1, 1, 0]), 3, Phase.ENCODER)
    assert whole.tokens_G.tolist() == [4, 2, 0] and whole.pairs_G.tolist() == [10, 4, 0]
    assert whole.cached_G.tolist() == [0, 0, 0]
    decode = rank_tokens(tokens([1, 3, 9], [6, 0, 2]), np.array([0, 1, 0]), 3, Phase.DECODE)
    assert decode.tokens_G.tolist() == [2, 1, 0] and decode.pairs_G.tolist() == [10, 1, 0]
    assert decode.cached_G.tolist() == [10, 1, 0]


def ranks(tokens, pairs, cached=0):
    return RankTokens(tokens_G=np.array([tokens, 0]), pairs_G=np.array([pairs, 0]), cached_G=np.array([cached, 0]))


def test_a_layer_that_is_bound_by_flops():
    T, pairs, rate = 1000, 20_000, 1e7 * 0.5
    moe = layer_seconds(ranks(T, pairs), GPU, SPEC, "float32", moe=True, cross=False)
    assert moe[0] == pytest.approx(2e-3 + (2 * T * (4 * 256 + 16 * 8) + 4 * pairs * 16) / rate, rel=1e-12)
    assert moe[1] == 0
    dense = layer_seconds(ranks(T, pairs), GPU, SPEC, "float32", moe=False, cross=False)
    assert dense[0] == pytest.approx(2e-3 + (2 * T * (4 * 256 + 1024) + 4 * pairs * 16) / rate, rel=1e-12)
    shared = layer_seconds(
        ranks(T, pairs), GPU, make_spec(widths=replace(SPEC.sized(), shared_d_ff=64)), "float32", moe=True, cross=False
    )
    assert shared[0] - moe[0] == pytest.approx(2 * T * 2048 / rate, rel=1e-9)


def test_decode_is_bound_by_weights_and_cache():
    slow = replace(GPU, hbm_bytes_per_s=1e3)
    got = layer_seconds(ranks(2, 700, cached=700), slow, SPEC, "float32", moe=True, cross=False)
    assert got[0] == pytest.approx(2e-3 + ((4 * 256 + 16 * 8) * 4 + 2 * 700 * 16 * 4) / 500, rel=1e-12)


def test_cross_attention_adds_its_projections_and_pairs():
    T, pairs, rate = 1000, 20_000, 1e7 * 0.5
    plain, cross = (
        layer_seconds(ranks(T, pairs), GPU, SPEC, "float32", moe=True, cross=cross)[0] for cross in (False, True)
    )
    assert cross - plain == pytest.approx((2 * T * 4 * 256 + 4 * pairs * 16) / rate, rel=1e-9)
    fast = replace(GPU, hbm_bytes_per_s=1e12)
    plain, cross = (
        layer_seconds(ranks(T, pairs, cached=pairs), fast, SPEC, "float32", moe=True, cross=cross)[0]
        for cross in (False, True)
    )
    assert cross - plain == pytest.approx((2 * T * 2 * 256 + 4 * pairs * 16) / rate, rel=1e-9), "K and V are cached"


@pytest.mark.parametrize(
    ("layers", "moe", "before"),
    [(12, (1, 3, 5, 7, 9, 11), (1,) * 6), (3, (0, 1, 2), (0, 0, 0)), (6, (2,), (5,)), (6, (0, 3), (0, 4))],
)
def test_dense_layers_belong_to_the_next_moe_layer_and_the_rest_to_the_last(layers, moe, before):
    stack = StackSpec(name="encoder", num_layers=layers, moe_layers=moe)
    assert dense_layers_before(stack) == before
    got = attention_seconds(ranks(100, 900), stack, GPU, SPEC, "float32")
    moe_s, dense_s = (layer_seconds(ranks(100, 900), GPU, SPEC, "float32", moe=m, cross=False)[0] for m in (1, 0))
    assert got.shape == (len(moe), 2)
    assert got[:, 0].tolist() == pytest.approx([moe_s + n * dense_s for n in before], rel=1e-12)


def test_only_the_decoder_of_an_encoder_decoder_attends_across():
    encoder, decoder = (StackSpec(name=name, num_layers=1, moe_layers=(0,)) for name in ("encoder", "decoder"))
    both, alone = make_spec(stacks=(encoder, decoder)), make_spec(stacks=(decoder,))
    work = ranks(100, 900)
    seconds = [
        float(attention_seconds(work, stack, GPU, spec, "float32")[0, 0])
        for stack, spec in ((decoder, both), (encoder, both), (decoder, alone))
    ]
    assert seconds[0] > seconds[1] == seconds[2]


def test_all_to_all_is_latency_plus_the_busiest_direction():
    link = Link(latency_s=1e-3, bytes_per_s=1e6, efficiency=0.5)
    send_GG = np.array([[9, 1, 2], [4, 9, 0], [5, 0, 9]])

    def seconds(sent, dtype="float32"):
        return all_to_all_seconds(sent, node(a2a=link), SPEC, dtype)

    assert seconds(send_GG) == pytest.approx(1e-3 + 9 * 16 * 4 / 5e5, rel=1e-12)
    assert seconds(send_GG.T, "bfloat16") == pytest.approx(1e-3 + 9 * 16 * 2 / 5e5, rel=1e-12)
    assert seconds(np.diag([5, 6])) == 1e-3
    assert seconds(np.array([[5]])) == 0


def test_an_even_all_to_all_is_the_textbook_formula():
    G, per_pair = 4, 25
    link = Link(latency_s=0.0, bytes_per_s=1e6)
    seconds = all_to_all_seconds(np.full((G, G), per_pair), node(a2a=link), SPEC, "float32")
    assert seconds == pytest.approx((G - 1) * per_pair * 64 / 1e6, rel=1e-12)


def test_between_nodes_the_slower_of_network_and_node_counts():
    """Two nodes of two: GPU 0 sends 3 vectors to its neighbour and 4 to the other node."""
    near, far = Link(latency_s=1e-3, bytes_per_s=1e6), Link(latency_s=2e-3, bytes_per_s=1e5)
    two = node(gpus=4, a2a=near, network=far, gpus_per_node=2)
    send_GG = np.array([[5, 3, 4, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    assert all_to_all_seconds(send_GG, two, SPEC, "float32") == pytest.approx(2e-3 + 4 * 64 / 1e5, rel=1e-12)
    fast = replace(two, links=replace(two.links, network=Link(latency_s=0.0, bytes_per_s=1e18)))
    assert all_to_all_seconds(send_GG, fast, SPEC, "float32") == pytest.approx(1e-3 + 3 * 64 / 1e6, rel=1e-12)
    assert all_to_all_seconds(send_GG[:2, :2], two, SPEC, "float32") == pytest.approx(1e-3 + 3 * 64 / 1e6, rel=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_nodes_joined_by_their_own_kind_of_link_are_never_slower_than_one_node(nodes, size, most, seed):
    """Splitting the traffic over two links of equal speed can only help."""
    G, link = nodes * size, Link(latency_s=1e-3, bytes_per_s=1e6)
    send_GG = np.random.default_rng(seed).integers(0, most + 1, (G, G))
    split = node(gpus=G, a2a=link, network=link, gpus_per_node=size)
    whole = all_to_all_seconds(send_GG, node(gpus=G, a2a=link), SPEC, "float32")
    assert all_to_all_seconds(send_GG, split, SPEC, "float32") <= whole * (1 + 1e-12)
