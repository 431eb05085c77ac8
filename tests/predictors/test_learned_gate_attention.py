"""The attention draft: it learns, sees its own request only and, where the stack is causal, nothing later."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import make_table, with_router_inputs
from moesim.predictors import RouterSpec, Seen, routed_layer
from moesim.predictors.counting import Frequency
from moesim.predictors.learned.gate_attention import BUCKETS, GateAttention, buckets
from moesim.predictors.learned.training import Training
from moesim.traces import Phase, split_requests, step_tokens

EXPERTS, LAYERS = 8, 4


def recording(top_k=1, phase=Phase.ENCODER, requests=80):
    made = make_table(requests=requests, length=12, layers=LAYERS, top_k=top_k, noise=0.1, phase=phase)
    table, gates = with_router_inputs(made)
    fit, run = split_requests(table)
    return fit, run, RouterSpec(num_experts=EXPERTS, top_k=top_k, gates=gates)


def fitted(fit, router, epochs=12, seed=0):
    predictor = GateAttention(training=Training(epochs=epochs, batch_tokens=128, learning_rate=1e-2, seed=seed))
    predictor.fit(fit, router)
    return predictor


@pytest.fixture(scope="module")
def encoder():
    fit, run, router = recording()
    return fit, run, router, fitted(fit, router)


def seen_of(rows, layers):
    tokens = step_tokens(rows, np.arange(len(rows)))
    return Seen(step=0, tokens=tokens, routed=[routed_layer(rows, layer) for layer in range(layers)])


def recall(predictor, rows, layer, distance=1):
    told = predictor.forecast(seen_of(rows, layer - distance + 1), layer)
    return (told.topk[:, :, None] == rows.topk_ids[:, None, layer]).any(axis=1).mean()


def test_it_learns_what_is_predictable_near_and_far(encoder):
    fit, run, router, predictor = encoder
    usual = Frequency()
    usual.fit(fit, router)
    for layer, distance in ((1, 1), (2, 1), (3, 1), (3, 3)):
        assert recall(predictor, run, layer, distance) > 0.75 > recall(usual, run, layer) + 0.2


def test_nothing_is_said_before_a_layer_has_routed(encoder):
    fit, run, router, predictor = encoder
    usual = Frequency()
    usual.fit(fit, router)
    assert (predictor.forecast(seen_of(run, 0), 2).load == usual.forecast(seen_of(run, 0), 2).load).all()


def test_two_experts_a_token_and_no_vocabulary_or_weights():
    fit, run, router = recording(top_k=2)
    bare, held = (replace(part, token_id=None, topk_weights=None) for part in (fit, run))
    told = fitted(bare, router).forecast(seen_of(held, 2), 2)
    assert told.inclusion.sum(axis=1) == pytest.approx(np.full(len(held), 2.0))
    assert (told.topk[:, :, None] == held.topk_ids[:, None, 2]).any(axis=1).mean() > 0.7


def test_what_is_kept_for_the_next_distance_is_what_would_be_worked_out_again(encoder):
    _, run, _, predictor = encoder
    seen = seen_of(run, 1)
    far = predictor.forecast(seen, 3)
    assert np.array_equal(far.inclusion, predictor.forecast(seen_of(run, 1), 3).inclusion)
    assert np.array_equal(predictor.forecast(seen, 2).inclusion, predictor.forecast(seen_of(run, 1), 2).inclusion)


def changed_from(rows, first, seed=1):
    """The step with other router inputs from row `first` on."""
    given = rows.router_input.copy()
    given[first:] = np.random.default_rng(seed).permutation(given[first:])
    return replace(rows, router_input=given)


def test_other_requests_do_not_matter(encoder):
    _, run, _, predictor = encoder
    step = run.take(slice(0, 36))  # three requests
    plain, other = (predictor.forecast(seen_of(rows, 2), 2).inclusion for rows in (step, changed_from(step, 12)))
    assert plain[:12] == pytest.approx(other[:12], abs=1e-6)
    assert np.abs(plain[12:] - other[12:]).max() > 1e-3
    alone = predictor.forecast(seen_of(step.take(slice(0, 12)), 2), 2).inclusion
    assert plain[:12] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("phase", [Phase.ENCODER, Phase.PREFILL])
def test_later_tokens_matter_in_an_encoder_only(phase):
    fit, run, router = recording(phase=phase, requests=30)
    predictor = fitted(fit, router, epochs=3)
    step = run.take(slice(0, 12))
    plain, other = (predictor.forecast(seen_of(rows, 2), 3).inclusion for rows in (step, changed_from(step, 6)))
    assert (np.abs(plain[:6] - other[:6]).max() > 1e-5) == (phase is Phase.ENCODER)


def test_saved_and_loaded_it_says_the_same(encoder, tmp_path):
    _, run, router, predictor = encoder
    predictor.save(tmp_path / "x.safetensors")
    other = GateAttention()
    other.load(tmp_path / "x.safetensors", router, LAYERS)
    assert np.array_equal(
        other.forecast(seen_of(run, 2), 3).inclusion, predictor.forecast(seen_of(run, 2), 3).inclusion
    )
    assert other.cost() == predictor.cost() and predictor.cost().flops > 0


def test_the_same_seed_gives_the_same_net():
    fit, run, router = recording(requests=20)
    told = [fitted(fit, router, epochs=1, seed=seed).forecast(seen_of(run, 1), 1).load for seed in (1, 1, 2)]
    assert (told[0] == told[1]).all() and not (told[0] == told[2]).all()


def test_buckets_are_exact_nearby_and_tell_the_sides_apart():
    table = buckets(200)
    assert table.min() >= 0 and table.max() < BUCKETS
    assert len(set(table[100, 93:108].tolist())) == 15
    assert (table.diagonal() == 0).all()
    before, after = table[150, :150], table[50, 51:]
    assert not set(before.tolist()) & set(after.tolist())
    assert (torch.diff(table[0, 1:]) >= 0).all()
