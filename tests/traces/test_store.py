"""The store: what is written comes back, what is damaged is named, what is hostile is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.traces import InputError, TraceError
from moesim.traces.store import MANIFEST, Trace
from moesim.traces.writer import TraceWriter


def write(path, table=None, spec=None, *, texts=("a.txt", "b.txt"), **options):
    with TraceWriter(path, spec or make_spec(), {"model": "by hand"}, **options) as writer:
        table = make_table() if table is None else table
        writer.add_requests([texts[i % len(texts)] for i in range(int(table.request.max()) + 1)])
        for rows in np.array_split(np.arange(len(table)), 5):
            writer.append("encoder", table.take(rows))
    return Trace.open(path)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 300),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_round_trip(tmp_path_factory, seed, requests, layers, experts, top_k, ahead):
    top_k = min(top_k, experts)
    table = make_table(requests=requests, layers=layers, experts=experts, top_k=top_k, seed=seed, length=7)
    if ahead:
        table = replace(table, lookahead_ids=table.topk_ids[:, :, None, :])
    spec = make_spec(layers, experts, top_k=top_k)
    trace = write(tmp_path_factory.mktemp("t") / "x.moetrace", table, spec, shard_tokens=11)
    assert [shard.rows for shard in trace.verify()]
    back = trace.table("encoder")
    assert back.arrays().keys() == table.arrays().keys()
    assert all((back.arrays()[name] == column).all() for name, column in table.arrays().items())
    assert (trace.spec, trace.provenance) == (spec, {"model": "by hand"})
    assert list(trace.request_texts) == [("a.txt", "b.txt")[i % 2] for i in range(requests)]


@pytest.fixture
def trace(tmp_path):
    return write(tmp_path / "x.moetrace", shard_tokens=100)


def verify(trace):
    result = CliRunner().invoke(main, ["trace", "verify", str(trace.path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def edit(trace, change):
    file = trace.path / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_flipped_byte(trace):
    file = trace.path / trace.shards[1].name
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert "encoder-00001.safetensors: its content has changed since it was written" in verify(trace)


def test_truncated_shard(trace):
    file = trace.path / trace.shards[0].name
    file.write_bytes(file.read_bytes()[:-100])
    assert "encoder-00000.safetensors: has " in verify(trace)
    with pytest.raises(TraceError, match=r"encoder-00000.safetensors: cannot be read"):
        Trace.open(trace.path).table("encoder")


def test_missing_shard(trace):
    (trace.path / trace.shards[0].name).unlink()
    assert "encoder-00000.safetensors: cannot be read (No such file or directory)" in verify(trace)


def test_newer_schema(trace):
    edit(trace, lambda m: m.update(schema_version=4))
    assert "written by a newer moesim (schema 4, this one reads 3); upgrade moesim" in verify(trace)


@pytest.mark.parametrize(
    "name",
    [
        "../encoder-00000.safetensors",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "a\0.safetensors",
        "\ud800.safetensors",
        "x.txt",
        5,
    ],
)
def test_a_shard_name_must_stay_in_the_folder(trace, name):
    edit(trace, lambda m: m["shards"][0].update(name=name))
    assert "is not a plain file name" in verify(trace)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("spec"),
        lambda m: m["spec"].update(num_experts="many"),
        lambda m: m["spec"].update(unknown=1),
        lambda m: m["spec"].update(top_k=99),
        lambda m: m["spec"]["stacks"][0].update(moe_layers=[2, 1]),
        lambda m: m["spec"]["stacks"][0].update(moe_layers=[0, 99]),
        lambda m: m.update(shards=3),
        lambda m: m["shards"].append({}),
        lambda m: m["shards"].append(7),
        lambda m: m["shards"][0].update(stack="middle"),
        lambda m: m["shards"][0].update(tokens=-1),
        lambda m: m["shards"][0].update(tokens=5),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m["request_text"].pop(),
        lambda m: m.update(request_text=[9]),
        lambda m: m.update(provenance=None),
        lambda m: m.update(schema_version="1"),
        lambda m: m.update(format="zip"),
    ],
)
def test_a_damaged_manifest_is_one_line(trace, change):
    edit(trace, change)
    assert "x.moetrace" in verify(trace)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00"])
def test_a_manifest_that_is_no_manifest(trace, text):
    (trace.path / MANIFEST).write_text(text)
    assert MANIFEST in verify(trace)


def test_ids_out_of_range(tmp_path):
    table = make_table()
    table.topk_ids[3] = 200
    assert "an expert id is not below 8" in verify(write(tmp_path / "x.moetrace", table))


def test_weights_that_are_no_numbers(tmp_path):
    table = make_table()
    table.topk_weights[0] = np.nan
    assert "a gate weight is not a finite number" in verify(write(tmp_path / "x.moetrace", table))


def test_names_in_a_manifest_are_not_markup(trace):
    edit(trace, lambda m: m["provenance"].update(model="[/b] model"))
    result = CliRunner().invoke(main, ["trace", "info", str(trace.path)])
    assert result.exit_code == 0 and "[/b] model" in result.output


class Killed(BaseException):
    pass


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_file_operation_it_leaves_a_sound_trace(tmp_path, monkeypatch, replaces):
    """Dies before the n-th flush, rename or deletion, for every n; nothing after that runs, as after kill -9."""
    operations = [(os, "fsync"), (Path, "replace"), (Path, "unlink")]
    plain = {name: getattr(owner, name) for owner, name in operations}
    seen = set()
    for n in range(60):
        path, left = tmp_path / f"{n}.moetrace", [n]
        if replaces:
            write(path, shard_tokens=100)

        def dying(*args, name, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return plain[name](*args, **kwargs)

        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, lambda *a, name=name, **k: dying(*a, name=name, **k))
            try:
                writer = TraceWriter(path, make_spec(), {"model": "new"}, shard_tokens=100, overwrite=replaces)
                for rows in np.array_split(np.arange(512), 5):
                    writer.append("encoder", make_table().take(rows))
                writer.close()
            except Killed:
                pass
        if (path / MANIFEST).exists():
            trace = Trace.open(path)
            tokens = sum(shard.rows for shard in trace.verify())
            seen.add((trace.provenance["model"], tokens))
            assert trace.provenance["model"] == "new" or tokens == 512, "the old trace lost tokens"
        else:
            assert not replaces, "the old trace is gone"
            write(path, overwrite=True)  # what is left is not in the way of the next recording
        if left[0] >= 0:
            break
    assert left[0] >= 0 and ("new", 512) in seen and (("by hand", 512) in seen) == replaces


def test_a_failure_before_the_first_token_leaves_what_was_there(tmp_path):
    old = write(tmp_path / "old.moetrace")
    for path in (old.path, tmp_path / "new.moetrace"):
        with (
            pytest.raises(KeyboardInterrupt),
            TraceWriter(path, make_spec(), {}, overwrite=True),
        ):
            raise KeyboardInterrupt
    assert Trace.open(old.path).provenance == {"model": "by hand"} and list(Trace.open(old.path).verify())
    assert not (tmp_path / "new.moetrace").exists()


@pytest.mark.parametrize("manifest", ['{"name": "a web page"}', "[]", "no JSON"])
def test_a_folder_of_another_program_is_not_replaced(tmp_path, manifest):
    (tmp_path / MANIFEST).write_text(manifest)
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(InputError, match="is not a trace, so it will not be replaced"):
        write(tmp_path, overwrite=True)
    assert (tmp_path / MANIFEST).read_text() == manifest and (tmp_path / "model.safetensors").exists()


def test_replacing_deletes_only_files_of_the_trace(trace):
    (trace.path / "notes.safetensors").write_text("mine")
    replaced = write(trace.path, make_table(requests=2), shard_tokens=20, overwrite=True)
    assert replaced.leftovers() == ["notes.safetensors"]
    assert len(replaced.table("encoder")) == 64


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/x.moetrace: cannot be written \(.*\); make room or choose"):
        write(tmp_path / "file" / "x.moetrace")


def test_not_a_trace(tmp_path):
    result = CliRunner().invoke(main, ["trace", "info", str(tmp_path / "none.moetrace")])
    assert result.exit_code == 2 and "no trace there" in result.stderr


def test_leftovers_are_ignored_and_mentioned(trace):
    (trace.path / "encoder-00009.safetensors.partial").write_bytes(b"half")
    result = CliRunner().invoke(main, ["trace", "verify", str(trace.path)])
    assert result.exit_code == 0 and "encoder-00009.safetensors.partial" in result.output


def test_info_tells_what_is_there(trace):
    result = CliRunner().invoke(main, ["trace", "info", str(trace.path), "--json"])
    told = json.loads(result.output)
    assert told["counts"] == {"encoder": {"encoder": 512}}
    assert told["requests"] == {"a.txt": 8, "b.txt": 8}
    assert CliRunner().invoke(main, ["trace", "info", str(trace.path)]).exit_code == 0


def test_stats_prints_draws_and_speaks_json(trace, tmp_path):
    run = CliRunner().invoke
    picture = tmp_path / "load.png"
    shown = run(main, ["trace", "stats", str(trace.path), "--window-tokens", "64", "--picture", str(picture)])
    assert shown.exit_code == 0 and "8 windows of 64" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads(run(main, ["trace", "stats", str(trace.path), "--json", "--gpus", "4"]).output)["encoder"]
    assert told["tokens"] == 512 and len(told["layers"]) == 3
    assert 0.25 <= told["layers"][0]["balancedness"]["4"]["sglang"] <= 1
    wrong = run(main, ["trace", "stats", str(trace.path), "--gpus", "a few"])
    assert wrong.exit_code == 2 and "whole numbers with commas" in wrong.stderr
