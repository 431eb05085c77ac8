"""Learned predictors on recordings whose regularities are known: they learn them, and a file keeps what was learned."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import make_table, with_router_inputs
from moesim.predictors import PREDICTORS, Adapting, PastStep, RouterSpec, Seen, routed_layer
from moesim.predictors.learned.files import read, write
from moesim.predictors.learned.gate_mlp import GateMlpOnline
from moesim.predictors.learned.gru import Gru
from moesim.predictors.learned.path_transformer import PathTransformer
from moesim.predictors.learned.replication import Replication
from moesim.predictors.learned.sida import Sida
from moesim.predictors.learned.training import Training
from moesim.traces import InputError, StepTokens, split_requests, vocabulary_ids

E, L = 8, 3
FROM_TOKENS = ("sida", "predictive-replication")
FROM_LAYERS = ("gru", "gate", "gate-mlp", "gate-mlp-online", "path-transformer")
NAMES = FROM_TOKENS + FROM_LAYERS


@pytest.fixture(scope="module")
def recording():
    table, gates = with_router_inputs(make_table(requests=60, length=16, layers=L, noise=0.1))
    fit, run = split_requests(table)
    for column in (*fit.arrays().values(), *run.arrays().values(), gates.weight, gates.bias):
        column.flags.writeable = False  # as some readers give them; torch warns of such arrays
    return fit, run, RouterSpec(num_experts=E, top_k=1, gates=gates)


@pytest.fixture(scope="module")
def fitted(recording):
    made = {}

    def fit(name):
        if name not in made:
            made[name] = PREDICTORS[name]()
            made[name].training = Training(epochs=8, learning_rate=0.01, batch_tokens=64, device="cpu")
            made[name].fit(recording[0], recording[2])
        return made[name]

    return fit


def seen_of(table, routed, rows=slice(0, 200)):
    tokens = StepTokens(token_id=table.token_id[rows], request=table.request[rows], position=table.position[rows])
    return Seen(step=0, tokens=tokens, routed=[routed_layer(table, layer, rows) for layer in range(routed)])


def recall(predictor, table, layer, routed, rows=slice(0, 200)):
    return (predictor.forecast(seen_of(table, routed, rows), layer).topk == table.topk_ids[rows, layer]).mean()


@pytest.mark.parametrize("name", FROM_TOKENS)
def test_tokens_tell_all_layers(name, recording, fitted):
    _, run, _ = recording
    for layer in range(L):
        assert recall(fitted(name), run, layer, 0) > recall(fitted(name)._prior, run, layer, 0) + 0.25


@pytest.mark.parametrize("name", FROM_LAYERS)
def test_layers_tell_the_next_one(name, recording, fitted):
    _, run, _ = recording
    for layer in range(1, L):
        assert recall(fitted(name), run, layer, layer) > recall(fitted(name)._prior, run, layer, 0) + 0.25


@pytest.mark.parametrize("name", ["gru", "path-transformer"])
def test_one_layer_tells_of_two_ahead(name, recording, fitted):
    _, run, _ = recording
    assert recall(fitted(name), run, 2, 1) > recall(fitted(name)._prior, run, 2, 1) + 0.2


def test_training_corrects_the_frozen_gate(recording, fitted):
    _, run, _ = recording
    gate, mlp = (recall(fitted(name), run, 2, 2) for name in ("gate", "gate-mlp"))
    assert mlp > gate + 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_forecasts_hand_out_every_token_k_times(name, top_k, recording):
    table, gates = with_router_inputs(make_table(requests=8, length=8, layers=L, top_k=top_k))
    predictor = PREDICTORS[name]()
    predictor.training = Training(epochs=1, device="cpu")
    predictor.fit(table, RouterSpec(num_experts=E, top_k=top_k, gates=gates))
    for routed in range(L):
        seen = seen_of(table, routed, slice(0, 64))
        seen.queued = seen.tokens.take(np.arange(10))
        for layer in range(L):
            for tokens, queued in ((64, False), (10, True)):
                forecast = predictor.forecast(seen, layer, queued=queued)
                assert forecast.inclusion.shape == (tokens, E) and forecast.topk.shape == (tokens, top_k)
                assert forecast.inclusion.sum(axis=1) == pytest.approx(top_k)
                assert forecast.load.sum() == pytest.approx(tokens * top_k)
    cost = predictor.cost()
    assert cost.flops > 0 and (cost.parameters > 0) == (name != "gate")


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_and_one_request_are_enough(name):
    table, gates = with_router_inputs(make_table(requests=1, length=6, layers=1))
    predictor = PREDICTORS[name]()
    predictor.training = Training(epochs=1, device="cpu")
    predictor.fit(table, RouterSpec(num_experts=E, top_k=1, gates=gates))
    assert predictor.forecast(seen_of(table, 0, slice(0, 6)), 0).load.sum() == pytest.approx(6)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_forecasts_the_same(name, recording, fitted, tmp_path):
    _, run, router = recording
    fitted(name).save(tmp_path / "p.safetensors")
    loaded = PREDICTORS[name]()
    loaded.load(tmp_path / "p.safetensors", router, L)
    assert loaded.cost() == fitted(name).cost()
    for routed in range(L):
        one, other = (p.forecast(seen_of(run, routed), 2) for p in (fitted(name), loaded))
        assert np.array_equal(one.inclusion, other.inclusion) and np.array_equal(one.load, other.load)
    assert isinstance(loaded, Adapting) == (name == "gate-mlp-online")


@pytest.mark.parametrize("name", ["gru", "path-transformer"])
def test_what_is_remembered_of_a_step_changes_nothing(name, recording, fitted):
    """States, keys and values that grow with the layers against a forecast from the beginning."""
    _, run, _ = recording
    growing = seen_of(run, 0)
    for routed in range(L):
        for layer in range(routed, L):
            one = fitted(name).forecast(growing, layer).inclusion
            assert one == pytest.approx(fitted(name).forecast(seen_of(run, routed), layer).inclusion, abs=1e-6)
        growing.routed.append(routed_layer(run, routed, slice(0, 200)))


@pytest.mark.parametrize("name", FROM_TOKENS)
def test_tokens_in_any_order_are_the_same_requests(name, recording, fitted):
    _, run, _ = recording
    order = np.random.default_rng(0).permutation(200)
    seen = seen_of(run, 0)
    shuffled = Seen(step=0, tokens=seen.tokens.take(order))
    one, other = (fitted(name).forecast(s, 1).inclusion for s in (seen, shuffled))
    assert other == pytest.approx(one[order], abs=1e-6)


@pytest.mark.parametrize("cls", [Sida, Replication])
def test_in_decode_the_past_steps_are_the_context(cls, recording):
    table = replace(recording[0], phase=np.full(len(recording[0]), 2, np.uint8))
    predictor = cls(training=Training(epochs=1, device="cpu"))
    predictor.fit(table, recording[2])
    whole = predictor.forecast(seen_of(table, 0, slice(0, 16)), 0).inclusion  # one request of 16 tokens
    for position in range(4):
        rows = slice(position, position + 1)
        one = seen_of(table, 0, rows)
        for before in range(position):
            tokens = seen_of(table, 0, slice(before, before + 1)).tokens
            one.past.append(PastStep(tokens=tokens, topk_ids=table.topk_ids[before : before + 1]))
        assert predictor.forecast(one, 0).inclusion == pytest.approx(whole[rows], abs=1e-6)


def test_a_path_needs_no_vocabulary_but_uses_one(recording):
    fit, run, router = recording
    blind = PathTransformer(training=Training(epochs=4, learning_rate=0.01, batch_tokens=64, device="cpu"))
    blind.fit(replace(fit, token_id=None), router)
    seeing = PathTransformer(training=blind.training)
    seeing.fit(fit, router)
    assert recall(seeing, run, 0, 0) > recall(blind, run, 0, 0) + 0.25
    assert recall(blind, run, 1, 1) > recall(blind._prior, run, 1, 0) + 0.2


def test_unknown_vocabulary_ids_are_no_error(recording, fitted):
    seen = seen_of(recording[1], 0)
    strange = replace(seen.tokens, token_id=np.full_like(vocabulary_ids(seen.tokens), 10**6))
    for name in (*FROM_TOKENS, "path-transformer"):
        assert fitted(name).forecast(Seen(step=0, tokens=strange), 0).load.sum() == pytest.approx(200)


def test_observing_adapts_to_a_shift(recording):
    """After the shift, inputs lean towards other experts than the ones that follow."""
    fit, run, router = recording
    online = GateMlpOnline(training=Training(epochs=2, device="cpu"))
    online.fit(fit, router)
    shifted = replace(run, topk_ids=(run.topk_ids + np.array([0, 0, 3])[:, None]).astype(np.uint8) % E)
    before = recall(online, shifted, 2, 2, slice(200, None))
    for _ in range(40):
        online.observe(seen_of(shifted, L))
    assert recall(online, shifted, 2, 2, slice(200, None)) > before + 0.3


def test_observing_is_deterministic_and_forgotten_by_fit(recording):
    fit, run, router = recording
    told = []
    online = GateMlpOnline(training=Training(epochs=1, device="cpu"))
    for _ in range(2):
        online.fit(fit, router)
        told.append(online.forecast(seen_of(run, 1), 2).inclusion)
        online.observe(seen_of(run, L))
        told.append(online.forecast(seen_of(run, 1), 2).inclusion)
    assert np.array_equal(told[0], told[2]) and np.array_equal(told[1], told[3])
    assert not np.array_equal(told[0], told[1])


def test_what_is_missing_is_said(recording):
    fit, _, router = recording
    with pytest.raises(InputError, match="vocabulary ids"):
        Sida().fit(replace(fit, token_id=None), router)
    with pytest.raises(InputError, match="--router-input"):
        GateMlpOnline().fit(replace(fit, router_input=None), router)
    other = replace(router, gates=with_router_inputs(fit, d_model=4)[1])
    with pytest.raises(InputError, match=r"the gates have shape \[3, 8, 4\]"):
        GateMlpOnline().fit(fit, other)


def test_a_router_whose_input_is_not_shown(recording, fitted):
    seen = seen_of(recording[1], 1)
    seen.routed[0] = replace(seen.routed[0], router_input=None)
    with pytest.raises(InputError, match="--router-input"):
        fitted("gate").forecast(seen, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"E": 4}, "its E is 4, and 8 is needed"),
        ({"predictor": "sida"}, 'its predictor is "sida"'),
        ({"version": 99}, "its version is 99"),
        ({"format": "moesim-training"}, "its format is"),
        ({"settings": {"width": 64}}, "settings are missing or not these"),
        ({"settings": {"width": 3, "ahead": 3}}, "not torch.float32"),
        ({"settings": {"width": "x", "ahead": 3}}, "settings are no sizes"),
        ({"sizes": [1]}, "sizes are missing"),
    ],
)
def test_foreign_and_damaged_files_are_one_line(change, message, recording, fitted, tmp_path):
    path = tmp_path / "p.safetensors"
    fitted("gru").save(path)
    tensors, facts = read(path, {})
    write(path, tensors, {**facts, **change})
    with pytest.raises(InputError, match=message) as error:
        Gru().load(path, recording[2], L)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_missing_or_changed(recording, fitted, tmp_path):
    path = tmp_path / "p.safetensors"
    fitted("gru").save(path)
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-1], b"x" * 100, b"\xff" * 8 + whole[8:]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="damaged") as error:
            Gru().load(path, recording[2], L)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        Gru().load(tmp_path / "none", recording[2], L)
    with pytest.raises(InputError, match="cannot be written"):
        fitted("gru").save(path / "below")
