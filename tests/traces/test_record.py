"""Whole recordings: requests, phases, the same ids as the model's own run; a kill keeps what was written."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from switch_models import SHIPPED, random_switch, shipped_switch
from transformers import AutoTokenizer

from moesim.cli import main
from moesim.traces import InputError, Phase
from moesim.traces.record import RecordOptions, cut_requests, load_model, provenance, read_texts, record
from moesim.traces.routers import RouterRecorder
from moesim.traces.store import MANIFEST, Trace

SAMPLES = SHIPPED / "samples"
OPTIONS = RecordOptions(encoder_tokens=24, prefill_tokens=6, generate=4, batch=4, max_tokens=400)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def texts():
    return {path.name: path.read_text(encoding="utf-8")[:1500] for path in sorted(SAMPLES.glob("*.txt"))[:3]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tokenizer, texts):
    out = tmp_path_factory.mktemp("trace") / "x.moetrace"
    return Trace.open(record(shipped_switch(), tokenizer, texts, out, OPTIONS, source=str(SHIPPED), shard_tokens=128))


def test_requests_are_cut_in_turn_without_overlap(tokenizer, texts):
    requests = cut_requests(texts, tokenizer, RecordOptions(encoder_tokens=24, prefill_tokens=6))
    assert [r.text for r in requests[: len(texts)]] == list(texts)
    for name, text in texts.items():
        joined = [t for r in requests if r.text == name for t in (*r.encoder, *r.prompt)]
        assert joined == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(len(r.encoder) + len(r.prompt) + 1 for r in cut_requests(texts, tokenizer, OPTIONS)) <= 400


def test_a_recording_holds_every_phase_and_verifies(recorded):
    assert [shard.stack for shard in recorded.verify()].count("encoder") > 1
    counts = recorded.counts()
    assert set(counts["encoder"]) == {"encoder"} and set(counts["decoder"]) == {"prefill", "decode"}
    decoder = recorded.table("decoder")
    assert len(recorded.request_texts) == decoder.request.max() + 1
    prefill = decoder.take(decoder.phase == Phase.PREFILL)
    assert (prefill.token_id[prefill.position == 0] == 0).all(), "the decoder starts with its start token"
    assert decoder.position[decoder.phase == Phase.DECODE].min() == 7


def test_each_request_is_routed_as_the_model_routes_it_alone(recorded, tokenizer, texts):
    model = shipped_switch()
    table = recorded.table("encoder")
    for number, request in list(enumerate(cut_requests(texts, tokenizer, OPTIONS)))[::5]:
        rows = table.take(table.request == number)
        assert rows.token_id.tolist() == request.encoder
        assert rows.position.tolist() == list(range(len(request.encoder)))
        with RouterRecorder(model) as recorder, torch.inference_mode():
            model.encoder(input_ids=torch.tensor([request.encoder]))
        (alone,) = recorder.take("encoder")
        assert (rows.topk_ids == alone.ids[0]).all() and (rows.dropped == alone.dropped[0]).all()


def test_padding_is_not_recorded(tmp_path, tokenizer):
    texts = {"long": "one two three four five six seven eight nine ten " * 3, "short": "one two"}
    options = RecordOptions(encoder_tokens=30, prefill_tokens=1, batch=8)
    trace = Trace.open(
        record(shipped_switch(), tokenizer, texts, tmp_path / "p.moetrace", options, source=str(SHIPPED))
    )
    expected = [len(r.encoder) for r in cut_requests(texts, tokenizer, options)]
    assert np.bincount(trace.table("encoder").request).tolist() == expected
    assert min(expected) < max(expected)


def test_tokens_after_the_end_are_not_recorded(tmp_path, tokenizer, texts):
    model = random_switch(8, seed=5)
    model.resize_token_embeddings(len(tokenizer))
    model.config.vocab_size = len(tokenizer)
    with torch.no_grad():
        model.shared.weight[model.config.eos_token_id] *= 30  # tied to the output: the end becomes likely
    trace = Trace.open(record(model, tokenizer, texts, tmp_path / "e.moetrace", OPTIONS, source="random"))
    decoder = trace.table("decoder")
    generated = decoder.take(decoder.phase == Phase.DECODE)
    assert model.config.eos_token_id not in generated.token_id
    full = len(trace.request_texts) * (OPTIONS.generate - 1)
    assert len(generated) < full


def test_a_model_may_have_several_ends(tmp_path, tokenizer, texts, monkeypatch):
    model = shipped_switch()
    plain = record(model, tokenizer, texts, tmp_path / "plain.moetrace", OPTIONS, source=str(SHIPPED))
    decoder = Trace.open(plain).table("decoder")
    generated = decoder.take(decoder.phase == Phase.DECODE).token_id
    ends = [1, int(np.bincount(generated).argmax())]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    out = record(model, tokenizer, texts, tmp_path / "ends.moetrace", OPTIONS, source=str(SHIPPED))
    decoder = Trace.open(out).table("decoder")
    shorter = decoder.take(decoder.phase == Phase.DECODE).token_id
    assert not np.isin(shorter, ends).any() and 0 < len(shorter) < len(generated)


def test_text_and_its_digest_are_those_of_the_file(tmp_path):
    content = "one\r\ntwo\n\n  \u4e09\r".encode()
    (tmp_path / "x.txt").write_bytes(content)
    texts = read_texts([tmp_path])
    assert texts["x.txt"].encode() == content
    about = provenance(random_switch(8), texts, OPTIONS, str(SHIPPED))
    assert about["texts"] == {"x.txt": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    weights = SHIPPED / "model.safetensors"
    assert about["model_sha256"]["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert str(tmp_path) not in str(about) and str(SHIPPED.parent) not in str(about)


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
        ({"--out": "there"}, "exists already"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("latin1.txt").write_bytes(b"na\x69\xefve")
    Path("good.txt").write_text("Call me Ishmael.")
    Path("there").mkdir()
    options = {"--model": str(SHIPPED), "--text": "good.txt", "--out": "x.moetrace", "--device": "cpu", **change}
    result = run("record", *(part for pair in options.items() for part in pair))
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


def test_force_replaces_a_trace_but_never_another_folder(tmp_path, tokenizer, texts):
    out = tmp_path / "t.moetrace"
    model = random_switch(8)
    model.resize_token_embeddings(len(tokenizer))
    model.config.vocab_size = len(tokenizer)
    record(model, tokenizer, texts, out, OPTIONS, source="random")
    before = Trace.open(out).provenance["recorded"]
    with pytest.raises(InputError, match="exists already"):
        record(model, tokenizer, texts, out, OPTIONS, source="random")
    record(model, tokenizer, texts, out, OPTIONS, source="random", overwrite=True)
    assert list(Trace.open(out).verify()) and Trace.open(out).provenance["recorded"] >= before
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a trace"):
        record(model, tokenizer, texts, other, OPTIONS, source="random", overwrite=True)
    assert (other / "chapter.txt").exists()


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


def test_kill_9_leaves_a_trace_that_verifies(tmp_path):
    out, text = tmp_path / "killed.moetrace", tmp_path / "long.txt"
    text.write_text("The whale swam on. " * 8000)  # far more than is recorded until the kill
    code = (
        "import sys; from pathlib import Path; from moesim.traces.record import *\n"
        "model, tokenizer = load_model(sys.argv[1], device='cpu', dtype='float32')\n"
        "record(model, tokenizer, read_texts([Path(sys.argv[3])]), Path(sys.argv[2]),\n"
        "       RecordOptions(encoder_tokens=32, prefill_tokens=4, batch=2), source='x', shard_tokens=128)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(SHIPPED), str(out), str(text)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    while not (out / MANIFEST).exists() or len(list(out.glob("encoder-*.safetensors"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trace = Trace.open(out)
    shards = list(trace.verify())
    assert len(shards) >= 2
    complete = {path.name for path in out.glob("*.safetensors")}
    assert len(complete - {shard.name for shard in shards}) <= 1, "more than the last shard was lost"
    assert len(trace.table("encoder")) >= 128


def test_a_broken_transformers_is_named(monkeypatch):
    monkeypatch.setattr("moesim.traces.record.version", lambda _: "5.17.0")
    with pytest.raises(InputError, match=r"transformers 5.17.0 .* install transformers>=5.18"):
        load_model(str(SHIPPED), device="cpu", dtype="float32")


def test_texts_of_the_same_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("text")
    with pytest.raises(InputError, match=r"two texts are called x.txt"):
        read_texts([tmp_path / "a", tmp_path / "b"])
