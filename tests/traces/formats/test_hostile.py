"""Files that mean harm or were damaged: one clear line that names the file, nothing executed, memory bounded."""

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import samples
from moesim.traces import InputError
from moesim.traces.formats import FORMATS, ImportOptions, numpy_files, recognise
from moesim.traces.formats.numpy_files import npy_from_bytes, open_npz
from moesim.traces.formats.routed import read_map
from moesim.traces.formats.text_files import csv_rows, int_array, json_file, json_lines
from moesim.traces.formats.torch_files import load_torch
from moesim.traces.importing import import_recording
from samples import IDS, STEPS, E, K, L

KNOWN = ImportOptions(experts=E, top_k=K, layers=L)


def refuse(name, path, message, options=KNOWN):
    with pytest.raises(InputError, match=message) as caught:
        for _ in FORMATS[name].read(path, options).parts:
            pass
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def header(text):
    body = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def test_a_pickle_in_a_torch_file_is_not_executed(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "x.pt"
    torch.save({"logical_count": Trap(mark)}, path)
    refuse("sglang", path, "not a sound torch file, or it holds more than plain data")
    path.write_bytes(pickle.dumps({"logical_count": Trap(mark)}))
    refuse("sglang", path, "not JSON")
    with pytest.raises(InputError, match="not a torch file in zip form"):
        load_torch(path)
    assert not FORMATS["sglang"].recognise(path) and not FORMATS["deepseek"].recognise(path)
    assert not mark.exists()


def test_object_arrays_are_not_unpickled(tmp_path):
    mark = tmp_path / "executed"
    trap = np.array([Trap(mark)], dtype=object)
    np.save(tmp_path / "x.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "x.npz", topk_ids=trap, seq_lens=np.array([1]))
    refuse("vllm", tmp_path / "x.npy", "holds object, not plain numbers")
    refuse("npz", tmp_path / "x.npz", "holds object, not plain numbers")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 58, 8), }", "promises 464,000,000,000,000"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 3, 2), }", "promises 24 bytes .* and has 5"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 3, 2), }", "header is damaged"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': 3, }", "header is damaged"),
        ("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }", "not plain numbers"),
        ("{'descr': 'zz', 'fortran_order': False, 'shape': (1,), }", "header is damaged"),
        ("__import__('os').system('true')", "header is damaged"),
        ("(" * 5000, "header is damaged"),
    ],
)
def test_npy_headers(tmp_path, text, message):
    (tmp_path / "x.npy").write_bytes(header(text) + b"12345")
    refuse("vllm", tmp_path / "x.npy", message)
    with pytest.raises(InputError, match="it: "):
        npy_from_bytes(header(text) + b"12345", "it")


def test_zip_bombs_are_not_unpacked(tmp_path, monkeypatch):
    """1 MB of zip that unpacks to 64 times that; the limit is lowered, so that the bomb can be small."""
    assert numpy_files.MOST_UNPACKED <= 1 << 31
    monkeypatch.setattr(numpy_files, "MOST_UNPACKED", 1 << 25)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("topk_ids.npy", bytes(1 << 26))
    (tmp_path / "x.npz").write_bytes(bomb.getvalue())
    assert len(bomb.getvalue()) < 1 << 20
    with pytest.raises(InputError, match="unpacks to more than"):
        open_npz(tmp_path / "x.npz")
    # A directory that promises little does not get more: the reader stops where the promise ends.
    lie = bomb.getvalue().replace((1 << 26).to_bytes(4, "little"), (1 << 10).to_bytes(4, "little"))
    (tmp_path / "x.npz").write_bytes(lie)
    with pytest.raises(InputError, match=r"not a sound \.npz file|not a \.npy file|unpacks to more"):
        open_npz(tmp_path / "x.npz")
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 22))
    (tmp_path / "x.pt").write_bytes(small.getvalue())
    refuse("deepseek", tmp_path / "x.pt", "promises more than it holds")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda ids: np.where(ids == 3, -2, ids), KNOWN, r"expert id -2 is outside 0\.\.7"),
        (lambda ids: np.where(ids == 3, 9, ids), KNOWN, r"expert id 9 is outside 0\.\.7"),
        (lambda ids: np.where(ids == 3, 70_000, ids), ImportOptions(), "an expert id is 70000, which no model has"),
        (lambda ids: ids.astype(np.float32), KNOWN, "must be whole numbers"),
        (lambda ids: ids[:, 0], KNOWN, "in 2 dimensions"),
        (lambda ids: ids[:0], KNOWN, ""),
        (lambda ids: ids, ImportOptions(top_k=3), "every token has 2 experts, --top-k says 3"),
    ],
)
def test_ids(tmp_path, change, options, message):
    np.save(tmp_path / "x.npy", change(IDS))
    if message:
        refuse("vllm", tmp_path / "x.npy", message, options)
    else:
        with pytest.raises(InputError, match="the recording is empty"):
            import_recording(tmp_path / "x.npy", tmp_path / "x.moetrace", format="vllm", options=options)


def test_ragged_layers(tmp_path):
    (tmp_path / "v").mkdir()
    np.save(tmp_path / "v/a.npy", IDS)
    np.save(tmp_path / "v/b.npy", IDS[:, :2])
    with pytest.raises(InputError, match=r"b\.npy: has \[L, K\] = \[2, 2\], the recording began with \[3, 2\]"):
        list(FORMATS["vllm"].read(tmp_path / "v", KNOWN).parts)
    (tmp_path / "m").mkdir()
    path = samples.megatron(tmp_path / "m") / "rank_0.jsonl"
    record = json.loads(path.read_text().splitlines()[1])
    samples.lines(path, [record, {**record, "layer": 3, "num_tokens": 1, "top_indices": [[1, 2]]}])
    refuse("megatron", path, "layers have different numbers of tokens")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"topk_ids": [[1, 2], [3]]}, "ragged|whole numbers"),
        ({"topk_ids": [1, "x"]}, "whole numbers"),
        ({"topk_ids": [1, -5]}, "expert id -5 is outside"),
        ({"topk_weights": [float("nan"), 0.5]}, "gate weight is not a finite number"),
        ({"topk_weights": [1e300, 0.5]}, "gate weight is not a finite number"),
        ({"topk_weights": [0.5]}, "gate weights"),
        ({"token_idx": -1}, "position is outside"),
        ({"token_idx": 1 << 40}, "token_idx is outside"),
        ({"layer": -1}, "'layer' must be a layer number"),
        ({"layer": 3}, "is not one of"),
    ],
)
def test_json_lines(tmp_path, record, message):
    rows = [{"req_id": "a", "token_idx": 0, "layer": i, "topk_ids": [1, 2], "topk_weights": [0.5, 0.5]} for i in (0, 1)]
    changed = [row | record if "token_idx" in record or row["layer"] else row for row in rows]
    refuse("jsonl", samples.lines(tmp_path / "x.jsonl", [{"meta": 1, "layers": [0, 1]}, *changed]), message)


def test_a_token_without_all_layers_is_named(tmp_path):
    row = {"req_id": "abc", "token_idx": 4, "layer": 0, "topk_ids": [1, 2]}
    path = samples.lines(tmp_path / "x.jsonl", [{"meta": 1, "layers": [0, 1]}, row])
    refuse("jsonl", path, "the recording is empty|request 'abc', token 4 has 1 of 2 layers")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (np.where(STEPS.max() == STEPS, -1, STEPS), "negative or beyond"),
        (np.where(STEPS.max() == STEPS, np.nan, STEPS), "not a whole number"),
        (STEPS + 0.5, "not a whole number"),
        (STEPS.astype(np.float64) * 2.0**60, "negative or beyond"),
        (STEPS[0], r"must be counts \[N, L, E\]"),
    ],
)
def test_counts(tmp_path, count, message):
    np.save(tmp_path / "x.npy", count)
    refuse("moe-infinity", tmp_path / "x.npy", message, ImportOptions())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!", "is not base64"),
        (base64.b64encode(b"abc").decode(), "not a .npy file|are not int32"),
        (7, "has no routed"),
    ],
)
def test_base64(tmp_path, text, message):
    refuse("vllm", samples.lines(tmp_path / "v.jsonl", [{"choices": [{"routed_experts": text}]}]), message)
    refuse("sglang-requests", samples.lines(tmp_path / "s.jsonl", [{"meta_info": {"routed_experts": text}}]), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1: not JSON"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b"\xff\xfe", "line 1: not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_text(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(json_lines(path))
    assert not [f.name for f in FORMATS.values() if f.read and f.recognise(path)]


def test_small_readers(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("layer_id,expert_id,count\n1,2,x\n")
    with pytest.raises(InputError, match=r"x\.csv, line 2: not a row of whole numbers"):
        list(csv_rows(path, ("layer_id", "expert_id", "count")))
    path.write_text("a,b\n")
    with pytest.raises(InputError, match="the header lacks 'layer_id'"):
        list(csv_rows(path, ("layer_id",)))
    with pytest.raises(InputError, match="larger than 0 MiB"):
        json_file(path, 1)
    with pytest.raises(InputError, match="64 bits"):
        int_array([1 << 63], "it", 1)
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 1], [1, -1]]}))
    with pytest.raises(InputError, match="must be \\[L, P\\] of experts from 0"):
        read_map(path)
    with pytest.raises(InputError, match="no such file or folder"):
        recognise(tmp_path / "nothing")


def test_a_trace_does_not_reach_outside_its_folder(tmp_path):
    """The manifest's own hostile cases are in test_store.py; an import must not write what they refuse."""
    np.save(tmp_path / "x.npy", IDS.astype(np.uint8))
    trace = import_recording(tmp_path / "x.npy", tmp_path / "x.moetrace")
    assert all(Path(shard.name).name == shard.name for shard in trace.shards)


@pytest.mark.parametrize("name", ["rank0.safetensors", "meta_info.json"])
def test_tensorrt_folders(tmp_path, name):
    path = samples.tensorrt(tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        list(FORMATS["tensorrt"].read(path, KNOWN).parts)
