"""`moesim record` as a user meets it: texts from everywhere, errors in one line, what an interruption keeps."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from moe_models import saved, tiny, tiny_nllb
from safetensors.torch import load_file, save_file
from switch_models import SHIPPED
from transformers import LlamaConfig

from moesim.cli import main
from moesim.traces.routers import RouterRecorder
from moesim.traces.store import Trace

SAMPLES = SHIPPED / "samples"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "missing/folder-that-is-not-there"}, "the model cannot be loaded"),
        ({"--model": str(SAMPLES)}, "no model there (config.json is missing)"),
        ({"--text": "nowhere.txt"}, "nowhere.txt: cannot be read"),
        ({"--text": "empty.txt"}, "empty.txt: the text is empty"),
        ({"--text": "latin1.txt"}, "latin1.txt: not UTF-8 text (byte 3)"),
        ({"--batch": "0"}, "batch must be at least 1"),
        ({"--prefill-tokens": "0"}, "prefill-tokens must be at least 1"),
        ({"--out": "there"}, "exists already"),
        ({"--text": ""}, "nothing to record: give --text or --dataset"),
        ({"--model": "dense"}, "LlamaForCausalLM has no MoE layers that moesim knows (looked for modules: Switch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("latin1.txt").write_bytes(b"na\x69\xefve")
    Path("good.txt").write_text("Call me Ishmael.")
    Path("there").mkdir()
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained("dense")
    options = {"--model": str(SHIPPED), "--text": "good.txt", "--out": "x.moetrace", "--device": "cpu", **change}
    result = run("record", *(part for pair in options.items() if pair[1] for part in pair))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not Path("x.moetrace").exists()


def test_several_texts_may_follow_one_option(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("Call me Ishmael. Some years ago.")
    out = tmp_path / "x.moetrace"
    texts = ["--text", tmp_path / "a.txt", tmp_path / "b.txt"]
    assert run("record", "--model", SHIPPED, *texts, "--out", out, "--device", "cpu").exit_code == 0
    assert sorted(Trace.open(out).request_texts) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("batches", [0, 2])
def test_ctrl_c_keeps_what_was_recorded_and_says_so(tmp_path, monkeypatch, batches):
    plain, calls = RouterRecorder.take, []

    def take(recorder, stack):
        calls.append(stack)
        if len(calls) > 2 * batches:
            raise KeyboardInterrupt
        return plain(recorder, stack)

    monkeypatch.setattr(RouterRecorder, "take", take)
    out, text = tmp_path / "c.moetrace", tmp_path / "c.txt"
    text.write_text("The whale. " * 2000)
    result = run("record", "--model", SHIPPED, "--text", text, "--out", out, "--batch", 2, "--device", "cpu")
    assert result.exit_code == 130
    assert "Interrupted: everything written so far is kept." in result.stderr
    if not batches:
        assert "nothing was recorded yet" in result.stderr and not out.exists()
        return
    assert "512 encoder, 132 prefill" in result.stderr
    trace = Trace.open(out)
    assert sum(shard.rows for shard in trace.verify()) == 2 * 2 * (128 + 33)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return saved(tiny("mixtral"), tmp_path_factory.mktemp("mixtral"))


def test_a_decoder_only_model_reads_standard_input(tmp_path, mixtral):
    out = tmp_path / "m.moetrace"
    arguments = ["record", "--model", mixtral, "--text", "-", "--out", out, "--generate", 3, "--json"]
    text = "Call me Ishmael. " * 40
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=text)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert set(told["counts"]) == {"decoder"} and set(told["counts"]["decoder"]) == {"prefill", "decode"}
    trace = Trace.open(out)
    assert set(trace.request_texts) == {"stdin"} and trace.spec.family == "mixtral" and told["caveats"] == []
    table = trace.table("decoder")
    assert max(table.position[table.phase == 1]) == 128, "the start token and 128 more"
    assert trace.provenance["texts"]["stdin"]["bytes"] == len(text)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_a_damaged_model_is_one_line(tmp_path, mixtral, name, damage):
    model = shutil.copytree(mixtral, tmp_path / "model")
    content = (model / name).read_bytes()
    if damage == "missing":
        (model / name).unlink()
    else:
        (model / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else bytes(range(256)) * 4)
    text = tmp_path / "x.txt"
    text.write_text("Call me Ishmael.")
    result = run("record", "--model", model, "--text", text, "--out", tmp_path / "x")
    assert result.exit_code == 2 and f"{model}: " in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_model_that_lacks_weights_is_refused(tmp_path, mixtral):
    """The library would draw them at random and only log it."""
    model = shutil.copytree(mixtral, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    router = next(name for name in weights if name.endswith("gate.weight"))
    save_file({name: w for name, w in weights.items() if name != router}, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "x.txt").write_text("Call me Ishmael.")
    result = run("record", "--model", model, "--text", tmp_path / "x.txt", "--out", tmp_path / "x")
    assert result.exit_code == 2 and "1 weights are missing (model.layers.0.mlp.gate.weight)" in result.stderr


def test_encoder_tokens_are_refused_where_there_is_no_encoder(tmp_path, mixtral):
    text = tmp_path / "x.txt"
    text.write_text("Call me Ishmael.")
    result = run("record", "--model", mixtral, "--text", text, "--out", tmp_path / "x", "--encoder-tokens", 64)
    assert result.exit_code == 2 and "--encoder-tokens: this model has no encoder" in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_doubtful_about_a_recording_is_said_and_kept(tmp_path):
    model = saved(tiny_nllb(), tmp_path / "nllb")
    text = tmp_path / "x.txt"
    text.write_text("Call me Ishmael.")
    result = run("record", "--model", model, "--text", text, "--out", tmp_path / "x", "--json")
    assert result.exit_code == 0
    caveats = json.loads(result.stdout)["caveats"]
    assert [line for line in result.stderr.splitlines() if line.startswith("Warning: ")] == [
        f"Warning: {caveat}." for caveat in caveats
    ]
    assert Trace.open(tmp_path / "x").provenance["caveats"] == caveats


def test_a_data_set_without_its_library_says_what_to_install(tmp_path, mixtral, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("record", "--model", mixtral, "--dataset", "wikitext:wikitext-2-raw-v1", "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert result.stderr == 'Error: --dataset needs the datasets library: pip install "moesim[datasets]"\n'


def test_requests_of_a_data_set_are_called_like_it(tmp_path, mixtral):
    pytest.importorskip("datasets")
    (tmp_path / "news.jsonl").write_text("".join(json.dumps({"body": f"headline number {i}"}) + "\n" for i in range(9)))
    (tmp_path / "x.txt").write_text("Call me Ishmael.")
    options = ["--dataset", tmp_path / "news.jsonl", "--dataset-column", "body", "--dataset-documents", 5]
    out = tmp_path / "d.moetrace"
    result = run("record", "--model", mixtral, "--text", tmp_path / "x.txt", *options, "--out", out)
    assert result.exit_code == 0, result.output
    trace = Trace.open(out)
    assert sorted(trace.request_texts) == 5 * ["news.jsonl"] + ["x.txt"]
    about = trace.provenance["texts"]["news.jsonl"]
    assert (about["dataset"], about["split"], about["column"], about["documents"]) == ("news.jsonl", "train", "body", 5)
