"""Mixture weights by hand, and mixtures of predictors that do and do not know."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import make_table, with_router_inputs
from moesim.predictors import Ema, Frequency, Markov, Mixture, RouterSpec, Seen, TokenTableLookup, routed_layer
from moesim.predictors.mixture import mixture_weights
from moesim.traces import StepTokens, split_requests

ROUTER = RouterSpec(num_experts=8, top_k=1)


def fitted(predictor, table, router=ROUTER):
    predictor.fit(table, router)
    return predictor


def seen_of(table, point, count=200):
    rows = slice(0, count)
    tokens = StepTokens(request=table.request[rows], position=table.position[rows], token_id=table.token_id[rows])
    return Seen(step=0, tokens=tokens, routed=[routed_layer(table, i, rows) for i in range(point)])


@pytest.fixture(scope="module")
def parts():
    return split_requests(make_table(requests=80, layers=4, noise=0.1))


def test_weights_by_hand():
    # Two that say 0 of each other's observations share them as they are: three to one.
    assert mixture_weights(np.array([[0.5, 0], [0.5, 0], [0.5, 0], [0, 0.1]])) == pytest.approx([0.75, 0.25])


def test_weights_are_the_likeliest():
    p_NM = np.random.default_rng(0).random((500, 2)) ** np.array([1, 2])
    grid = np.linspace(0, 1, 1001)
    likelihood = np.log(p_NM @ np.stack([grid, 1 - grid])).sum(axis=0)
    assert mixture_weights(p_NM)[0] == pytest.approx(grid[likelihood.argmax()], abs=0.02)


def test_whoever_knows_is_heard():
    table = make_table(requests=80, layers=3, noise=0)  # layer 0 follows from the vocabulary id
    table.topk_ids[:, 1, 0] = np.random.default_rng(0).integers(0, 8, len(table))
    table.topk_ids[:, 2] = (table.topk_ids[:, 1] + 3) % 8
    predictor = fitted(Mixture((Frequency, Markov, TokenTableLookup)), table)
    assert predictor.weight_LDM.sum(axis=2) == pytest.approx(1)
    assert predictor.weight_LDM[0, 0, 2] > 0.95, "layer 0, at the start: the vocabulary"
    assert predictor.weight_LDM[2, 1, 1] > 0.95, "layer 2 follows from layer 1"


def test_it_explains_as_much_as_its_best_member(parts):
    fit, run = parts

    def explained(predictor, layer, point):
        inclusion = fitted(predictor, fit).forecast(seen_of(run, point), layer).inclusion
        return np.log(np.take_along_axis(inclusion, run.topk_ids[:200, layer].astype(int), axis=1)).mean()

    for layer, point in ((0, 0), (2, 2), (3, 2)):
        best = max(explained(kind(), layer, point) for kind in (Frequency, Markov, TokenTableLookup))
        assert explained(Mixture(), layer, point) > best - 0.01


def test_a_forecast_is_the_weighted_sum(parts):
    fit, run = parts
    predictor, seen = fitted(Mixture((Frequency, Markov)), fit), seen_of(run, 2)
    frequency, markov = (fitted(kind(), fit).forecast(seen, 3).load for kind in (Frequency, Markov))
    weight = predictor.weight_LDM[3, 2]
    assert predictor.forecast(seen, 3).load == pytest.approx(weight[0] * frequency + weight[1] * markov)


def test_a_queued_step_is_what_its_members_say_of_it(parts):
    fit, run = parts
    predictor, seen = fitted(Mixture(), fit), seen_of(run, 2)
    seen.queued = seen_of(run, 0, count=50).tokens
    queued = predictor.forecast(seen, 1, queued=True)
    assert queued.load.sum() == pytest.approx(50)
    assert queued.load == pytest.approx(predictor.forecast(seen_of(run, 0, count=50), 1).load)


def test_members_that_lack_something_are_left_out(parts):
    without = replace(parts[0], token_id=None)
    assert [m.name for m in fitted(Mixture(), without).members] == ["frequency", "markov", "markov-2", "path"]
    table, _ = with_router_inputs(make_table(requests=8))
    assert [m.name for m in fitted(Mixture(), table).members][-2:] == ["token-table", "cross-gate-over"]


def test_one_request_leaves_nothing_to_weigh_on():
    predictor = fitted(Mixture((Frequency, Markov)), make_table(requests=1))
    assert predictor.weight_LDM == pytest.approx(0.5)


def test_members_must_speak_of_single_tokens(parts):
    with pytest.raises(AssertionError, match="ema says nothing of single tokens"):
        fitted(Mixture((Frequency, Ema)), parts[0])
