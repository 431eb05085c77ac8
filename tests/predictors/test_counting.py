"""Counting predictors against tables worked out by hand, and on fitted recordings."""

import numpy as np
import pytest

from helpers import make_table
from moesim.predictors import PREDICTORS, PastStep, RoutedLayer, RouterSpec, Seen, routed_layer
from moesim.traces import StepTokens, split_requests


def tokens(ids):
    ids = np.array(ids, np.int32)
    return StepTokens(token_id=ids, request=np.zeros_like(ids), position=np.arange(len(ids), dtype=np.int32))


def fitted(name, table, experts=8):
    predictor = PREDICTORS[name]()
    predictor.fit(table, RouterSpec(num_experts=experts, top_k=table.topk_ids.shape[2]))
    return predictor


@pytest.fixture(scope="module")
def parts():
    return split_requests(make_table(requests=60, noise=0.1))


def seen_of(part, layer, count=200):
    rows = slice(0, count)
    step = StepTokens(token_id=part.token_id[rows], request=part.request[rows], position=part.position[rows])
    return Seen(step=0, tokens=step, routed=[routed_layer(part, i, rows) for i in range(layer)])


@pytest.mark.parametrize("name", ["frequency", "previous", "window", "markov", "token-table"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_forecast_hands_out_every_token_once_per_choice(name, layer, parts):
    fit, run = parts
    forecast = fitted(name, fit).forecast(seen_of(run, layer), layer)
    assert forecast.load.shape == (8,) and (forecast.load >= 0).all()
    assert forecast.load.sum() == pytest.approx(200)
    assert forecast.topk is None or forecast.topk.shape == (200, 1)


def recall(predictor, part, layer):
    seen = seen_of(part, layer)
    return (predictor.forecast(seen, layer).topk == part.topk_ids[:200, layer]).mean()


def test_what_is_predictable_is_predicted(parts):
    fit, run = parts
    # 90% of the ids of layer 2 follow from layer 1; nothing but the most frequent expert is known without looking.
    assert recall(fitted("markov", fit), run, 2) > 0.75
    assert recall(fitted("token-table", fit), run, 0) > 0.85
    assert recall(fitted("frequency", fit), run, 2) < 0.6


def test_frequency_by_hand():
    table = make_table(requests=2, length=2, layers=1, experts=4)
    table.topk_ids[:, 0, 0] = [3, 3, 3, 1]
    forecast = fitted("frequency", table, 4).forecast(Seen(step=0, tokens=tokens([1, 2])), 0)
    assert forecast.load == pytest.approx([0, 0.5, 0, 1.5], abs=1e-6)
    assert forecast.topk.ravel().tolist() == [3, 3]


def test_markov_by_hand():
    table = make_table(requests=2, length=2, layers=2, experts=2)
    table.topk_ids[:, :, 0] = [[0, 1], [0, 1], [0, 0], [1, 0]]
    predictor = fitted("markov", table, 2)
    routed = [RoutedLayer(ids=np.array([[0], [1]], np.uint8))]
    load = predictor.forecast(Seen(step=0, tokens=tokens([5, 6]), routed=routed), 1).load
    # Smoothing adds 0.5 * E * share = 0.5 to each count: row 0 is (1.5, 2.5)/4, row 1 is (1.5, 0.5)/2.
    assert load == pytest.approx([1.5 / 4 + 1.5 / 2, 2.5 / 4 + 0.5 / 2])


def test_markov_skips_layers_by_chaining(parts):
    fit, run = parts
    predictor = fitted("markov", fit)
    seen = seen_of(run, 1)
    chain = predictor.step_LEE[0] @ predictor.step_LEE[1]
    assert predictor.forecast(seen, 2).load == pytest.approx(chain[seen.routed[0].ids[:, 0]].sum(axis=0))


def test_token_table_gives_unseen_ids_the_frequency(parts):
    fit, _ = parts
    unseen = Seen(step=0, tokens=tokens([999, 12345]))
    table = fitted("token-table", fit).forecast(unseen, 1).load
    assert table == pytest.approx(fitted("frequency", fit).forecast(unseen, 1).load, rel=1e-4)


def test_window_repeats_the_last_steps(parts):
    fit, run = parts
    past = [PastStep(tokens=tokens([0] * 4), topk_ids=np.full((4, 3, 1), e, np.uint8)) for e in (2, 5)]
    seen = seen_of(run, 0, count=8)
    seen.past.extend(past)
    assert fitted("previous", fit).forecast(seen, 1).load.tolist() == [0, 0, 0, 0, 0, 8, 0, 0]
    assert fitted("window", fit).forecast(seen, 1).load.tolist() == [0, 0, 4, 0, 0, 4, 0, 0]


def test_nothing_is_said_of_a_step_that_is_not_known(parts):
    fit, run = parts
    with pytest.raises(ValueError, match="not known"):
        fitted("token-table", fit).forecast(seen_of(run, 0), 0, queued=True)
