"""Predictors that read what later gates said, against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import make_table, with_router_inputs
from moesim.predictors import PREDICTORS, CrossGate, Frequency, RouterSpec, Seen, StackedGate, routed_layer
from moesim.traces import InputError, StepTokens, split_requests

NAMES = ["cross-gate", "cross-gate-over", "stacked-gate"]


def fitted(predictor, table, experts=4):
    predictor.fit(table, RouterSpec(num_experts=experts, top_k=table.topk_ids.shape[2]))
    return predictor


def seen_of(table, point, rows=slice(0, 200)):
    tokens = StepTokens(request=table.request[rows], position=table.position[rows])
    return Seen(step=0, tokens=tokens, routed=[routed_layer(table, i, rows) for i in range(point)])


def by_hand():
    """Four tokens, three layers, four experts; layer 0 names two ids for each of the next two layers."""
    table = make_table(requests=1, length=4, layers=3, experts=4)
    table.topk_ids[:, :, 0] = [[0, 1, 2], [0, 1, 2], [0, 2, 2], [0, 3, 3]]
    ahead = np.zeros((4, 3, 2, 2), np.uint8)
    ahead[:, 0, 0] = [[1, 0], [1, 2], [1, 2], [1, 0]]  # of layer 1: the first is right twice, the second once
    ahead[:, 0, 1] = [[2, 0], [2, 0], [2, 3], [0, 3]]  # of layer 2: three times, once
    ahead[:, 1, 0] = [[2, 0], [2, 0], [0, 2], [3, 0]]  # of layer 2: three times, once
    return replace(table, lookahead_ids=ahead)


def test_strict_cross_gate_by_hand():
    table = by_hand()
    forecast = fitted(CrossGate(), table).forecast(seen_of(table, 1), 2)
    assert forecast.topk.tolist() == [[2], [2], [2], [0]]
    # The first rank was right 3 times of 4, smoothed by 1/4 of 1; what is left goes to 3, the other expert there was.
    hit = 3.25 / 5
    assert forecast.inclusion[0] == pytest.approx([0, 0, hit, 1 - hit], abs=1e-6)
    assert forecast.inclusion[3] == pytest.approx([hit, 0, (1 - hit) * 3 / 4, (1 - hit) / 4], abs=1e-6)


def test_over_fetched_cross_gate_by_hand():
    table = by_hand()
    forecast = fitted(CrossGate(over=True), table).forecast(seen_of(table, 1), 1)
    first, second = 2.25 / 5, 1.25 / 5
    rest = 1 - first - second
    # Of layer 1, frequency is (0, 2, 1, 1) / 4; token 0 was told 1 and 0, so 2 and 3 share the rest.
    assert forecast.inclusion[0] == pytest.approx([second, first, rest / 2, rest / 2], abs=1e-6)
    assert forecast.inclusion[1] == pytest.approx([0, first, second, rest], abs=1e-6)
    assert forecast.topk.shape == (4, 2) and forecast.topk[0, 0] == 1


def test_what_a_rank_is_worth_by_hand():
    predictor = fitted(StackedGate(), by_hand())
    newest, older = predictor.lift_NM[2]
    # Of 4 choices the first rank has 3, the second 1, the two ranks beyond none; by chance it would be 1, 1 and 2.
    expected = np.log([4 / 2, 2 / 2, 1 / 3])
    assert newest == pytest.approx(expected) and older == pytest.approx(expected)
    assert [len(lift) for lift in predictor.lift_NM] == [0, 1, 2]


def test_an_id_named_again_counts_where_it_was_named_first():
    table = by_hand()
    ahead = np.zeros((4, 3, 2, 3), np.uint8)
    ahead[:, :, :, :2] = table.lookahead_ids
    ahead[:, :, :, 2] = ahead[:, :, :, 0]
    plain = fitted(StackedGate(), table)
    twice = fitted(StackedGate(), repeated := replace(table, lookahead_ids=ahead))
    for lift_NM, expected_NM in zip(twice.lift_NM[1:], plain.lift_NM[1:], strict=True):
        assert lift_NM[:, [0, 1, 3]] == pytest.approx(expected_NM)
        assert (lift_NM[:, 2] == 0).all(), "nobody was asked in the third rank"
    expected = plain.forecast(seen_of(table, 2), 2)
    assert twice.forecast(seen_of(repeated, 2), 2).inclusion == pytest.approx(expected.inclusion, abs=1e-6)


def opinions(right, tokens=4000, copies=False):
    """Two opinions about layer 2 that name the true expert first with the given chance, else any; or one, twice."""
    rng = np.random.default_rng(0)
    table = make_table(requests=40, length=tokens // 40, layers=3, experts=8)
    table.topk_ids[:, :, 0] = rng.integers(0, 8, (tokens, 3))
    ahead = np.zeros((tokens, 3, 2, 1), np.uint8)
    for source, distance in ((1, 0), (0, 1)):
        true, other = table.topk_ids[:, 2, 0], rng.integers(0, 8, tokens)
        ahead[:, source, distance, 0] = np.where(rng.random(tokens) < right, true, other)
    if copies:
        ahead[:, 0, 1] = ahead[:, 1, 0]
    return replace(table, lookahead_ids=ahead)


def test_independent_opinions_add_up():
    table = opinions(0.5)
    inclusion = fitted(StackedGate(), table, 8).forecast(seen_of(table, 2, slice(None)), 2).inclusion
    told = table.lookahead_ids[:, [1, 0], [0, 1], 0]
    agreed = told[:, 0] == told[:, 1]
    # Each names the true expert with chance 9/16: (9/16)^2 against seven pairs of (1/16)^2 when they agree.
    chance = np.take_along_axis(inclusion, told[:, :1].astype(int), axis=1)[:, 0]
    assert chance[agreed].mean() == pytest.approx(81 / 88, abs=0.05)
    assert chance[~agreed].mean() == pytest.approx(9 / 24, abs=0.05)


def test_an_opinion_repeated_is_one_opinion():
    table = opinions(0.5, copies=True)
    predictor = fitted(StackedGate(), table, 8)
    assert predictor.exponent_N[2, 0][1:].sum() == pytest.approx(1, abs=0.1)
    inclusion = predictor.forecast(seen_of(table, 2, slice(None)), 2).inclusion
    told = table.lookahead_ids[:, 1, 0].astype(int)
    assert np.take_along_axis(inclusion, told, axis=1).mean() == pytest.approx(9 / 16, abs=0.05)


@pytest.fixture(scope="module")
def parts():
    table, _ = with_router_inputs(make_table(requests=60, layers=4, top_k=2, noise=0.5))
    return split_requests(table)


def recall(predictor, run, point, layer):
    topk = predictor.forecast(seen_of(run, point), layer).topk[:, :2]
    return (run.topk_ids[:200, layer, :, None] == topk[:, None, :]).any(axis=2).mean()


@pytest.mark.parametrize("name", NAMES)
def test_gates_tell_what_frequency_cannot(name, parts):
    fit, run = parts
    assert recall(fitted(PREDICTORS[name](), fit, 8), run, 2, 2) > recall(fitted(Frequency(), fit, 8), run, 2, 2) + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_where_no_gate_was_asked_it_is_the_frequency(name, parts):
    fit, run = parts
    predictor, frequency = fitted(PREDICTORS[name](), fit, 8), fitted(Frequency(), fit, 8)
    start, near, without = seen_of(run, 0), seen_of(run, 1), seen_of(replace(run, lookahead_ids=None), 2)
    near.queued = start.tokens
    for seen, layer, queued in ((start, 2, False), (near, 3, False), (near, 1, True), (without, 2, False)):
        expected = frequency.forecast(seen, layer, queued=queued)
        assert predictor.forecast(seen, layer, queued=queued).load == pytest.approx(expected.load)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_recorded_ids_are_refused(name, parts):
    narrow = replace(parts[0], lookahead_ids=parts[0].lookahead_ids[..., :1])
    with pytest.raises(InputError, match="first 2 experts of later gates, and this recording has 1"):
        fitted(PREDICTORS[name](), narrow, 8)
