"""Statistics of a stream against plain numpy over the whole table, hand-worked values, and published figures."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_table
from moesim.traces import InputError, LoadTable, TokenTable, held_out, load_LE
from moesim.traces.importing import import_recording
from moesim.traces.overlap import OverlapSummary
from moesim.traces.statistics import LoadSummary, noise_floor

ESFT = Path(__file__).parents[3] / "shared/data/esft_deepseek_v2_lite"


def parts_of(table, cuts):
    edges = [0, *sorted(c % (len(table) + 1) for c in cuts), len(table)]
    return [table.take(slice(a, b)) for a, b in pairwise(edges)]


def summary(parts, experts=8, top_k=1, layers=3, **options):
    found = LoadSummary(layers, experts, top_k, **options)
    for part in parts:
        found.add(part)
    return found


def rows(loads):
    return LoadTable(
        load=np.array(loads), step=np.arange(len(loads), dtype=np.int32), phase=np.ones(len(loads), np.uint8)
    )


def plain(loads_WLE, layer, gpus):
    """The definitions, written out for one layer."""
    load = loads_WLE[:, layer].astype(float)
    E = load.shape[1]
    share = load / load.sum(axis=1, keepdims=True)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    gini = np.abs(load[:, :, None] - load[:, None, :]).sum(axis=(1, 2)) / (2 * E * load.sum(axis=1))
    on_gpu = np.stack([part.sum(axis=1) for part in np.array_split(load, gpus, axis=1)], axis=1)
    mean, most = on_gpu.mean(axis=1), on_gpu.max(axis=1)
    return {
        "max_over_mean": (load.max(axis=1) / load.mean(axis=1)).mean(),
        "active_fraction": (load > 0).mean(),
        "entropy_bits": -(share * logs).sum(axis=1).mean(),
        "gini": gini.mean(),
        "drift": np.abs(np.diff(share, axis=0)).sum(axis=1).mean() / 2 if len(load) > 1 else None,
        "balancedness": {gpus: {"sglang": ((mean + 1e-5) / (most + 1e-5)).mean(), "vllm": mean.sum() / most.sum()}},
    }


def same(found, expected):
    for name, value in expected.items():
        got = getattr(found, name)
        assert got == (
            {g: pytest.approx(b) for g, b in value.items()} if name == "balancedness" else pytest.approx(value)
        )


@given(
    window=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 10_000), max_size=6),
    experts=st.sampled_from([5, 8, 300]),
    top_k=st.integers(1, 3),
    gpus=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_stream_gives_what_the_whole_table_gives(window, cuts, experts, top_k, gpus, seed):
    table = make_table(6, 32, 3, experts, top_k, seed, noise=0.5)
    found = summary(parts_of(table, cuts), experts, top_k, window=window, gpus=(gpus,)).finish(top=3)
    W = max(len(table) // window, 1)
    size = min(window, len(table))
    loads = np.stack([load_LE(table.topk_ids[w * size : (w + 1) * size], experts) for w in range(W)])
    for layer, stats in enumerate(found):
        same(stats, plain(loads, layer, gpus))
        assert stats.noise_max_over_mean == pytest.approx(noise_floor(size * top_k, experts))
        total = loads[:, layer].sum(axis=0)
        assert list(stats.top_experts) == sorted(range(experts), key=lambda e: (-total[e], e))[:3]


def test_load_statistics_by_hand():
    found = summary([rows([[[6, 2, 0, 0]], [[0, 2, 6, 0]]])], 4, 1, 1, window=None, row_windows=True, gpus=(2,))
    (s,) = found.finish(top=2)
    assert (s.max_over_mean, s.active_fraction, s.drift, s.top_experts) == (3, 0.5, 0.75, (0, 2))
    assert s.entropy_bits == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    assert s.balancedness[2]["sglang"] == pytest.approx((0.5 + 4 / 6) / 2, abs=1e-5)
    assert s.balancedness[2]["vllm"] == pytest.approx(8 / 14)
    assert found.vllm_balancedness() == {2: pytest.approx(8 / 14)}


@given(st.lists(st.integers(0, 10**6), min_size=4, max_size=4).filter(any), st.integers(1, 10**7))
@settings(max_examples=60, deadline=None)
def test_small_and_large_loads_have_the_same_formulas(load, scale):
    """Small loads are sorted by counting and have a table of logarithms, large ones neither."""
    loads = np.array([[load]]) * scale
    (found,) = summary([rows(loads)], 4, 1, 1, window=None, row_windows=True, gpus=(3,)).finish()
    same(found, plain(loads, 0, 3))


def test_rows_of_loads_are_windows_or_are_merged_into_some():
    load = np.tile([[[4, 4, 0, 0]], [[0, 0, 4, 4]]], (6, 1, 1))
    each = summary([rows(load[:5]), rows(load[5:])], 4, 2, 1, window=None, row_windows=True)
    assert each.finish()[0].max_over_mean == 2 and each.windows == 12 and each.tokens == 48
    merged = summary([rows(load)], 4, 2, 1, window=8)
    assert merged.finish()[0].max_over_mean == 1 and merged.windows == 6


def test_layers_without_tokens_in_a_window_do_not_count_there():
    load = [[[4, 0], [2, 2]], [[0, 0], [1, 3]], [[2, 2], [4, 0]]]
    first, second = summary([rows(load)], 2, 1, 2, window=None, row_windows=True).finish()
    assert first.max_over_mean == (2 + 1) / 2 and first.drift is None
    assert second.max_over_mean == pytest.approx((1 + 1.5 + 2) / 3) and second.drift == pytest.approx((0.25 + 0.75) / 2)


def test_the_picture_has_a_bounded_number_of_columns():
    found = summary([rows(np.ones((1000, 1, 4), int))], 4, 1, 1, window=None, row_windows=True)
    loads, together = found.over_time()
    assert len(loads) <= 256 and together == 4 and loads.sum() == 4000


def test_every_window_goes_to_the_sink():
    table, seen = make_table(requests=4), []
    summary([table], window=50, gpus=(2, 4), sink=seen.append).finish()
    assert [w.index for w in seen] == [0, 1] and [w.tokens for w in seen] == [50, 50]
    assert (seen[1].load_LE == load_LE(table.topk_ids[50:100], 8)).all() and seen[0].values_LC.shape == (3, 11)
    assert np.isnan(seen[0].values_LC[:, 4]).all() and not np.isnan(seen[1].values_LC).any()


def test_noise_floor_reproduces_the_known_figures():
    # 128 experts: 6.2, 2.5 and 1.5 at 64, 512 and 4,096 tokens a window.
    assert [noise_floor(n, 128) for n in (64, 512, 4096)] == pytest.approx([6.2, 2.5, 1.5], rel=0.03)


def plain_overlaps(table, layer, experts):
    """Adjacent pairs and followers, counted one by one."""
    last, same_choices, pairs = {}, 0, 0
    for t in np.lexsort((table.position, table.request)):
        request, position = int(table.request[t]), int(table.position[t])
        if request in last and last[request][0] == position - 1:
            same_choices += len(set(table.topk_ids[t, layer].tolist()) & last[request][1])
            pairs += 1
        last[request] = position, set(table.topk_ids[t, layer].tolist())
    half = held_out(table.request)
    here, ahead = table.topk_ids[:, layer, 0], table.topk_ids[:, layer + 1, 0]
    count = np.zeros((experts, experts))
    np.add.at(count, (here[~half], ahead[~half]), 1)
    favourite = count.sum(axis=0).argmax()
    follower = np.where(count.any(axis=1), count.argmax(axis=1), favourite)
    return same_choices / (pairs * table.topk_ids.shape[2]), (follower[here[half]] == ahead[half]).mean()


@given(
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    top_k=st.integers(1, 3),
    decode=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_overlaps_of_a_stream(cuts, top_k, decode, seed):
    """Requests one after the other, or interleaved as decode steps are, wherever the stream is cut."""
    table = make_table(8, 24, 3, 8, top_k, seed, noise=0.5)
    if decode:
        table = table.take(np.lexsort((table.request, table.position)))
    found = OverlapSummary(3, 8)
    for part in parts_of(table, cuts):
        found.add(part)
    told = found.finish(load_LE(table.topk_ids, 8))
    for layer in (0, 1):
        adjacent, ahead = plain_overlaps(table, layer, 8)
        assert (told[layer].adjacent_tokens, told[layer].next_layer) == (pytest.approx(adjacent), pytest.approx(ahead))
    assert told[2].next_layer is None


def test_overlap_tells_structure_from_chance():
    def of(noise):
        found = OverlapSummary(2, 8)
        table = make_table(requests=40, noise=noise, layers=2)
        found.add(table)
        return found.finish(load_LE(table.topk_ids, 8))[0]

    noisy, clear = of(1.0), of(0.05)
    assert noisy.next_layer == pytest.approx(noisy.next_layer_chance, abs=0.06)
    assert clear.next_layer > 0.9 > clear.next_layer_chance
    assert noisy.adjacent_tokens == pytest.approx(noisy.adjacent_chance, abs=0.05)


def test_clear_errors():
    with pytest.raises(InputError, match="9 GPUs for 8 experts"):
        LoadSummary(1, 8, 1, window=None, gpus=(9,))
    with pytest.raises(InputError, match="layer 0 has no tokens"):
        summary([rows(np.zeros((2, 1, 8), int))], 8, 1, 1, window=None, row_windows=True).finish()
    with pytest.raises(InputError, match="at least 1, got 0"):
        LoadSummary(1, 8, 1, window=0)
    with pytest.raises(InputError, match="no tokens to count"):
        LoadSummary(1, 8, 1, window=5).finish()
    alone = make_table(requests=5, length=1)
    found = OverlapSummary(3, 8)
    found.add(TokenTable(**alone.arrays()))
    with pytest.raises(InputError, match="no two tokens of a request are adjacent"):
        found.finish(np.ones((3, 8)))


@pytest.mark.skipif(not ESFT.exists(), reason="the DeepSeek-V2-Lite recordings are not beside the project")
@pytest.mark.parametrize(("task", "skew"), [("intent", 3.81), ("law", 3.52), ("summary", 4.28), ("translation", 5.62)])
def test_published_recordings_have_their_published_skew(task, skew, tmp_path):
    """Max/mean over the whole task, average of the layers, as published with the data."""
    trace = import_recording(ESFT / f"{task}.npz", tmp_path / "t.moetrace")
    found = summary(trace.parts("decoder"), 64, 6, 26, window=None).finish()
    assert np.mean([s.max_over_mean for s in found]) == pytest.approx(skew, abs=0.005)
