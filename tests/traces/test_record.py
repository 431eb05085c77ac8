"""Whole recordings: requests, phases, the same ids as the model's own run; a kill keeps what was written."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import saved, tiny, tiny_nllb
from switch_models import SHIPPED, random_switch, shipped_switch
from transformers import AutoTokenizer

from moesim.traces import InputError, Phase
from moesim.traces.adapters import adapter_of
from moesim.traces.record import RecordOptions, Request, batch_requests, cut_requests, load_model, provenance, record
from moesim.traces.routers import RouterRecorder
from moesim.traces.store import MANIFEST, Trace
from moesim.traces.texts import Text, read_texts

SAMPLES = SHIPPED / "samples"
OPTIONS = RecordOptions(encoder_tokens=24, prefill_tokens=6, generate=4, batch=4, max_tokens=400)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def texts():
    files = sorted(SAMPLES.glob("*.txt"))[:3]
    return [Text(path.name, [path.read_text(encoding="utf-8")[:1500]]) for path in files]


def cut(texts, tokenizer, options=OPTIONS):
    return cut_requests(texts, tokenizer, options.resolved(encoder_decoder=True), [0])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tokenizer, texts):
    out = tmp_path_factory.mktemp("trace") / "x.moetrace"
    return Trace.open(record(shipped_switch(), tokenizer, texts, out, OPTIONS, source=str(SHIPPED), shard_tokens=128))


def ordered(requests, options=OPTIONS):
    """The requests as they are numbered."""
    return [request for batch in batch_requests(requests, options.batch) for request in batch]


def test_requests_are_cut_in_turn_without_overlap(tokenizer, texts):
    requests = cut(texts, tokenizer, RecordOptions(encoder_tokens=24, prefill_tokens=6))
    assert [r.text for r in requests[: len(texts)]] == [text.name for text in texts]
    for text in texts:
        joined = [t for r in requests if r.text == text.name for t in (*r.encoder, *r.prompt[1:])]
        assert joined == [t for d in text.documents() for t in tokenizer(d, add_special_tokens=False)["input_ids"]]
    assert all(r.prompt[0] == 0 for r in requests)
    assert sum(r.tokens for r in cut(texts, tokenizer)) <= 400


def test_windows_do_not_cross_documents_and_no_more_are_read_than_needed(tokenizer):
    read = []

    def documents():
        for i in range(1000):
            read.append(i)
            yield "one two three four five six seven"

    options = RecordOptions(encoder_tokens=5, prefill_tokens=100, max_tokens=60)
    text = Text("endless", documents(), {"dataset": "endless"})
    requests = cut([text, Text("x.txt", ["one"])], tokenizer, options)
    length = len(tokenizer("one two three four five six seven", add_special_tokens=False)["input_ids"])
    assert {len(r.encoder) + len(r.prompt) - 1 for r in requests if r.text == "endless"} == {length}
    assert sum(r.tokens for r in requests) <= 60 and [r.text for r in requests].count("x.txt") == 1
    assert len(read) == [r.text for r in requests].count("endless") + 1
    assert text.about()["documents"] == len(read)


@given(st.lists(st.integers(1, 4), max_size=40), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_batches_hold_every_request_once_and_prompts_of_one_length(lengths, size):
    requests = [Request(text=str(i), encoder=[], prompt=[0] * length) for i, length in enumerate(lengths)]
    batches = list(batch_requests(requests, size))
    assert sorted(int(r.text) for batch in batches for r in batch) == list(range(len(lengths)))
    assert all(len({len(r.prompt) for r in batch}) == 1 and len(batch) <= size for batch in batches)
    assert len(batches) == sum(-(-lengths.count(length) // size) for length in set(lengths)), "batches are not full"


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
    for number, request in list(enumerate(ordered(cut(texts, tokenizer))))[::5]:
        rows = table.take(table.request == number)
        assert rows.token_id.tolist() == request.encoder
        assert rows.position.tolist() == list(range(len(request.encoder)))
        with RouterRecorder(model) as recorder, torch.inference_mode():
            model.encoder(input_ids=torch.tensor([request.encoder]))
        (alone,) = recorder.take("encoder")
        assert (rows.topk_ids == alone.ids[0]).all() and (rows.dropped == alone.dropped[0]).all()


def test_padding_is_not_recorded(tmp_path, tokenizer):
    texts = [Text("long", ["one two three four five six seven eight nine ten " * 3]), Text("short", ["one two"])]
    options = RecordOptions(encoder_tokens=30, prefill_tokens=1, batch=8)
    trace = Trace.open(
        record(shipped_switch(), tokenizer, texts, tmp_path / "p.moetrace", options, source=str(SHIPPED))
    )
    expected = [len(r.encoder) for r in ordered(cut(texts, tokenizer, options), options)]
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


def test_the_provenance_names_texts_and_weights_but_no_path_of_the_machine(tmp_path):
    content = "one\r\ntwo\n\n  \u4e09\r".encode()
    (tmp_path / "x.txt").write_bytes(content)
    texts = read_texts([tmp_path])
    assert [d.encode() for text in texts for d in text.documents()] == [content]
    about = provenance(random_switch(8), texts, OPTIONS, str(SHIPPED))
    assert about["texts"] == {"x.txt": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    weights = SHIPPED / "model.safetensors"
    assert about["model_sha256"]["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert str(tmp_path) not in str(about) and str(SHIPPED.parent) not in str(about)
    assert about["caveats"] == []


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


def test_kill_9_leaves_a_trace_that_verifies(tmp_path):
    out, text = tmp_path / "killed.moetrace", tmp_path / "long.txt"
    text.write_text("The whale swam on. " * 8000)  # far more than is recorded until the kill
    code = (
        "import sys; from pathlib import Path; from moesim.traces.record import *; from moesim.traces.texts import *\n"
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


def test_a_broken_transformers_is_named_to_those_who_record_switch_models(monkeypatch, tmp_path):
    monkeypatch.setattr("moesim.traces.adapters.seq2seq.version", lambda _: "5.17.0")
    with pytest.raises(InputError, match=r"transformers 5.17.0 .* install transformers>=5.18"):
        load_model(str(SHIPPED), device="cpu", dtype="float32")
    assert load_model(str(saved(tiny("mixtral"), tmp_path)), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def decoder_only(tmp_path_factory, texts):
    """(model, trace, number of generated tokens) of the ordinary way from files to a trace."""
    folder = tmp_path_factory.mktemp("decoder-only")
    model, tokenizer = load_model(str(saved(tiny("deepseek_v3"), folder / "model")), device="cpu", dtype="float32")
    model.generation_config.eos_token_id = None
    options = RecordOptions(prefill_tokens=10, generate=4, batch=4, max_tokens=300)
    out = record(model, tokenizer, texts, folder / "d.moetrace", options, source=str(folder / "model"), shard_tokens=64)
    return model, tokenizer, Trace.open(out)


def test_a_decoder_only_recording_has_one_stack_and_every_phase(decoder_only, texts):
    _, tokenizer, trace = decoder_only
    assert len(list(trace.verify())) > 2 and trace.stacks == ("decoder",)
    table = trace.table("decoder")
    prefill, decode = (table.take(table.phase == phase) for phase in (Phase.PREFILL, Phase.DECODE))
    options = RecordOptions(prefill_tokens=10, max_tokens=300).resolved(encoder_decoder=False)
    requests = ordered(cut_requests(texts, tokenizer, options, [2]))
    assert list(trace.request_texts) == [r.text for r in requests]
    assert len(decode) == 3 * len(requests) and len(prefill) == sum(r.tokens for r in requests) <= 300
    for number, request in enumerate(requests):
        mine = table.take(table.request == number)
        assert mine.position.tolist() == list(range(request.tokens + 3))
        assert mine.token_id[: request.tokens].tolist() == request.prompt == [2, *request.prompt[1:]]
    assert trace.provenance["options"]["prefill_tokens"] == 10 and trace.spec.family == "deepseek_v3"


def test_a_decoder_only_request_is_routed_as_the_model_routes_it_alone(decoder_only):
    model, _, trace = decoder_only
    table = trace.table("decoder")
    for number in (0, len(trace.request_texts) - 1):
        rows = table.take(table.request == number)
        with RouterRecorder(model) as recorder, torch.inference_mode():
            told = model(input_ids=torch.from_numpy(rows.token_id.astype(np.int64))[None]).logits.argmax(-1)[0]
        (alone,) = recorder.take("decoder")
        assert (rows.topk_ids == alone.ids[0]).mean() > 0.99, "batches and caches may round another way"
        generated = rows.phase == Phase.DECODE
        assert (told[np.flatnonzero(generated) - 1].numpy() == rows.token_id[generated]).all(), "not greedy"


@pytest.mark.parametrize("generate", [0, 2])
def test_a_prompt_starts_with_bos_where_there_is_one(tmp_path, tokenizer, generate):
    texts = [Text("x", ["one two three"])]
    words = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    for bos, expected in ((None, words), (5, [5, *words])):
        model = tiny("qwen2_moe")
        model.config.bos_token_id = bos
        model.generation_config.eos_token_id = None
        out = tmp_path / f"{bos}.moetrace"
        options = RecordOptions(generate=generate, lookahead=0)
        table = Trace.open(record(model, tokenizer, texts, out, options, source="random")).table("decoder")
        assert table.token_id[: len(expected)].tolist() == expected
        assert len(table) == len(expected) + max(generate - 1, 0)


def test_encoder_tokens_without_an_encoder_are_refused(tmp_path, tokenizer, texts):
    with pytest.raises(InputError, match="--encoder-tokens: this model has no encoder; give --prefill-tokens alone"):
        record(tiny("mixtral"), tokenizer, texts, tmp_path / "x", RecordOptions(encoder_tokens=9), source="random")
    assert not (tmp_path / "x").exists()
    assert RecordOptions().resolved(encoder_decoder=True).prefill_tokens == 32
    assert RecordOptions().resolved(encoder_decoder=False).prefill_tokens == 128


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer, texts):
    with pytest.raises(InputError, match=r"the tokenizer gives token \d+, the model knows 96: they do not belong"):
        record(random_switch(8), tokenizer, texts, tmp_path / "x", OPTIONS, source="random")


def test_nllb_is_recorded_with_its_caveat(tmp_path, tokenizer, texts):
    model = tiny_nllb()
    out = record(model, tokenizer, texts, tmp_path / "n.moetrace", OPTIONS, source="random")
    trace = Trace.open(out)
    assert list(trace.verify()) and set(trace.counts()) == {"encoder", "decoder"}
    assert trace.table("encoder").topk_ids.shape[1:] == (2, 2)
    adapter, routers = adapter_of(model)
    assert trace.provenance["caveats"] == [c for c in [adapter.caveat(routers)] if c]
