"""Scores against numbers worked out by hand, and the multinomial floor against draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.predictors import Forecast, from_inclusion, from_probabilities
from moesim.predictors.base import inclusion_of
from moesim.predictors.scores import Score, multinomial_floor


def scored(forecast, ids, widths=(1, 2)):
    score = Score(widths=widths)
    score.add(forecast, np.array(ids), 0.5)
    return score.summary()


def test_two_tokens_by_hand():
    # Token 0 is right at once, token 1 at the second guess; experts 0 and 2 get a token each, 1.3, .4, .3 are forecast.
    told = scored(from_probabilities(np.array([[0.8, 0.2, 0.0], [0.5, 0.2, 0.3]]), 1), [[0], [2]])
    assert told["first_recall"] == told["recall_at_1"] == told["precision_at_1"] == 0.5
    assert told["recall_at_2"] == 1.0 and told["precision_at_2"] == 0.5
    assert told["load_error_tokens"] == pytest.approx((0.3 + 0.4 + 0.7) / 3)
    assert told["load_error"] == pytest.approx(1.4 / 2 / 2)
    # Said: .8, .2 twice, 0, .5, .3, each in a bin of its own but for the two .2; came true: .8 and .3.
    assert told["calibration_error"] == pytest.approx((0.2 + 0.4 + 0 + 0.5 + 0.7) / 2)
    assert told["us_per_token"] == pytest.approx(0.25e6)


def test_overloaded_experts_by_hand():
    # Overloaded is more than twice the mean: expert 0 with 6 of 8 tokens is, nobody of the first forecast is.
    forecast = Forecast(load=np.array([4.4, 4.4, 0.1, 0.0]))
    told = scored(forecast, [[0]] * 6 + [[1]] * 2)
    assert told["overloaded_recall"] == 0.0 and told["overloaded_precision"] is None
    told = scored(Forecast(load=np.array([8.0, 0.0, 0.0, 0.0])), [[0]] * 6 + [[1]] * 2)
    assert told["overloaded_recall"] == told["overloaded_precision"] == 1.0
    assert told["recall_at_1"] is None and told["loads_within_2sd"] is None


def test_loads_within_two_deviations():
    even = from_probabilities(np.full((16, 2), 0.5), 1)
    assert even.load_sd == pytest.approx([2.0, 2.0])
    assert scored(even, [[0]] * 12 + [[1]] * 4)["loads_within_2sd"] == 1.0
    assert scored(even, [[0]] * 13 + [[1]] * 3)["loads_within_2sd"] == 0.0


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 12), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_inclusion_sums_to_k_and_keeps_the_order(seed, tokens, experts, top_k):
    top_k = min(top_k, experts)
    p = np.random.default_rng(seed).dirichlet(np.full(experts, 0.2), tokens)
    told = inclusion_of(p, top_k)
    assert told.sum(axis=1) == pytest.approx(np.full(tokens, top_k), abs=1e-6)
    assert (told >= 0).all() and (told <= 1 + 1e-9).all()
    order = np.argsort(p, axis=1)
    assert (np.diff(np.take_along_axis(told, order, axis=1), axis=1) >= -1e-9).all()


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_perfect_forecast_has_no_error(seed, tokens, top_k):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, 8)), axis=1)[:, :top_k]
    sure = np.zeros((tokens, 8))
    np.put_along_axis(sure, ids, 1.0, axis=1)
    told = scored(from_inclusion(sure, top_k), ids, widths=(top_k,))
    assert told["first_recall"] == told[f"recall_at_{top_k}"] == told[f"precision_at_{top_k}"] == 1.0
    assert told["load_error"] == told["calibration_error"] == 0.0 and told["loads_within_2sd"] == 1.0


@pytest.mark.parametrize(("tokens", "top_k"), [(3, 1), (64, 1), (500, 1), (64, 2)])
def test_the_floor_is_what_knowing_the_shares_leaves(tokens, top_k):
    rng = np.random.default_rng(1)
    share = rng.dirichlet(np.ones(10))
    if top_k == 2:
        share = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.03, 0.02])
    drawn = rng.binomial(tokens, share * top_k, size=(40_000, 10))
    expected = np.abs(drawn - tokens * share * top_k).sum(axis=1).mean() / 2 / (tokens * top_k)
    assert multinomial_floor(share, tokens, top_k) == pytest.approx(expected, rel=0.02)
