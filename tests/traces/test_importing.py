"""Import as a whole: recognised, cleaned, noted in the manifest, or refused in one line."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.traces import InputError, ModelSpec, StackSpec
from moesim.traces.formats import FORMATS, ImportOptions
from moesim.traces.importing import import_recording
from moesim.traces.store import Trace

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def routed(requests=2, length=40, seed=0):
    """[T, L, K] ids of ordinary traffic."""
    return make_table(requests=requests, length=length, top_k=TOP_K, noise=0.6, seed=seed).topk_ids


@pytest.fixture
def recording(tmp_path):
    """vLLM's routed experts of one request, with a warm-up of 20 equal tokens before it."""
    warmup = np.broadcast_to(np.array([1, 2], np.uint8), (20, LAYERS, TOP_K))
    path = tmp_path / "routed.npy"
    np.save(path, np.concatenate([warmup, routed()]))
    return path


def test_warm_up_is_dropped_and_everything_is_noted(recording, tmp_path):
    trace = import_recording(recording, tmp_path / "a.moetrace", options=ImportOptions(experts=EXPERTS))
    assert (trace.table("decoder").topk_ids == routed()).all()
    about = trace.provenance["import"]
    assert about["format"] == "vllm" and about["complete"] is True
    assert about["cleaning"]["found"] == {"warmup": 20, "padding": 0, "empty": 0}
    assert about["cleaning"]["shares"]["warmup"] == 0.2
    assert about["files"] == 1 and about["bytes"] == recording.stat().st_size and len(about["sha256"]) == 64
    assert str(tmp_path) not in (trace.path / "manifest.json").read_text(encoding="utf-8")
    assert list(trace.verify())
    kept = import_recording(recording, tmp_path / "b.moetrace", keep_warmup=True)
    assert len(kept.table("decoder")) == 100 and kept.provenance["import"]["cleaning"]["found"]["warmup"] == 20


def test_layers_of_zeros_are_dense(tmp_path):
    ids = np.insert(routed(), 1, 0, axis=1)
    np.save(tmp_path / "r.npy", ids)
    trace = import_recording(tmp_path / "r.npy", tmp_path / "r.moetrace", options=ImportOptions(experts=EXPERTS))
    assert (trace.table("decoder").topk_ids == routed()).all()
    assert trace.spec.stacks[0] == StackSpec(name="decoder", num_layers=4, moe_layers=(0, 2, 3))
    assert trace.provenance["import"]["notes"]["dense_layers"] == [1]


def decoder_spec(**changes):
    stack = StackSpec(name="decoder", num_layers=5, moe_layers=(1, 3, 4))
    return make_spec(**{"family": "mixtral", "experts": EXPERTS, "top_k": TOP_K, "stacks": (stack,), **changes})


def test_the_model_goes_before_what_the_file_implies(recording, tmp_path):
    trace = import_recording(recording, tmp_path / "a.moetrace", options=ImportOptions(spec=decoder_spec()))
    assert trace.spec == decoder_spec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 1}, "has 2 experts per token, the model of --model has 1"),
        ({"stacks": (StackSpec(name="decoder", num_layers=2, moe_layers=(0, 1)),)}, "has 3 MoE layers"),
        ({"stacks": (StackSpec(name="encoder", num_layers=3, moe_layers=(0, 1, 2)),)}, "no stack 'decoder'"),
    ],
)
def test_a_model_that_contradicts_the_recording_is_refused(recording, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        import_recording(recording, tmp_path / "a.moetrace", options=ImportOptions(spec=decoder_spec(**changes)))
    assert not (tmp_path / "a.moetrace").exists()


def test_nothing_left_leaves_the_old_trace_alone(recording, tmp_path):
    out = tmp_path / "a.moetrace"
    before = import_recording(recording, out).spec
    np.save(recording, np.broadcast_to(np.array([1, 2], np.uint8), (30, LAYERS, TOP_K)))
    with pytest.raises(InputError, match=r"all 30 rows look like warm-up or padding .* --keep-warmup"):
        import_recording(recording, out, overwrite=True)
    assert isinstance(before, ModelSpec) and len(Trace.open(out).table("decoder")) == 80


def run(*arguments):
    return CliRunner().invoke(main, ["trace", *map(str, arguments)])


def test_the_command_reports_what_it_did(recording, tmp_path):
    out = tmp_path / "a.moetrace"
    told = run("import", recording, "--out", out, "--experts", EXPERTS)
    assert told.exit_code == 0, told.output
    assert "80 prefill tokens; 3 MoE layers x 8 experts, top-2, from vllm" in told.stdout
    assert "warmup: 20 of 100 rows (20.0%), dropped" in told.stdout
    assert "simulate with --shapes" in told.stdout
    again = run("import", recording, "--out", out)
    assert again.exit_code == 2 and "exists already" in again.stderr
    asked = json.loads(run("import", recording, "--out", out, "--force", "--keep-warmup", "--json").stdout)
    assert asked["counts"] == {"decoder": {"prefill": 100}} and asked["import"]["cleaning"]["dropped"] == ["empty"]
    simulated = run("info", out)
    assert simulated.exit_code == 0, simulated.output


def test_formats_are_listed(tmp_path):
    listed = json.loads(run("formats", "--json").stdout)
    assert listed.keys() == FORMATS.keys()
    assert run("formats").stdout.count("\n") == len(FORMATS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nothing", "--out", "a.moetrace"], "nothing: no such file or folder"),
        (["import", "empty", "--out", "a.moetrace"], "empty: not a recording that moesim recognises"),
        (["import", "empty", "--out", "a.moetrace", "--format", "vllm"], "empty"),
        (["concat", "nothing", "--out", "a.moetrace"], "no trace there"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    told = run(*arguments)
    assert told.exit_code == 2 and told.stderr.count("\n") == 1 and message in told.stderr
    assert not (tmp_path / "a.moetrace").exists()
