"""The attention draft: it learns, sees its own request only and, where the stack is causal, nothing later."""

from dataclasses import replace
from itertools import product

import numba
import numpy as np
import pytest
import torch

from helpers import make_table, with_router_inputs
from moesim.predictors import RouterSpec, Seen, routed_layer
from moesim.predictors.counting import Frequency
from moesim.predictors.learned.gate_attention import GateAttention
from moesim.predictors.learned.gate_attention_heads import power
from moesim.predictors.learned.gate_attention_kernels import rows_of
from moesim.predictors.learned.gate_attention_net import BUCKETS, AttentionSettings, buckets
from moesim.predictors.learned.parts import Vocabulary
from moesim.predictors.learned.requests import Batch
from moesim.predictors.learned.training import Training
from moesim.traces import Phase, concat, request_lengths, split_requests, step_tokens

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


def moved(predictor, seed=0):
    """With other parameters, none of them 0; a training of no step leaves many at that."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in predictor.net.parameters():
            values.add_(0.3 * torch.randn(values.shape, generator=generator))
    predictor._make_ready()
    return predictor


def uneven(rows, lengths):
    """Requests of these lengths from the rows of several."""
    parts, first = [], 0
    for number, length in enumerate(lengths):
        part = rows.take(slice(first, first + length))
        parts.append(
            replace(part, request=np.full(length, number, np.int32), position=np.arange(length, dtype=np.int32))
        )
        first += length
    return concat(parts)


@pytest.mark.parametrize("phase", [Phase.ENCODER, Phase.PREFILL])
@pytest.mark.parametrize(
    ("top_k", "bare", "settings"),
    [
        (1, False, AttentionSettings(inner=8, keys=6, heads=2, later_inner=16, later_keys=16, later_heads=1, rank=3)),
        (2, False, AttentionSettings(inner=12, keys=12, heads=4, rank=16)),
        (2, True, AttentionSettings()),
    ],
)
def test_drafts_are_what_was_trained(top_k, bare, settings, phase, monkeypatch):
    table, gates = with_router_inputs(
        make_table(requests=60, length=12, layers=LAYERS, top_k=top_k, noise=0.1, phase=phase)
    )
    table = replace(table, token_id=None, topk_weights=None) if bare else table
    step = uneven(table, [1, 300, 5, 129, 1, 128, 40])
    predictor = GateAttention(settings, Training(epochs=0))
    predictor.fit(table.take(slice(0, 500)), RouterSpec(num_experts=EXPERTS, top_k=top_k, gates=gates))
    moved(predictor)
    columns = {"ids": torch.from_numpy(step.topk_ids.astype(np.int32)), **predictor.columns(step)}
    with torch.no_grad():
        views = list(predictor.views(Batch(columns=columns, lengths=request_lengths(step.request).tolist())))
    for source, threads in product(range(LAYERS - 1), (1, 2)):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", threads)
        seen = seen_of(step, source + 1)
        for view in range(LAYERS - 1 - source):
            told, _ = predictor.answer(seen, source + 1 + view, queued=False)
            trained = views[view][:, source]
            assert (told - trained).abs().max() < 1e-5 * trained.abs().max()


def test_a_forecast_of_one_expert_is_the_softmax(encoder):
    _, run, _, predictor = encoder
    logits, view = predictor.answer(seen_of(run, 2), 3, queued=False)
    p = (logits.double() * predictor.sharpness_VL[view, 3]).softmax(dim=1).numpy()
    told = predictor.forecast(seen_of(run, 2), 3)
    assert told.inclusion == pytest.approx(p, abs=1e-6)
    assert np.array_equal(told.topk[:, 0], p.argmax(axis=1))
    assert told.load == pytest.approx(p.sum(axis=0), rel=1e-5)


def test_buckets_are_exact_nearby_and_tell_the_sides_apart():
    found = buckets(200)
    assert found.min() >= 0 and found.max() < BUCKETS
    assert len(set(found[192:207].tolist())) == 15
    assert found[199] == 0
    before, after = found[:199], found[200:]
    assert not set(before.tolist()) & set(after.tolist())
    assert (torch.diff(after) >= 0).all() and (torch.diff(before) <= 0).all()


def test_vocabulary_rows_are_found_as_in_training():
    generator = np.random.default_rng(0)
    for known in (0, 1, 2, 63, 64, 500):
        words = Vocabulary(known, 1)
        words.learn(generator.choice(2000, known, replace=False).astype(np.int32))
        ids = generator.integers(-5, 2005, 4000).astype(np.int32)
        found = rows_of(words.known_V.int().numpy(), ids)
        assert np.array_equal(found, words.rows(torch.from_numpy(ids)).numpy())


def test_powers_of_two():
    x = np.linspace(-100, 0.9, 5001).astype(np.float32)
    told = np.array([power(each) for each in x])
    assert np.abs(told / 2.0 ** x.astype(np.float64) - 1).max() < 4e-6
    assert power(np.float32(0)) == 1
