"""The radial units against their closed form, what they remember, and that they find what no linear map says."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from weighed_cases import EXPERTS, LAYERS, pairs, recall, seen_of, table, told

from moesim.predictors import RoutedLayer, RouterSpec, routed_layer
from moesim.predictors.counting import Frequency
from moesim.predictors.learned.routing_net import RoutingPredictor, RoutingSettings
from moesim.predictors.learned.routing_net_solving import PENALTY, held_out
from moesim.predictors.learned.routing_net_units import DECAY, NARROWNESS
from moesim.predictors.learned.training import Training
from moesim.predictors.ridge import Ridge
from moesim.traces import InputError, split_requests


def fitted(rows, settings=None, **training):
    predictor = RoutingPredictor(settings, Training(device="cpu", **training))
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
    for layer, distance in ((1, 1), (2, 1), (3, 3)):
        assert recall(predictor, run, layer, distance) > 0.65
    assert told(predictor, run, 2).inclusion.sum(axis=1) == pytest.approx(np.full(len(run), top_k))


def test_it_finds_what_no_linear_map_says():
    fit, run = pairs(60), pairs(20, seed=1)
    ridge = Ridge()
    ridge.fit(fit, RouterSpec(num_experts=EXPERTS, top_k=1))
    assert recall(fitted(fit), run, 2) > 0.9 > recall(ridge, run, 2) + 0.4


def test_the_readout_is_the_closed_form(usual):
    fit, _, predictor = usual
    net = predictor.net
    far_UU, scale, own = 0.0, 0.0, net.own
    for source in range(2):
        unit_UX = net.unit_UX(source, predictor.device).double().numpy()
        scale = DECAY * scale + unit_UX[:, :own].var(axis=0).sum()
        far_UU = DECAY * far_UU + np.square(unit_UX[:, None] - unit_UX[None]).sum(axis=2)
    near_UU = np.exp(-NARROWNESS * far_UU / scale)
    true_UE = np.zeros((len(fit), EXPERTS))
    rows = {(r, p): i for i, (r, p) in enumerate(zip(fit.request, fit.position, strict=True))}
    at = [rows[r, p] for r, p in zip(net.request_U.tolist(), net.position_U.tolist(), strict=True)]
    np.put_along_axis(true_UE, fit.topk_ids[at, 2].astype(np.int64), 1.0, axis=1)
    solved = np.linalg.solve(near_UU + PENALTY * np.eye(len(fit)), true_UE - true_UE.mean(axis=0))
    assert near_UU @ net.readout_SDUE[1, 0].double().numpy() == pytest.approx(near_UU @ solved, abs=5e-3)


def test_sharpness_comes_from_units_that_the_others_forecast(usual):
    """Fitted on what it was solved from it would be near the largest there is; calibrated, it is right as often as it
    says."""
    _, run, predictor = usual
    inclusion = told(predictor, run, 2).inclusion
    best = np.take_along_axis(inclusion, inclusion.argmax(axis=1)[:, None], axis=1)[:, 0]
    right = (run.topk_ids[:, 2] == inclusion.argmax(axis=1)[:, None]).any(axis=1)
    assert best.mean() == pytest.approx(right.mean(), abs=0.07)


def test_nothing_is_said_before_a_layer_has_routed_or_too_far(usual):
    fit, run, predictor = usual
    prior = Frequency()
    prior.fit(fit, RouterSpec(num_experts=EXPERTS, top_k=2))
    assert (told(predictor, run, 0).load == prior.forecast(seen_of(run, 0), 0).load).all()
    near = fitted(fit, RoutingSettings(ahead=1))
    assert (told(near, run, 3, distance=2).load == prior.forecast(seen_of(run, 2), 3).load).all()


def test_a_request_in_two_steps_is_as_one_once_the_first_has_ended(usual):
    _, run, predictor = usual
    request = run.take(np.flatnonzero(run.request == run.request[0]))
    first, second = request.take(slice(0, 7)), request.take(slice(7, None))
    whole = told(predictor, request, 2).inclusion[7:]
    alone = told(predictor, second, 2).inclusion
    assert np.abs(whole - alone).max() > 1e-3
    went_on = deepcopy(predictor)
    before = seen_of(first, 3)
    went_on.forecast(before, 3)
    assert np.array_equal(told(went_on, second, 2).inclusion, alone), "that step has not ended"
    before.routed.append(routed_layer(first, 3))
    went_on.observe(before)
    assert told(went_on, second, 2).inclusion == pytest.approx(whole, abs=1e-3)
    assert np.array_equal(told(predictor, second, 2).inclusion, alone), "a copy has its own memory"
    later = replace(second, position=second.position + 1)
    assert told(went_on, later, 2).inclusion == pytest.approx(alone, abs=1e-3), "tokens between were not seen"


def test_later_tokens_and_other_requests_do_not_matter(usual):
    _, run, predictor = usual
    step = run.take(slice(0, 24))
    ids = step.topk_ids.copy()
    ids[9:] = np.random.default_rng(0).permutation(ids[9:])
    plain, other = (told(predictor, rows, 2).inclusion for rows in (step, replace(step, topk_ids=ids)))
    assert plain[:9] == pytest.approx(other[:9], abs=1e-5)
    assert np.abs(plain[9:] - other[9:]).max() > 1e-3


def test_saved_and_loaded_it_says_the_same_to_the_bit(usual, tmp_path):
    _, run, predictor = usual
    predictor.save(tmp_path / "x.safetensors")
    other = RoutingPredictor(training=Training(device="cpu"))
    other.load(tmp_path / "x.safetensors", RouterSpec(num_experts=EXPERTS, top_k=2), LAYERS)
    assert np.array_equal(told(other, run, 3, 2).inclusion, told(predictor, run, 3, 2).inclusion)
    assert other.cost() == predictor.cost() and predictor.cost().flops > 0


def test_interrupted_it_goes_on_to_the_same_bits(usual, tmp_path):
    fit, run, predictor = usual
    path = tmp_path / "x.safetensors"

    def interrupt(done, *_):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(fit, checkpoint=path, progress=interrupt)
    steps = []
    again = fitted(fit, checkpoint=path, progress=lambda *step: steps.append(step[:2]))
    assert np.array_equal(told(again, run, 3).inclusion, told(predictor, run, 3).inclusion)
    assert steps == [(done, LAYERS - 1) for done in range(1, LAYERS)]
    with pytest.raises(InputError, match="seed"):
        fitted(fit, checkpoint=path, seed=1)


def test_more_tokens_than_units(usual):
    fit, run, _ = usual
    few = [fitted(fit, RoutingSettings(units=100), seed=seed) for seed in (1, 1, 2)]
    loads = [told(predictor, run, 2).load for predictor in few]
    assert (loads[0] == loads[1]).all() and not (loads[0] == loads[2]).all()
    assert recall(few[0], run, 2) > 0.6


def test_gate_weights_that_are_missing_later_are_named(usual):
    _, run, predictor = usual
    seen = seen_of(run, 0)
    seen.routed.append(RoutedLayer(ids=run.topk_ids[:, 0]))
    with pytest.raises(InputError, match="'routing-net' was fitted with gate weights"):
        predictor.forecast(seen, 1)


def test_too_many_experts_are_refused():
    rows = table(top_k=1, layers=3)
    with pytest.raises(InputError, match="3 layers of 600000 experts are too many"):
        RoutingPredictor().fit(rows, RouterSpec(num_experts=600_000, top_k=1))


def test_one_layer_and_one_request_are_enough():
    rows = table(layers=1, requests=1)
    predictor = fitted(rows)
    assert told(predictor, rows, 0).load.sum() == pytest.approx(2 * len(rows))
    predictor.observe(seen_of(rows, 1))


def test_whole_requests_are_held_out():
    assert held_out(np.repeat(np.arange(10), 30)) == 30
    assert held_out(np.repeat([1, 2], [100, 50])) == 15, "the last one begins too early: part of it"
    assert held_out(np.zeros(40, np.int32)) == 4
