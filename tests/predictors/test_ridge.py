"""The ridge against its closed form in float64, its kernels against numpy, and that it learns what can be learned."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_table
from moesim.predictors import RoutedLayer, RouterSpec, Seen, routed_layer
from moesim.predictors.base import inclusion_of
from moesim.predictors.kernels import described, linear
from moesim.predictors.ridge import PENALTY, OnlineRidge, Ridge
from moesim.predictors.stack import LEAST, Stack, fit_stack
from moesim.traces import InputError, split_requests, step_tokens

EXPERTS = 8


def table(top_k=2, layers=4, **changes):
    made = make_table(**{"requests": 60, "length": 16, "layers": layers, "top_k": top_k, "noise": 0.1, **changes})
    weights = np.random.default_rng(5).dirichlet(np.ones(EXPERTS), made.topk_ids.shape[:2])
    return replace(made, topk_weights=np.sort(weights, axis=2)[:, :, ::-1][:, :, :top_k].astype(np.float16))


def fitted(rows, predictor=None):
    predictor = predictor or Ridge()
    predictor.fit(rows, RouterSpec(num_experts=EXPERTS, top_k=rows.topk_ids.shape[2]))
    return predictor


def seen_of(rows, layers, step=0):
    tokens = step_tokens(rows, np.arange(len(rows)))
    return Seen(step=step, tokens=tokens, routed=[routed_layer(rows, layer) for layer in range(layers)])


def recall(predictor, rows, layer, distance=1):
    told = predictor.forecast(seen_of(rows, layer - distance + 1), layer)
    return (told.topk[:, :, None] == rows.topk_ids[:, None, layer]).any(axis=1).mean()


@pytest.mark.parametrize("weights", [True, False])
def test_the_maps_are_the_closed_form(weights):
    rows = table() if weights else replace(table(), topk_weights=None)
    predictor = fitted(rows)
    for last, distance in ((0, 1), (1, 2), (2, 1)):
        described = [predictor._describe(routed_layer(rows, layer)) for layer in range(last + 1)]
        x = np.concatenate([predictor._describe.dense(one) for one in described], axis=1).astype(np.float64)
        y = np.zeros((len(rows), EXPERTS))
        np.put_along_axis(y, rows.topk_ids[:, last + distance].astype(np.int64), 1.0, axis=1)
        centred = x - x.mean(axis=0)
        solved = np.linalg.solve(centred.T @ centred + PENALTY * np.eye(x.shape[1]), centred.T @ (y - y.mean(axis=0)))
        assert predictor._scores(described, distance) == pytest.approx(centred @ solved + y.mean(axis=0), abs=2e-4)


def test_what_is_predictable_is_predicted_further_ahead_too():
    fit, run = split_requests(table())
    predictor = fitted(fit)
    assert recall(predictor, run, 2) > 0.8
    assert recall(predictor, run, 3, distance=3) > 0.6
    assert recall(predictor, run, 0) > 0.8, "before the first layer the vocabulary ids are all there is"


def test_it_beats_the_last_layer_alone_where_an_earlier_one_matters():
    rng = np.random.default_rng(0)
    rows = table(top_k=1, layers=3, noise=1.0)
    ids = rows.topk_ids.copy()
    ids[:, 2] = ids[:, 0]
    other = replace(rows, topk_ids=ids, token_id=rng.integers(0, 50, len(rows)).astype(np.int32))
    fit, run = split_requests(other)
    assert recall(fitted(fit), run, 2) == 1.0


@pytest.mark.parametrize("top_k", [1, 3])
def test_probabilities_are_whole_and_calibrated(top_k):
    fit, run = split_requests(table(top_k=top_k, requests=200))
    told = fitted(fit).forecast(seen_of(run, 2), 2)
    assert told.inclusion.sum(axis=1) == pytest.approx(np.full(len(run), top_k), abs=1e-4)
    assert told.inclusion.min() >= 0 and told.inclusion.max() <= 1
    assert told.load == pytest.approx(told.inclusion.sum(axis=0), rel=1e-5)
    best = np.take_along_axis(told.inclusion, told.topk[:, :1], axis=1)[:, 0]
    right = (told.topk[:, :1] == run.topk_ids[:, 2]).any(axis=1)
    assert best.mean() == pytest.approx(right.mean(), abs=0.06)


def test_a_step_is_described_once_and_the_same():
    fit, run = split_requests(table())
    predictor, seen = fitted(fit), seen_of(run, 0)
    for layer in range(3):
        seen.routed.append(routed_layer(run, layer))
        at_once = predictor.forecast(seen_of(run, layer + 1), layer + 1)
        assert np.array_equal(predictor.forecast(seen, layer + 1).inclusion, at_once.inclusion)


def test_it_recovers_after_a_shift_and_the_other_does_not():
    fit, _ = split_requests(table())
    shifted = table(seed=9, requests=400)
    changed = replace(shifted, topk_ids=(EXPERTS - 1 - shifted.topk_ids).astype(np.uint8), token_id=None)
    bare = replace(fit, token_id=None)
    adapting, fixed = fitted(bare, OnlineRidge(every=512)), fitted(bare)
    before = recall(adapting, changed, 2)
    for begin in range(0, 4096, 256):
        step = changed.take(slice(begin, begin + 256))
        adapting.observe(seen_of(step, 4))
    later = changed.take(slice(4096, None))
    assert recall(adapting, later, 2) > 0.75 > recall(fixed, later, 2) + 0.2
    assert recall(fixed, later, 2) == pytest.approx(before, abs=0.05)


def test_gate_weights_that_are_missing_later_are_named():
    predictor = fitted(table())
    seen = seen_of(table(), 0)
    seen.routed.append(RoutedLayer(ids=table().topk_ids[:, 0]))
    with pytest.raises(InputError, match="'ridge' was fitted with gate weights"):
        predictor.forecast(seen, 1)


def test_too_many_experts_are_refused():
    rows = table(top_k=1, layers=3)
    with pytest.raises(InputError, match="3 layers of 9000 experts are too many"):
        Ridge().fit(rows, RouterSpec(num_experts=9000, top_k=1))


def test_one_layer_and_one_request_are_enough():
    rows = table(layers=1, requests=1)
    told = fitted(rows).forecast(seen_of(rows, 0), 0)
    assert told.load.sum() == pytest.approx(2 * len(rows))


def test_a_token_is_forecast_the_same_in_any_company():
    fit, run = split_requests(table(top_k=3))
    predictor = fitted(fit)
    together = predictor.forecast(seen_of(run, 2), 2)
    for rows in (slice(0, 1), slice(3, 70)):
        apart = predictor.forecast(seen_of(run.take(rows), 2), 2)
        assert np.array_equal(apart.inclusion, together.inclusion[rows])
        assert np.array_equal(apart.topk, together.topk[rows])


@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([1, 2, 3]), st.booleans(), st.sampled_from([5, 8, 64]))
@settings(max_examples=25, deadline=None)
def test_the_compiled_sum_is_that_of_numpy(seed, top_k, numbers, own, experts):
    rng = np.random.default_rng(seed)
    T, N = 7, 5
    ids = rng.integers(0, experts, (N, top_k)).astype(np.uint8)
    values, owns = rng.normal(size=(N, top_k, numbers)).astype(np.float32), rng.normal(size=N).astype(np.float32)
    rows = rng.normal(size=(numbers * experts + own, experts)).astype(np.float32)
    score = rng.normal(size=(T, experts)).astype(np.float32)
    added = np.zeros((N + 1, experts)) + (np.append(owns, 0)[:, None] * rows[-1] if own else 0)
    for k in range(top_k):
        for c in range(numbers):
            added[:-1] += values[:, k, c, None] * rows[numbers * ids[:, k].astype(int) + c]
    read = rng.integers(-1, N, T)
    expected = score + added[read]
    linear(experts, numbers)(read, ids, values, owns, rows, score)
    assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("experts", [8, 60])
def test_gate_weights_are_described_as_by_numpy(experts):
    w = np.array([[0.9, 0.05, 0.01], [1, 0, 0], [0.4, 0.3, 0.2]], np.float32)
    told, own = np.empty((3, 3, 3), np.float32), np.empty(3, np.float32)
    half = w.astype(np.float16)
    described(half.view(np.uint16), np.float32(experts - 3), told, own)
    log = np.log(np.maximum(half.astype(np.float64), 1e-4))
    rest = np.log(np.clip(1 - np.maximum(half, 1e-4).astype(np.float64).sum(axis=1), 1e-3, 1) / (experts - 3))
    expected = np.stack([np.ones_like(log), log + 3, 0.7 * (log - rest[:, None] - 1.5)], axis=2)
    assert told == pytest.approx(expected, abs=1e-4)
    assert own == pytest.approx(2 * (rest + 5), abs=1e-4)
    fewer = np.empty((3, 3, 2), np.float32)
    described(half.view(np.uint16), np.float32(experts - 3), fewer, own)
    assert np.array_equal(fewer, told[:, :, :2])


@pytest.mark.parametrize("weight", [0.2, 1, 5])
@pytest.mark.parametrize("bias", [-3, 0, 20])
def test_logarithm_and_exponential_are_those_of_numpy(weight, bias):
    told = np.linspace(-0.1, 1.1, 4096, dtype=np.float32).reshape(1, 64, 64)
    stack = Stack(weight_J=np.array([weight], np.float32), bias=bias)
    p = np.clip(told[0].astype(np.float64), LEAST, 1 - LEAST)
    expected = 1 / (1 + np.exp(-weight * np.log(p / (1 - p)) - bias))
    # Scaled to a sum of 1: no row has a probability that would be cut.
    said = stack.forecast(lambda _: told, [slice(0, 64)], 64, 1)
    assert said.inclusion == pytest.approx(expected / expected.sum(axis=1, keepdims=True), rel=1e-5)


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_weighing_is_that_of_numpy(seed, top_k, opinions):
    rng = np.random.default_rng(seed)
    told = rng.random((opinions, 6, EXPERTS)).astype(np.float32)
    weight = rng.random(opinions).astype(np.float32)
    forecast = Stack(weight_J=weight, bias=-0.3).forecast(lambda _: told, [slice(0, 6)], EXPERTS, top_k)
    p = np.clip(told.astype(np.float64), LEAST, 1 - LEAST)
    odds = (weight[:, None, None] * np.log(p / (1 - p))).sum(axis=0) - 0.3
    expected = 1 / (1 + np.exp(-odds))
    scaled = inclusion_of(expected, top_k) if top_k > 1 else expected / expected.sum(axis=1, keepdims=True)
    assert forecast.inclusion == pytest.approx(scaled, abs=1e-4)
    order = np.argsort(-forecast.inclusion, axis=1, kind="stable")[:, :top_k]
    assert (forecast.topk == order).all()


def test_the_stack_finds_whom_to_trust():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, EXPERTS, (2000, 1))
    good, bad = np.full((2000, EXPERTS), 0.05, np.float32), rng.random((2000, EXPERTS)).astype(np.float32)
    right = rng.random(2000) < 0.7
    np.put_along_axis(good, np.where(right[:, None], ids, (ids + 1) % EXPERTS), 0.65, axis=1)
    stack = fit_stack(np.stack([good, bad]), ids)
    assert stack.weight_J[0] > 0.8 and abs(stack.weight_J[1]) < 0.1
