"""Popularity by path against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import make_table
from moesim.predictors import Frequency, Paths, RoutedLayer, RouterSpec, Seen, routed_layer
from moesim.traces import StepTokens


def tokens(count):
    return StepTokens(request=np.zeros(count, np.int32), position=np.arange(count, dtype=np.int32))


def fitted(predictor, table, experts):
    predictor.fit(table, RouterSpec(num_experts=experts, top_k=table.topk_ids.shape[2]))
    return predictor


def seen_of(table, point, count):
    return Seen(step=0, tokens=tokens(count), routed=[routed_layer(table, i, slice(0, count)) for i in range(point)])


def table_of(ids):
    ids = np.array(ids)
    table = make_table(requests=1, length=len(ids), layers=ids.shape[1], experts=4)
    table.topk_ids[:, :, 0] = ids
    return table


def test_the_longest_path_seen_often_enough_by_hand():
    predictor = fitted(Paths(length=2, min_seen=2, strength=2), table_of([[0, 1, 2], [0, 1, 2], [3, 1, 0]]), 4)
    routed = [RoutedLayer(ids=np.array(ids, np.uint8)[:, None]) for ids in ([0, 3, 2], [1, 1, 2])]
    inclusion = predictor.forecast(Seen(step=0, tokens=tokens(3), routed=routed), 2).inclusion
    # Frequency (1, 0, 2, 0) / 3. The path 1: its counts (1, 0, 2, 0), and 2 x frequency: (1, 0, 2, 0) / 3 again.
    # The path 0, 1: (0, 0, 2, 0) and 2 x that. The path 3, 1 was seen once, which is too seldom; 2, 2 never.
    usual = [1 / 3, 0, 2 / 3, 0]
    assert inclusion == pytest.approx(np.array([[1 / 6, 0, 5 / 6, 0], usual, usual]), abs=1e-6)


def test_a_layer_that_looks_the_same_is_told_apart_by_the_way_there():
    rng = np.random.default_rng(0)
    start = rng.integers(0, 4, 200)
    table = table_of(np.stack([start, rng.integers(0, 2, 200), np.zeros(200, int), start], axis=1))
    seen = seen_of(table, 3, 200)
    full, short = fitted(Paths(), table, 4), fitted(Paths(length=1), table, 4)
    assert (full.forecast(seen, 3).topk == table.topk_ids[:, 3]).all()
    assert (short.forecast(seen, 3).topk == table.topk_ids[:, 3]).mean() < 0.5


def test_three_layers_ahead_are_counted_and_no_more():
    table = make_table(requests=30, layers=6, noise=0)
    predictor, seen = fitted(Paths(), table, 8), seen_of(table, 1, 50)
    for layer in (1, 2, 3):
        assert (predictor.forecast(seen, layer).topk == table.topk_ids[:50, layer]).all()
    assert predictor.forecast(seen, 4).load == pytest.approx(fitted(Frequency(), table, 8).forecast(seen, 4).load)


def test_the_heaviest_expert_counts_whatever_its_place():
    table = make_table(requests=30, layers=3, top_k=2)
    weights = np.broadcast_to(np.array([0.9, 0.1], np.float16), table.topk_ids.shape)
    table = replace(table, topk_weights=weights)
    turned = replace(table, topk_ids=table.topk_ids[:, :, ::-1], topk_weights=weights[:, :, ::-1])
    ids_only = replace(table, topk_weights=None)
    loads = [fitted(Paths(), t, 8).forecast(seen_of(t, 2, 50), 2).load for t in (table, turned, ids_only)]
    assert loads[0].tolist() == loads[1].tolist() == loads[2].tolist()


def test_without_a_routed_layer_it_is_the_frequency():
    table = make_table(requests=10, layers=3)
    predictor, frequency = fitted(Paths(), table, 8), fitted(Frequency(), table, 8)
    start, later = seen_of(table, 0, 20), seen_of(table, 2, 20)
    later.queued = tokens(20)
    assert predictor.forecast(start, 2).load == pytest.approx(frequency.forecast(start, 2).load)
    assert predictor.forecast(later, 2, queued=True).load == pytest.approx(frequency.forecast(start, 2).load)
