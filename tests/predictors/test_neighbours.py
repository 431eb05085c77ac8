"""The search against exact distances, the kernels against numpy, and that neighbours know what no linear map says."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from weighed_cases import EXPERTS, LAYERS, pairs, recall, seen_of, table, told

from moesim.predictors import RoutedLayer, RouterSpec, routed_layer
from moesim.predictors.context import Context
from moesim.predictors.counting import Frequency
from moesim.predictors.described import Described, Describer
from moesim.predictors.kernels import add_product, linear
from moesim.predictors.learned.gate_attention_kernels import first, later
from moesim.predictors.neighbours import Neighbours, Order, words
from moesim.predictors.neighbours_fit import FAR, MEASURED, NEIGHBOURS
from moesim.predictors.neighbours_kernels import (
    BANDWIDTHS,
    SOFT,
    WINDOW,
    closest,
    followed,
    mixed,
    reader,
    shared,
    shares,
    sketcher,
    started,
)
from moesim.predictors.ridge import Ridge
from moesim.traces import InputError, StepTokens, split_requests


def fitted(rows):
    predictor = Neighbours()
    predictor.fit(rows, RouterSpec(num_experts=EXPERTS, top_k=rows.topk_ids.shape[2]))
    return predictor


@pytest.fixture(scope="module")
def usual():
    fit, run = split_requests(table())
    return fit, run, fitted(fit)


@pytest.mark.parametrize(("top_k", "weighted"), [(2, True), (1, False)])
def test_what_is_predictable_is_predicted_near_and_far(top_k, weighted):
    fit, run = split_requests(table(top_k) if weighted else replace(table(top_k), topk_weights=None))
    predictor = fitted(fit)
    for layer, distance in ((1, 1), (2, 1), (3, 3), (4, 1)):
        assert recall(predictor, run, layer, distance) > 0.65
    assert told(predictor, run, 2).inclusion.sum(axis=1) == pytest.approx(np.full(len(run), top_k), abs=1e-4)
    assert predictor.cost().flops > 0 and predictor.cost().parameters > 0


def test_it_finds_what_no_linear_map_says():
    fit, run = pairs(120), pairs(20, seed=1)
    ridge = Ridge()
    ridge.fit(fit, RouterSpec(num_experts=EXPERTS, top_k=1))
    assert recall(fitted(fit), run, 2) > 0.8 > recall(ridge, run, 2) + 0.3


def test_fitted_twice_it_says_the_same_and_a_step_leaves_no_trace(usual):
    fit, run, predictor = usual
    again = fitted(fit)
    for rows in (run, run.take(slice(0, 30)), run):
        assert np.array_equal(told(again, rows, 3).inclusion, told(predictor, rows, 3).inclusion)


def test_layer_after_layer_or_all_at_once(usual):
    _, run, predictor = usual
    seen = seen_of(run, 0)
    for layer in range(3):
        seen.routed.append(routed_layer(run, layer))
        slowly = [predictor.forecast(seen, layer + 1).inclusion for _ in range(2)]
        assert np.array_equal(slowly[0], told(predictor, run, layer + 1).inclusion)
        assert np.array_equal(slowly[0], slowly[1]), "asked twice, nothing is read twice"


def test_nothing_is_said_before_a_layer_has_routed_or_too_far(usual):
    fit, run, predictor = usual
    prior = Frequency()
    prior.fit(fit, RouterSpec(num_experts=EXPERTS, top_k=2))
    assert (told(predictor, run, 0).load == prior.forecast(seen_of(run, 0), 0).load).all()
    assert (told(predictor, run, 4, distance=4).load == prior.forecast(seen_of(run, 1), 4).load).all()


def test_a_request_in_two_steps_is_as_one_once_the_first_has_ended(usual):
    _, run, predictor = usual
    request = run.take(np.flatnonzero(run.request == run.request[0]))
    first, second = request.take(slice(0, 7)), request.take(slice(7, None))
    whole = told(predictor, request, 2).inclusion[7:]
    alone = told(predictor, second, 2).inclusion
    assert np.abs(whole - alone).max() > 1e-4
    went_on = deepcopy(predictor)
    before = seen_of(first, LAYERS - 1)
    went_on.forecast(before, LAYERS - 1)
    assert np.array_equal(told(went_on, second, 2).inclusion, alone), "that step has not ended"
    before.routed.append(routed_layer(first, LAYERS - 1))
    went_on.observe(before)
    assert told(went_on, second, 2).inclusion == pytest.approx(whole, abs=1e-5)
    assert np.array_equal(told(predictor, second, 2).inclusion, alone), "a copy has its own memory"
    later = replace(second, position=second.position + 1)
    assert told(went_on, later, 2).inclusion == pytest.approx(alone, abs=1e-6), "tokens between were not seen"


def test_later_tokens_and_other_requests_do_not_matter(usual):
    _, run, predictor = usual
    step = run.take(slice(0, 24))
    ids = step.topk_ids.copy()
    ids[9:] = np.random.default_rng(0).permutation(ids[9:])
    plain, other = (told(predictor, rows, 2).inclusion for rows in (step, replace(step, topk_ids=ids)))
    assert plain[:9] == pytest.approx(other[:9], abs=1e-5)
    assert np.abs(plain[9:] - other[9:]).max() > 1e-3


def test_gate_weights_that_are_missing_later_are_named(usual):
    _, run, predictor = usual
    seen = seen_of(run, 0)
    seen.routed.append(RoutedLayer(ids=run.topk_ids[:, 0]))
    with pytest.raises(InputError, match="'neighbours' was fitted with gate weights"):
        predictor.forecast(seen, 1)


@pytest.mark.parametrize(("layers", "length"), [(1, 12), (2, 1), (3, 5), (13, 5)])
def test_few_layers_and_one_request_are_enough(layers, length):
    rows = table(layers=layers, requests=1, length=length)
    predictor = fitted(rows)
    for layer in range(layers):
        assert told(predictor, rows, layer).load.sum() == pytest.approx(2 * len(rows), rel=1e-4)
    predictor.observe(seen_of(rows, layers))


def searched(units=3000, tokens=200):
    """Units and tokens in clusters, small numbers; and everybody's distances."""
    rng = np.random.default_rng(2)
    centre_CQ = rng.normal(size=(100, MEASURED)) * 20
    unit_UQ = (centre_CQ[rng.integers(0, 100, units)] + rng.normal(size=(units, MEASURED)) * 5).round()
    z_TQ = (centre_CQ[rng.integers(0, 100, tokens)] + rng.normal(size=(tokens, MEASURED)) * 5).round()
    unit_UQ = unit_UQ.clip(-127, 127)
    far_TU = np.square(z_TQ[:, None] - unit_UQ[None]).sum(axis=2)
    return unit_UQ.astype(np.int8), z_TQ.astype(np.int16), far_TU


def test_the_closest_are_those_of_other_requests():
    unit_UQ, _, _ = searched()
    far_UU = np.square(unit_UQ[:300, None].astype(float) - unit_UQ[None, :300]).sum(axis=2).astype(np.float32)
    request_U = np.arange(300) // 10
    found_UK, best_UK = np.zeros((300, NEIGHBOURS), np.int32), np.empty((300, NEIGHBOURS), np.float32)
    closest(far_UU, request_U, request_U, found_UK, best_UK)
    far_UU[request_U[:, None] == request_U] = np.inf
    assert np.array_equal(best_UK, np.sort(far_UU, axis=1)[:, :NEIGHBOURS])
    assert np.array_equal(np.take_along_axis(far_UU, found_UK.astype(np.int64), axis=1), best_UK)


def test_a_search_finds_the_nearest_from_where_it_begins():
    unit_UQ, z_TQ, far_TU = searched()
    far_UU = np.square(unit_UQ[:, None].astype(np.float32) - unit_UQ[None].astype(np.float32)).sum(axis=2)
    near_UN = np.argsort(far_UU, axis=1)[:, 1:9].astype(np.int32)
    found_TK, far_TK = np.full((200, NEIGHBOURS), -1, np.int32), np.full((200, NEIGHBOURS), FAR, np.int32)
    begin_TC = np.argsort(far_TU, axis=1)[:, 5:37].astype(np.int32)
    started(np.arange(200) * WINDOW, begin_TC[:, ::-1].ravel(), z_TQ, unit_UQ, found_TK, far_TK)
    assert np.array_equal(np.sort(far_TK), np.sort(far_TU)[:, 5 : 5 + NEIGHBOURS]), "the nearest candidates"
    for _ in range(4):
        followed(near_UN, z_TQ, unit_UQ, found_TK, far_TK, 4)
    assert np.array_equal(far_TK, np.take_along_axis(far_TU, found_TK.astype(np.int64), axis=1)), "nobody twice, exact"
    assert all(len(set(found_K)) == NEIGHBOURS for found_K in found_TK.tolist())
    nearest_TK = np.argsort(far_TU, axis=1)[:, :NEIGHBOURS]
    assert (found_TK[:, :, None] == nearest_TK[:, None]).any(axis=2).mean() > 0.9


def test_what_neighbours_say_is_their_weighed_mean():
    rng = np.random.default_rng(0)
    found_TK = rng.integers(0, 50, (9, NEIGHBOURS)).astype(np.int32)
    far_TK = rng.integers(0, 4000, (9, NEIGHBOURS)).astype(np.int32)
    far_TK[0] = FAR
    residual_UE, gain_B = (
        rng.integers(-127, 128, (50, EXPERTS)).astype(np.int8),
        np.array([0.1, -0.2, 0.6, 0.4], np.float32),
    )
    said_TE = np.ones((9, EXPERTS), np.float32)
    mixed(found_TK, far_TK, np.float32(1e-3), gain_B, residual_UE, np.float32(0.01), said_TE)
    expected_TE = np.ones((9, EXPERTS))
    for b in range(BANDWIDTHS):
        weight_TK = np.exp(-(2.0**b) * 1e-3 * far_TK)
        weight_TK *= gain_B[b] / (weight_TK.sum(axis=1, keepdims=True) + SOFT[b])
        expected_TE += np.einsum("tk,tke->te", weight_TK, 0.01 * residual_UE[found_TK])
    assert said_TE == pytest.approx(expected_TE, abs=1e-5)


def test_units_next_to_a_token_begin_alike():
    ids_UK = np.random.default_rng(0).integers(0, EXPERTS, (500, 2))
    order = Order.of(ids_UK, EXPERTS)
    rows = np.arange(499, -1, -1)
    first_T = order.next_to(ids_UK, rows)
    assert first_T.min() >= 0 and first_T.max() == 500 - WINDOW
    beside_TW = order.unit_U[first_T[:, None] + np.arange(WINDOW)]
    assert (ids_UK[beside_TW, 0] == ids_UK[rows, :1]).mean() > 0.7
    middle = np.searchsorted(order.word_U, words(ids_UK[rows], EXPERTS)) - WINDOW // 2
    assert np.array_equal(first_T, middle.clip(0, 500 - WINDOW))
    assert not Order.of(ids_UK[:7], EXPERTS).next_to(ids_UK, rows[:3]).any(), "all of a few"
    assert (words(np.full((1, 8), 255), 256) > 0).all(), "as many choices as there is room for"


def test_shares_and_what_is_before_are_of_the_same_request():
    tokens = StepTokens(request=np.array([3, 3, 3, 5, 5], np.int32), position=np.arange(5, dtype=np.int32))
    ids_TK = np.array([[0, 1], [0, 2], [0, 1], [4, 5], [4, 6]])
    context = Context(tokens, EXPERTS, {})
    shares_TE = context.shares(ids_TK, 0, np.empty((5, EXPERTS), np.float32))
    assert shares_TE[:, 0].tolist() == [1, 1, 1, 0, 0] and shares_TE[4, 5] == 0.5
    assert shares_TE[2, 1] == pytest.approx(2 / 3)
    ones_NKC, own_N = np.ones((5, 2, 1), np.float32), np.arange(5, dtype=np.float32)
    before = context.before(Described(ids=ids_TK, values_NKC=ones_NKC, own_N=own_N, row_T=np.arange(5)), 0)
    assert before.row_T.tolist() == [-1, 0, 1, -1, 3]
    dense_TF = Describer(predictor="", experts=EXPERTS, top_k=2, weighted=False).dense(before)
    assert [np.flatnonzero(row).tolist() for row in dense_TF] == [[], [0, 1], [0, 2], [], [4, 5]]


@pytest.mark.parametrize("rows", [slice(0, 9), slice(0, 4), slice(3, 9), slice(5, 6)])
def test_what_shares_say_is_added_up_token_by_token(rows):
    """The same as by `shares` and a product, wherever one begins; and of a request that goes on."""
    rng = np.random.default_rng(0)
    ids_TK, by_EE = rng.integers(0, EXPERTS, (9, 2)), rng.normal(size=(EXPERTS, EXPERTS)).astype(np.float32)
    first_R, tokens_R = np.array([0, 4, 5]), np.array([3, 0, 2], np.float32)
    count_RE = rng.integers(0, 3, (3, EXPERTS)).astype(np.float32) * (tokens_R[:, None] > 0)
    share_TE = np.empty((9, EXPERTS), np.float32)
    shares(ids_TK, first_R, count_RE.copy(), tokens_R, share_TE)
    told_TE = np.ones((rows.stop - rows.start, EXPERTS), np.float32)
    shared(ids_TK, first_R, count_RE, tokens_R, by_EE, rows.start, told_TE)
    assert told_TE == pytest.approx(1 + (share_TE @ by_EE)[rows], abs=1e-5)


@pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 8, 3), (16, 128, 64), (37, 24, 60), (17, 13, 5)])
def test_the_compiled_product_is_that_of_numpy(tokens, rows, width):
    rng = np.random.default_rng(0)
    shapes = (tokens, rows), (rows, width), (tokens, width)
    given, by, score = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    expected = score.astype(np.float64) + given.astype(np.float64) @ by
    add_product((rows, width), given, by, score)
    assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "kernel", [linear(8, 1), sketcher(8, 1), reader(8, 1), first(16, 8, 8, 8, 8, 1), later(16, 8, 8, 8, 1)]
)
def test_sizes_are_all_that_is_compiled_in(kernel):
    """What numba keeps is found again by them; a kernel among them is another one in every process, which then compiles
    anew for seconds and leaves a file each time."""
    assert all(type(cell.cell_contents) is int for cell in kernel.py_func.__closure__)
