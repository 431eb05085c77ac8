"""The collection of activation matrices against numbers worked out by hand."""

import numpy as np
import pytest

from helpers import make_table
from moesim.predictors import Frequency, NearestMatrix, PastStep, RoutedLayer, RouterSpec, Seen
from moesim.traces import StepTokens

TWO = RouterSpec(num_experts=2, top_k=1)


def tokens(request):
    return StepTokens(request=np.array(request, np.int32), position=np.zeros(len(request), np.int32))


def layer_of(ids):
    return RoutedLayer(ids=np.array(ids, np.uint8)[:, None])


def fitted(*requests, capacity=128, strength=1.0):
    """Fitted on requests, each a list of tokens, each a list of one expert a layer."""
    length = len(requests[0])
    table = make_table(requests=len(requests), length=length, layers=len(requests[0][0]), experts=2)
    table.topk_ids[:, :, 0] = np.concatenate(requests)
    predictor = NearestMatrix(capacity=capacity, strength=strength)
    predictor.fit(table, TWO)
    return predictor


ZEROS, ONES = [[0, 0]] * 4, [[1, 1]] * 4


def test_nearest_matrix_by_hand():
    predictor = fitted(ZEROS, ONES)
    # Of request 8, three tokens went to expert 0 and one to expert 1; of request 3 both to 1.
    seen = Seen(step=0, tokens=tokens([8, 3, 8, 8, 3, 8]), routed=[layer_of([0, 1, 0, 0, 1, 1])])
    inclusion = predictor.forecast(seen, 1).inclusion
    # Rows (4, 0) and (0, 4), and one token of the frequency (1/2, 1/2).
    assert inclusion[:, 0] == pytest.approx([0.9, 0.1, 0.9, 0.9, 0.1, 0.9])


def test_a_full_collection_replaces_the_most_similar():
    mixed = [[0, 1], [0, 0], [0, 0], [0, 0]]
    predictor = fitted(ZEROS, ONES, mixed, capacity=2)
    assert predictor.unit_NLE[:, 1] == pytest.approx(np.array([[3, 1] / np.sqrt(10), [0, 1]]), abs=1e-6)
    assert len(fitted(ZEROS, ONES, mixed).unit_NLE) == 3


def test_only_layers_with_tokens_are_compared():
    predictor = fitted([[0, 0, 0]] * 4, [[0, 1, 1]] * 4)
    seen = Seen(step=0, tokens=tokens([1]), routed=[layer_of([0])])
    assert predictor.forecast(seen, 2).inclusion[0, 0] == pytest.approx(0.9), "a tie goes to the older matrix"
    seen.routed.append(layer_of([1]))
    assert predictor.forecast(seen, 2).inclusion[0, 0] == pytest.approx(0.1)


def test_in_decode_earlier_steps_speak_before_a_layer_has_routed():
    predictor = fitted(ZEROS, ONES)
    seen = Seen(step=1, tokens=tokens([5, 6, 7]))
    seen.past.append(PastStep(tokens=tokens([6, 5]), topk_ids=np.array([[[1], [1]], [[0], [0]]], np.uint8)))
    assert predictor.forecast(seen, 0).inclusion[:, 0] == pytest.approx([0.9, 0.1, 0.5])
    seen.routed.append(layer_of([0, 0, 0]))
    # Request 6 has been in experts 1 and 0 of the first layer alike, and its second layer is still that of ONES.
    assert predictor.forecast(seen, 1).inclusion[:, 0] == pytest.approx([0.9, 0.1, 0.9])


def test_nothing_known_is_the_frequency():
    predictor = fitted(ZEROS, ONES, ONES)
    frequency = Frequency()
    table = make_table(requests=3, length=4, layers=2, experts=2)
    table.topk_ids[:, :, 0] = np.concatenate([ZEROS, ONES, ONES])
    frequency.fit(table, TWO)
    seen = Seen(step=0, tokens=tokens([1, 2]), queued=tokens([3, 3, 3]), routed=[layer_of([0, 1])])
    start = Seen(step=0, tokens=tokens([1, 2]))
    assert predictor.forecast(start, 1).load == pytest.approx(frequency.forecast(start, 1).load)
    queued = predictor.forecast(seen, 1, queued=True)
    assert queued.load == pytest.approx(frequency.forecast(seen, 1, queued=True).load)


def test_requests_are_told_apart_by_kind():
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 60)
    table = make_table(requests=60, length=20, layers=4, experts=8, top_k=2)
    first = np.repeat(kinds * 4, 20)[:, None] + rng.integers(0, 4, (1200, 4))
    table.topk_ids[:, :, 0] = first
    table.topk_ids[:, :, 1] = first // 4 * 4 + (first + 1) % 4
    router = RouterSpec(num_experts=8, top_k=2)
    predictor = NearestMatrix(capacity=16)
    predictor.fit(table.take(table.request < 40), router)
    run = table.take(table.request >= 40)
    routed = [RoutedLayer(ids=run.topk_ids[:, i]) for i in range(2)]
    seen = Seen(step=0, tokens=StepTokens(request=run.request, position=run.position), routed=routed)
    forecast = predictor.forecast(seen, 3)
    assert (forecast.topk // 4 == np.repeat(kinds[40:], 20)[:, None]).all()
