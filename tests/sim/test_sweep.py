"""Sweeps: every run once whatever kills them, the same numbers as a single simulation, nothing mixed up."""

import dataclasses
import json
import os
import shutil
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from helpers import make_spec, make_table
from moesim.sim.profile import load_profile
from moesim.sim.runs import Inputs, run_policy
from moesim.sim.sweep import AXES, Settings, check_axes, points, scenario_of
from moesim.sim.sweep_pool import chunks
from moesim.sim.sweep_search import Search, Sweep, run_sweep
from moesim.sim.sweep_store import RUNS, TABLE, Store
from moesim.traces import InputError
from moesim.traces.store import Trace
from moesim.traces.writer import TraceWriter

NODE = "8xH100-NVLink"


def write_trace(path, seed=0):
    with TraceWriter(path, make_spec(), {}, overwrite=True) as writer:
        writer.append("encoder", make_table(requests=12, length=16, seed=seed))
    return str(path)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("traces") / "small.moetrace")


def axes_of(trace, **changes):
    one = {"trace": [trace], "profile": [NODE], "phase": ["encoder"], "gpus": [2], "batch_tokens": [32]}
    return {**one, "policy": ["eplb", "predictive-layer"], "max_steps": [2], **changes}


def run(axes, folder, *, workers=1, done=lambda _: None, **options):
    return run_sweep(Sweep(axes=axes, **options), folder, workers=workers, ray=None, done=done)


def test_the_numbers_are_those_of_a_single_simulation(trace, tmp_path):
    axes = axes_of(
        trace,
        policy=["contiguous", "balanced", "eplb", "predictive-layer", "predictive-batch", "oracle-batch"],
        gpus=[2, 4],
        extra_slots=[0, 2],
        micro_batches=[1, 2],
    )
    rows, _ = run(axes, tmp_path / "sweep")
    assert len(rows) == 48
    opened = Trace.open(trace)
    for row in rows:
        one = Settings(**{name: row[name] for name in AXES})
        profile = load_profile(NODE)
        inputs = Inputs(
            scenario=scenario_of(opened, one, profile.node_size), profile=profile, execution=one.execution()
        )
        result = run_policy(one.policy, inputs, {}, None)
        metrics = result.metrics()
        assert row["total_s"] == result.total_s
        for name in ("latency_p95_s", "throughput_tokens_per_s", "balancedness_mean_of_ratios", "moved_bytes"):
            assert row[name] == metrics[name], name
        assert row["recall"] == metrics["recall"] and row["experts_s"] == result.phase_s()["experts"]
        base = next(r for r in rows if r["policy"] == "contiguous" and same_but_policy(r, row))
        assert row["speedup"] == base["total_s"] / row["total_s"] and not row["lossy"]


def same_but_policy(a, b):
    return all(a[name] == b[name] for name in AXES if name != "policy")


def test_memory_is_that_of_the_expert_slots(trace, tmp_path):
    rows, _ = run(axes_of(trace, policy=["balanced", "predictive-buffered"], extra_slots=[2]), tmp_path / "sweep")
    expert = make_spec().expert_bytes("float32")
    memory = {row["policy"]: row["expert_bytes_per_gpu"] for row in rows}
    # 3 layers, 8 experts on 2 GPUs: 4 home slots a layer; 2 extra ones in every layer, or in two buffers.
    assert memory["balanced"] == 3 * (4 + 2) * expert and memory["predictive-buffered"] == (3 * 4 + 2 * 2) * expert


def test_one_worker_and_two_give_the_same_table(trace, tmp_path):
    axes = axes_of(trace, gpus=[2, 4], batch_tokens=[16, 64])
    ended = []
    one, _ = run(axes, tmp_path / "one")
    two, _ = run(axes, tmp_path / "two", workers=2, done=ended.append)
    assert one == two and sum(ended) == len(two) == 12
    assert parquet.read_table(tmp_path / "one" / TABLE).equals(parquet.read_table(tmp_path / "two" / TABLE))


def test_a_lossy_run_has_a_time_and_no_speedup(trace, tmp_path):
    mine = tmp_path / "skips.toml"
    mine.write_text('base = "on-demand"\nmiss = "skip"\n')
    rows, _ = run(axes_of(trace, gpus=[1], resident=[2], policy=["on-demand", str(mine)]), tmp_path / "sweep")
    found = {row["policy"]: row for row in rows}
    skips = found[str(mine)]
    assert skips["lossy"] and skips["total_s"] and skips["speedup"] is None
    assert found["on-demand"]["speedup"] == 1


def test_what_cannot_run_is_a_row_with_its_reason(trace, tmp_path):
    axes = axes_of(trace, gpus=[2, 16], resident=[None, 2, 9], policy=["eplb", "on-demand"])
    rows, _ = run(axes, tmp_path / "sweep")
    reasons = {(row["policy"], row["gpus"], row["resident"]): row["reason"] for row in rows}
    assert reasons["eplb", 2, None] is None and reasons["on-demand", 2, 2] is None
    assert "needs every expert on a GPU" in reasons["eplb", 2, 2]
    assert "has 8 GPUs, 16 cannot" in reasons["eplb", 16, None]
    assert "9 resident slots" in reasons["on-demand", 2, 9]
    assert all(row["total_s"] is None and row["speedup"] is None for row in rows if row["reason"])
    again, there = run(axes, tmp_path / "sweep")
    assert again == rows and there == len(rows)


def test_what_has_changed_is_refused(trace, tmp_path):
    moved = shutil.copytree(trace, tmp_path / "moved.moetrace")
    axes, out = axes_of(str(moved)), tmp_path / "sweep"
    run(axes, out)
    for changed, part in (
        ({"batch_tokens": [64]}, "axes batch_tokens"),
        ({"policy": ["eplb"]}, "axes policy"),
        ({"micro_batches": [2]}, "axes micro_batches"),
    ):
        with pytest.raises(InputError, match=f"changed since: {part}"):
            run({**axes, **changed}, out)
    with pytest.raises(InputError, match="changed since: baseline"):
        run(axes, out, baseline="balanced")
    write_trace(moved, seed=1)
    with pytest.raises(InputError, match="changed since: traces"):
        run(axes, out)


def test_a_changed_policy_file_or_profile_is_refused(trace, tmp_path):
    mine, profile = tmp_path / "mine.toml", tmp_path / "here.json"
    mine.write_text('base = "eplb"\n')
    load_profile(NODE).save(profile)
    axes, out = axes_of(trace, policy=[str(mine)], profile=[str(profile)]), tmp_path / "sweep"
    run(axes, out)
    mine.write_text('base = "balanced"\n')
    with pytest.raises(InputError, match="changed since: policies"):
        run(axes, out)
    mine.write_text('base = "eplb"\n[found]\nspeedup = 1.0\n')  # says the same
    told = json.loads(profile.read_text())
    told["gpu"]["hbm_bytes_per_s"] *= 2
    profile.write_text(json.dumps(told))
    with pytest.raises(InputError, match="changed since: profiles"):
        run(axes, out)


def test_folders_that_hold_something_else_are_refused(trace, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no sweep and not empty"):
        run(axes_of(trace), tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"sweep.json: cannot be read as JSON"):
        run(axes_of(trace), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "swapped", "other"])
def test_a_damaged_part_is_run_again(trace, tmp_path, damage):
    rows, _ = run(axes_of(trace), tmp_path)
    part, other = (tmp_path / RUNS / f"{row['key']}.parquet" for row in rows[:2])
    content = part.read_bytes()
    at = content.index(b"predictive") if b"predictive" in content else len(content) // 3
    part.write_bytes(
        {
            "empty": b"",
            "cut": content[:-20],
            "flipped": content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :],
            "swapped": other.read_bytes(),
            "other": b"PAR1 no parquet PAR1",
        }[damage]
    )
    again, there = run(axes_of(trace), tmp_path)
    assert again == rows and there == len(rows) - 1 and part.read_bytes() == content


def test_ctrl_c_keeps_what_has_run_and_writes_the_table(trace, tmp_path):
    def interrupt(count):
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(axes_of(trace), tmp_path, done=interrupt)
    assert parquet.read_table(tmp_path / TABLE).num_rows == 1
    _, there = run(axes_of(trace), tmp_path)
    assert there == 1


numbers = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(numbers, numbers, st.lists(st.sampled_from(["contiguous", "eplb", "balanced"]), min_size=1, max_size=4))
def test_every_combination_is_there_once_with_its_baseline(gpus, batch_tokens, policy):
    axes = {"trace": ["t"], "profile": ["p"], "phase": ["encoder"], "gpus": gpus, "batch_tokens": batch_tokens}
    found = points({**axes, "policy": policy})
    keys = [one.key for one in found]
    assert len(set(keys)) == len(keys) == len(set(gpus)) * len(set(batch_tokens)) * len({*policy, "contiguous"})
    assert all(one.baseline() in found for one in found)
    changes = sum(a.scenario_key() != b.scenario_key() for a, b in pairwise(found))
    assert changes == len(set(gpus)) * len(set(batch_tokens)) - 1, "runs of a scenario are neighbours"
    for workers in (1, 3):
        parts = chunks(found, workers)
        assert [one for part in parts for one in part] == found
        assert all(len({one.scenario_key() for one in part}) == 1 for part in parts)


def test_every_setting_changes_the_key():
    plain = Settings(trace="t", policy="p", profile="n", gpus=2, phase="encoder")
    other = {str: "x", int: 7, bool: True}
    for field in dataclasses.fields(Settings):
        value = next(other[kind] for kind in other if type(getattr(plain, field.name) or "") is kind)
        value = (not getattr(plain, field.name)) if isinstance(getattr(plain, field.name), bool) else value
        assert dataclasses.replace(plain, **{field.name: value}).key != plain.key, field.name


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"speed": [1]}, "speed is no setting"),
        ({"gpus": []}, "gpus has no values"),
        ({"gpus": ["2"]}, "gpus must be int, got '2'"),
        ({"gpus": [True]}, "gpus must be int, got True"),
        ({"resident": [1.5]}, "resident must be int, got 1.5"),
        ({"send": [3]}, "send must be str, got 3"),
    ],
)
def test_wrong_axes(axes, message):
    with pytest.raises(InputError, match=message):
        check_axes(axes)


def test_a_search_asks_the_same_whoever_runs_it_and_after_a_stop(trace, tmp_path):
    pytest.importorskip("optuna")
    axes = axes_of(trace, batch_tokens=[16, 32, 64, 96], gpus=[2, 4, 16], extra_slots=[0, 1, 2])
    search = Search(trials=10, objective="throughput")
    one, _ = run(axes, tmp_path / "one", search=search)
    two, _ = run(axes, tmp_path / "two", workers=2, search=search)
    assert one == two and 10 <= len(one) <= 20
    ended = 0

    def stop(count):
        nonlocal ended
        ended += count
        if ended >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(axes, tmp_path / "three", search=search, done=stop)
    three, there = run(axes, tmp_path / "three", search=search)
    assert three == one and there == 7
    with pytest.raises(InputError, match="changed since: search trials"):
        run(axes, tmp_path / "three", search=Search(trials=11, objective="throughput"))


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("optuna", {"search": Search(trials=2)}, r"--optuna needs optuna: pip install 'moesim\[sweep\]'"),
        ("pyarrow", {}, r"table needs pyarrow: pip install 'moesim\[sweep\]'"),
    ],
)
def test_a_missing_package_is_one_line(trace, tmp_path, monkeypatch, missing, options, message):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=message):
        run(axes_of(trace), tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep").exists()


def test_a_missing_ray_is_one_line(trace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs ray: pip install 'moesim\[ray\]'"):
        run_sweep(Sweep(axes=axes_of(trace)), tmp_path, workers=1, ray="auto", done=lambda _: None)


@pytest.mark.skipif("MOESIM_RAY" not in os.environ, reason="starts Ray, which takes long: set MOESIM_RAY to run it")
def test_a_ray_cluster_gives_the_same_table(trace, tmp_path):
    axes = axes_of(trace, gpus=[2, 4], batch_tokens=[16, 64])
    here, _ = run(axes, tmp_path / "here")
    sweep = Sweep(axes=axes)
    there, found = run_sweep(sweep, tmp_path / "there", workers=1, ray="local", done=lambda _: None)
    assert there == here and found == 0
    assert run_sweep(sweep, tmp_path / "there", workers=1, ray=None, done=lambda _: None) == (here, len(here))


def test_rows_keep_their_types(trace, tmp_path):
    (row, *_), _ = run(axes_of(trace), tmp_path)
    read = Store(tmp_path).row(row["key"])
    assert read == {name: value for name, value in row.items() if name != "speedup"}
    assert type(read["gpus"]) is int and type(read["overlap"]) is bool and type(read["total_s"]) is float
