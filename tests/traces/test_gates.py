"""Router inputs and gates in a recording: the gates say what the routers chose, and what is damaged is named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from moe_models import saved, tiny
from switch_models import SHIPPED, shipped_switch
from transformers import AutoTokenizer

from helpers import make_spec, make_table, with_router_inputs
from moesim.cli import main
from moesim.traces import Gates, TraceError
from moesim.traces.gates import gates_of_bytes, gates_to_bytes
from moesim.traces.joining import concat_traces
from moesim.traces.record import RecordOptions, record
from moesim.traces.store import MANIFEST, Trace
from moesim.traces.texts import Text
from moesim.traces.writer import TraceWriter


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    text = (SHIPPED / "samples/english.txt").read_text(encoding="utf-8")[:1500]
    out = tmp_path_factory.mktemp("trace") / "x.moetrace"
    options = RecordOptions(encoder_tokens=24, prefill_tokens=6, generate=3, lookahead=3, router_input=True)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    return Trace.open(record(shipped_switch(), tokenizer, [Text("english", [text])], out, options, source="x"))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_gates_on_router_inputs_choose_what_was_chosen(recorded, stack):
    table, gates = recorded.table(stack), recorded.gates(stack)
    assert table.router_input.shape == (len(table), 4, 128) and table.router_input.dtype == np.float16
    logits = np.einsum("tld,led->tle", table.router_input.astype(np.float32), gates.weight) + gates.bias[None]
    # Inputs are kept in half precision: a near tie may fall to the other side.
    assert (logits.argmax(axis=2) == table.topk_ids[:, :, 0]).mean() > 0.995
    for distance in (1, 2, 3):
        ahead = np.einsum("tld,led->tle", table.router_input[:, :-distance].astype(np.float32), gates.weight[distance:])
        told = table.lookahead_ids[:, : 4 - distance, distance - 1, 0]
        assert (ahead.argmax(axis=2) == told).mean() > 0.99


def test_a_decoder_only_model_with_biased_gates(tmp_path):
    folder = saved(tiny("gpt_oss"), tmp_path / "m")
    out = tmp_path / "x.moetrace"
    text = tmp_path / "a.txt"
    text.write_text("some words to route " * 20, encoding="utf-8")
    arguments = ["record", "--model", folder, "--text", text, "--out", out, "--router-input", "--lookahead", 0]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    trace = Trace.open(out)
    table, gates = trace.table("decoder"), trace.gates("decoder")
    assert table.lookahead_ids is None and np.abs(gates.bias).max() > 0
    logits = np.einsum("tld,led->tle", table.router_input.astype(np.float32), gates.weight) + gates.bias[None]
    K = table.topk_ids.shape[2]
    chosen = np.sort(np.argsort(-logits, axis=2)[:, :, :K], axis=2)
    assert (chosen == np.sort(table.topk_ids, axis=2)).mean() > 0.98


def write(path, **options):
    table, gates = with_router_inputs(make_table())
    with TraceWriter(path, make_spec(), {}, gates={"encoder": gates}, **options) as writer:
        writer.append("encoder", table)
    return Trace.open(path), table, gates


def verified(trace):
    result = CliRunner().invoke(main, ["trace", "verify", str(trace.path)])
    return result.exit_code, result.output


def test_round_trip(tmp_path):
    trace, table, gates = write(tmp_path / "x.moetrace")
    back = Trace.open(trace.path)
    assert (back.table("encoder").router_input == table.router_input).all()
    assert (back.gates("encoder").weight == gates.weight).all() and (back.gates("encoder").bias == gates.bias).all()
    assert verified(trace)[0] == 0 and trace.leftovers() == []


def test_replacing_a_trace_takes_its_gates_along(tmp_path):
    write(tmp_path / "x.moetrace")
    with TraceWriter(tmp_path / "x.moetrace", make_spec(), {}, overwrite=True) as writer:
        writer.append("encoder", make_table())
    trace = Trace.open(tmp_path / "x.moetrace")
    assert trace.gates("encoder") is None and trace.leftovers() == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_gates_are_named_in_one_line(tmp_path, damage):
    trace, _, _ = write(tmp_path / "x.moetrace")
    file = trace.path / trace.gate_file.name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-8])
    code, output = verified(trace)
    assert code == 2 and file.name in output and output.count("\n") == 1
    if damage != "flip":
        with pytest.raises(TraceError, match=file.name):
            trace.gates("encoder")


@pytest.mark.parametrize("entry", [{"name": "../x.safetensors", "bytes": 1, "sha256": ""}, {"name": "x"}, 7, [1]])
def test_a_hostile_manifest_is_refused(tmp_path, entry):
    trace, _, _ = write(tmp_path / "x.moetrace")
    manifest = json.loads((trace.path / MANIFEST).read_text())
    (trace.path / MANIFEST).write_text(json.dumps(manifest | {"gates": entry}))
    with pytest.raises(TraceError, match=MANIFEST):
        Trace.open(trace.path)


@pytest.mark.parametrize("stack", [{"nobody": 3}, {"encoder": 2}])
def test_gates_of_another_model_are_refused(stack):
    ((name, layers),) = stack.items()
    gates = Gates(weight=np.zeros((layers, 8, 4), np.float32), bias=np.zeros((layers, 8), np.float32))
    with pytest.raises(TraceError):
        gates_of_bytes(gates_to_bytes({name: gates}), make_spec())


def test_a_router_input_that_is_no_number_is_found(tmp_path):
    table, _ = with_router_inputs(make_table())
    table.router_input[3, 1, 2] = np.nan
    with TraceWriter(tmp_path / "x.moetrace", make_spec(), {}) as writer:
        writer.append("encoder", table)
    code, output = verified(Trace.open(tmp_path / "x.moetrace"))
    assert code == 2 and "router input is not a finite number" in output


def test_traces_of_the_earlier_schema_are_still_read(tmp_path):
    with TraceWriter(tmp_path / "x.moetrace", make_spec(), {}) as writer:
        writer.append("encoder", make_table())
    file = tmp_path / "x.moetrace" / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["gates"]
    file.write_text(json.dumps(manifest | {"schema_version": 2}))
    assert len(Trace.open(file.parent).table("encoder")) == len(make_table())


def test_joined_traces_keep_gates_that_are_the_same(tmp_path):
    one, _, gates = write(tmp_path / "x.moetrace")
    other, _, _ = write(tmp_path / "y.moetrace")
    joined, _ = concat_traces([one.path, other.path], tmp_path / "z.moetrace")
    assert (joined.gates("encoder").weight == gates.weight).all()
    table, changed = with_router_inputs(make_table(), seed=1)
    with TraceWriter(tmp_path / "w.moetrace", make_spec(), {}, gates={"encoder": changed}) as writer:
        writer.append("encoder", table)
    joined, left_out = concat_traces([one.path, tmp_path / "w.moetrace"], tmp_path / "v.moetrace")
    assert joined.gates("encoder") is None and "gates" in left_out


def test_large_inputs_are_kept_finite():
    from moesim.traces.routers import RouterRecorder

    model = shipped_switch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.mul_(1e6)
    recorder = RouterRecorder(model, router_input=True)
    ids = torch.arange(6)[None] + 5
    with recorder, torch.inference_mode():
        model(input_ids=ids, decoder_input_ids=ids)
    (selection,) = recorder.take("encoder")
    assert np.isfinite(selection.router_input).all() and np.abs(selection.router_input).max() > 60_000


def test_a_table_with_inputs_of_another_shape_is_refused():
    table, _ = with_router_inputs(make_table())
    with pytest.raises(TraceError, match="router_input must have shape"):
        replace(table, router_input=table.router_input[:, :1])
