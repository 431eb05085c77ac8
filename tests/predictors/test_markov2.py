"""Second-order Markov against numbers worked out by hand, and against plain loops."""

from itertools import product

import numpy as np
import pytest

from helpers import make_table
from moesim.predictors import Frequency, Markov, Markov2, RoutedLayer, RouterSpec, Seen, routed_layer
from moesim.traces import StepTokens


def tokens(count):
    return StepTokens(request=np.zeros(count, np.int32), position=np.arange(count, dtype=np.int32))


def fitted(predictor, table, experts):
    predictor.fit(table, RouterSpec(num_experts=experts, top_k=table.topk_ids.shape[2]))
    return predictor


def seen_of(table, point, count):
    return Seen(step=0, tokens=tokens(count), routed=[routed_layer(table, i, slice(0, count)) for i in range(point)])


def test_markov_2_by_hand():
    table = make_table(requests=1, length=4, layers=3, experts=2)
    table.topk_ids[:, :, 0] = [[0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1]]
    predictor = fitted(Markov2(strength=1), table, 2)
    routed = [RoutedLayer(ids=np.array(ids, np.uint8)[:, None]) for ids in ([0, 1, 1], [0, 0, 1])]
    inclusion = predictor.forecast(Seen(step=0, tokens=tokens(3), routed=routed), 2).inclusion
    # First order says one half whatever it was. The pair (0, 0) was followed by 0, 0, 1; (1, 0) by 1; (1, 1) never was.
    assert inclusion[:, 0] == pytest.approx([(2 + 0.5) / 4, 0.5 / 2, 0.5])


def test_several_experts_average_over_all_pairs():
    rng = np.random.default_rng(1)
    table = make_table(requests=5, length=8, layers=3, experts=5, top_k=2)
    table.topk_ids[:] = rng.permuted(np.tile(np.arange(5), (40, 3, 1)), axis=2)[:, :, :2]
    predictor, first = fitted(Markov2(strength=3), table, 5), fitted(Markov(), table, 5).step_LEE[1]
    forecast = predictor.forecast(seen_of(table, 2, 1), 2)
    expected = np.zeros(5)
    for a, b in product(table.topk_ids[0, 0], table.topk_ids[0, 1]):
        count = np.zeros(5)
        for ids in table.topk_ids:
            if a in ids[0] and b in ids[1]:
                count[ids[2]] += 1
        expected += (count + 3 * first[b]) / (count.sum() + 3) / 4
    assert forecast.inclusion[0] == pytest.approx(2 * expected)


def test_order_two_finds_what_order_one_cannot():
    rng = np.random.default_rng(2)
    table = make_table(requests=20, length=20, layers=3, experts=4)
    table.topk_ids[:, :2, 0] = rng.integers(0, 4, (400, 2))
    table.topk_ids[:, 2] = (table.topk_ids[:, 0] + table.topk_ids[:, 1]) % 4
    seen = seen_of(table, 2, 400)
    recall = {
        kind: (fitted(kind(), table, 4).forecast(seen, 2).topk == table.topk_ids[:, 2]).mean()
        for kind in (Markov, Markov2)
    }
    assert recall[Markov2] == 1 and recall[Markov] < 0.5


def test_farther_layers_are_chained_in_first_order():
    table = make_table(requests=20, layers=5)
    predictor = fitted(Markov2(), table, 8)
    seen = seen_of(table, 2, 30)
    near = predictor.forecast(seen, 2).inclusion
    steps = fitted(Markov(), table, 8).step_LEE
    assert predictor.forecast(seen, 4).inclusion == pytest.approx(near @ steps[2] @ steps[3])


def test_with_less_to_go_by_it_is_first_order_and_then_the_frequency():
    table = make_table(requests=20, layers=3)
    predictor, seen = fitted(Markov2(), table, 8), seen_of(table, 1, 30)
    assert predictor.forecast(seen, 2).load == pytest.approx(fitted(Markov(), table, 8).forecast(seen, 2).load)
    frequency, start = fitted(Frequency(), table, 8), seen_of(table, 0, 30)
    start.queued = tokens(7)
    assert predictor.forecast(start, 2).load == pytest.approx(frequency.forecast(start, 2).load)
    assert predictor.forecast(start, 2, queued=True).load.sum() == pytest.approx(7)


def test_pairs_that_never_were_take_no_room():
    table = make_table(requests=4, length=8, layers=3, experts=256)
    assert fitted(Markov2(), table, 256).cost().parameters < 3 * 256**2
