"""Quality on the shipped model: exact policies cost none, lossy ones what a computation by other means says."""

import math

import numpy as np
import pytest
import torch
from switch_models import SHIPPED

from moesim.backend.quality import Settings, batches, measure, outputs
from moesim.backend.switch import load_model
from moesim.sim.policies import POLICIES, is_trained
from moesim.traces import InputError
from moesim.traces.record import RecordOptions, record
from moesim.traces.record import load_model as load_recorded
from moesim.traces.store import Trace
from moesim.traces.texts import read_texts

CPU = torch.device("cpu")
EXACT = [name for name, p in POLICIES.items() if p.miss and not (p.lossy or p.clairvoyant or is_trained(name))]
ROUNDING = 2e-5
"""Relative error of hidden states in float32 where only the order of sums differs."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    model, tokenizer = load_recorded(str(SHIPPED), device="cpu", dtype="float32")
    options = RecordOptions(max_tokens=5000, lookahead=3, router_input=True)
    texts = read_texts([SHIPPED / "samples"])
    return Trace.open(record(model, tokenizer, texts, tmp_path_factory.mktemp("t") / "t", options, source=str(SHIPPED)))


def one(trace, policy, **settings):
    return measure(SHIPPED, trace, Settings(policies=(policy,), **{"resident": 8, "max_requests": 3, **settings}))[0]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_exact_policies_cost_nothing(trace, phase):
    names = tuple(EXACT) if phase == "prefill" else ("on-demand", "prefetch-ridge", "hobbit-exact")
    found = measure(SHIPPED, trace, Settings(policies=names, resident=8, phase=phase, max_requests=2, batch=2))
    assert len(found) == len(names) and len(EXACT) >= 10
    for quality in found:
        assert quality.output_error < ROUNDING and quality.top1_agreement == 1, quality.policy
        assert quality.loss == pytest.approx(quality.exact_loss, abs=1e-5)
        lossy = ("rounded", "skipped", "substituted", "mispredicted")
        assert not any(sum(stack[name]) for stack in quality.shares.values() for name in lossy), quality.policy


def test_hobbit_never_rounds_a_top_1_router(trace):
    """Its score of a token's only expert is 0: always in full (sim/policies/precision.py)."""
    assert one(trace, "hobbit").output_error < ROUNDING


def test_the_loss_is_the_training_objective(trace):
    """The library's own loss, labels shifted by one, on the same requests."""
    found = one(trace, "on-demand")
    model = load_model(SHIPPED, "float32")
    encoder, decoder = trace.table("encoder"), trace.table("decoder")
    from moesim.traces import split_requests

    requests = np.unique(split_requests(encoder, "request")[1].request)[:3]
    nats, count = 0.0, 0
    for request in requests:
        read = torch.from_numpy(encoder.token_id[encoder.request == request].astype(np.int64))[None]
        fed = torch.from_numpy(decoder.token_id[decoder.request == request].astype(np.int64))[None]
        with torch.inference_mode():
            told = model(input_ids=read, decoder_input_ids=fed[:, :-1], labels=fed[:, 1:])
        nats += float(told.loss) * (fed.shape[1] - 1)
        count += fed.shape[1] - 1
    assert found.exact_loss == pytest.approx(nats / count, rel=1e-5)


def test_decoding_token_by_token_is_the_same_pass(trace):
    model = load_model(SHIPPED, "float32")
    run = {stack: trace.table(stack) for stack in ("encoder", "decoder")}
    batch = next(batches(run, 3, 3, CPU))
    whole, steps = (outputs(model, batch, phase) for phase in ("prefill", "decode"))
    assert torch.allclose(whole.hidden_ND, steps.hidden_ND, atol=1e-3)
    assert float((whole.hidden_ND - steps.hidden_ND).norm() / whole.hidden_ND.norm()) < ROUNDING
    assert whole.request_P.tolist() == steps.request_P.tolist()


def test_fewer_bits_cost_more(trace):
    found = [one(trace, "on-demand", copy_dtype=dtype, max_requests=1) for dtype in ("int8", "int4", "int2")]
    errors = [quality.output_error for quality in found]
    assert errors == sorted(errors) and errors[-1] > 10 * errors[0] > 0
    for quality in found:
        rounded = [share for stack in quality.shares.values() for share in stack["rounded"]]
        assert min(rounded) > 0 and max(rounded) <= 1
        assert quality.copy_dtype in quality.shares["encoder"]


@pytest.fixture
def executed(tmp_path):
    """A policy that executes its forecasts."""
    path = tmp_path / "executed.toml"
    path.write_text('base = "on-demand"\npredictor = "token-table"\nrouting = "predicted"\n', encoding="utf-8")
    return str(path)


def test_executing_predictions_costs_much_and_says_how_often_they_were_wrong(trace, executed):
    fixed, router = (one(trace, executed, gate=gate) for gate in ("fixed", "router"))
    for quality in (fixed, router):
        wrong = [share for stack in quality.shares.values() for share in stack["mispredicted"]]
        assert min(wrong) > 0.1 and max(wrong) < 1
        assert quality.output_error > 0.05 and quality.top1_agreement < 0.95
    assert (fixed.config["gate"], router.config["gate"]) == ("fixed", "router")
    assert fixed.loss != router.loss


def test_where_experts_are_changes_no_prediction(trace, executed):
    """Which slots there are does not matter to what is predicted, and copies are exact."""
    few, all_of_them = (one(trace, executed, resident=resident, max_requests=1) for resident in (4, 32))
    assert few.loss == pytest.approx(all_of_them.loss, abs=1e-6)


def test_a_run_repeats_to_the_bit(trace):
    first, second = measure(SHIPPED, trace, Settings(policies=("fate", "fate"), resident=8, max_requests=3))
    assert first == second
    assert first.loss_error > 0 and math.isfinite(first.loss)
    assert {"seed", "device", "dtype", "versions", "requests"} <= first.config.keys()


def test_what_cannot_be_measured_is_one_line(trace, tmp_path):
    with pytest.raises(InputError, match="shown recorded routing"):
        one(trace, "oracle-prefetch")
    with pytest.raises(InputError, match="needs every expert on a GPU"):
        one(trace, "eplb")
    other = Trace(trace.path, trace_manifest(trace, {"config.json": "0"}))
    with pytest.raises(InputError, match="recorded with other weights"):
        one(other, "on-demand")


def trace_manifest(trace, sha256):
    import json

    manifest = json.loads((trace.path / "manifest.json").read_text(encoding="utf-8"))
    manifest["provenance"]["model_sha256"] = sha256
    return manifest
