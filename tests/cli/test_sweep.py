"""`moesim sweep` as a user sees it, and the regime map as numbers."""

import json

import pytest
from click.testing import CliRunner
from pyarrow import parquet

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.cli.regime import TIE, best, draw_regimes, regimes
from moesim.sim.sweep import AXES, Settings
from moesim.traces import InputError
from moesim.traces.writer import TraceWriter

NODE = "8xH100-NVLink"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "small.moetrace"
    with TraceWriter(path, make_spec(), {}) as writer:
        writer.append("encoder", make_table(requests=20))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


def test_the_table_and_what_is_on_disk(trace, tmp_path):
    out = tmp_path / "s"
    words = [trace, "--policy", "eplb,predictive-layer", "--profile", NODE, "--gpus", "2,4", "--batch-tokens", "64,128"]
    result = run(*words, "--out", out)
    assert result.exit_code == 0, result.output
    assert "The 8 largest speedups of 8, simulated" in result.stdout and "12 runs, 0 of them found" in result.stdout
    again = run(*words, "--out", out, "--json")
    told = json.loads(again.stdout)
    assert told["found"] == len(told["rows"]) == 12 and again.stderr == ""
    table = parquet.read_table(told["table"]).to_pylist()
    assert table == told["rows"]
    assert {row["policy"] for row in table} == {"contiguous", "eplb", "predictive-layer"}
    assert all(row["speedup"] == 1 for row in table if row["policy"] == "contiguous")


def test_one_row_is_what_simulate_prints(trace, tmp_path):
    options = ["--policy", "eplb", "--profile", NODE, "--gpus", "4", "--extra-slots", "2", "--shuffle", "0"]
    options += ["--batch-tokens", "64", "--send", "per-gpu", "--dtype", "bfloat16", "--json"]
    row = json.loads(run(trace, *options, "--out", tmp_path / "s").stdout)["rows"][-1]
    alone = json.loads(CliRunner().invoke(main, ["simulate", str(trace), *options]).stdout)["results"][-1]
    assert row["policy"] == alone["policy"] == "eplb" and row["speedup"] == alone["speedup"]
    for name in ("latency_p99_s", "throughput_tokens_per_s", "balancedness_ratio_of_sums", "moved_bytes", "load_error"):
        assert row[name] == alone["metrics"][name]


def test_options_go_before_the_grid_file(trace, tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text(f'policy = ["eplb", "balanced"]\nprofile = "{NODE}"\ngpus = [2, 4]\ntensor_parallel = [1, 2]\n')
    told = json.loads(run(trace, "--grid", grid, "--gpus", "2", "--json", "--out", tmp_path / "s").stdout)
    found = {(row["policy"], row["gpus"], row["tensor_parallel"]) for row in told["rows"]}
    assert found == {(policy, 2, n) for policy in ("contiguous", "eplb", "balanced") for n in (1, 2)}
    told = json.loads(
        run(trace, "--grid", grid, "--tensor-parallel", "1", "--json", "--out", tmp_path / "other").stdout
    )
    assert {(row["gpus"], row["tensor_parallel"]) for row in told["rows"]} == {(2, 1), (4, 1)}


def test_made_up_traces_of_several_skews_and_their_map(tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text("[synthetic]\nexperts = 16\nlayers = 1\ntop_k = 1\nrequests = 64\nrequest_tokens = 16\n")
    words = ["--grid", grid, "--skew", "2,6", "--policy", "balanced,oracle", "--profile", NODE, "--shapes"]
    words += ["switch-base", "--dtype", "bfloat16", "--batch-tokens", "32,256", "--extra-slots", "0,1"]
    out, picture = tmp_path / "s", tmp_path / "map.png"
    result = run(*words, "--out", out, "--map", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = parquet.read_table(out / "table.parquet").to_pylist()
    found = regimes(rows, {})
    assert (found.batch_tokens, len(found.cells), found.left_out) == ([32, 256], 8, ["oracle"])
    (_, low), (_, high) = found.traces
    assert low < 3.5 < high
    made = sorted((out / "traces").iterdir())
    before = [path.stat().st_mtime_ns for path in made]
    assert "24 runs, 24 of them found" in run(*words, "--out", out).stdout
    assert [path.stat().st_mtime_ns for path in made] == before, "traces are made once"


def row(policy, speedup, moved=0, memory=2 << 20, tokens=64, trace="a.moetrace", skew=2.0, **changes):
    settings = Settings(trace=trace, policy=policy, profile=NODE, gpus=8, phase="prefill", batch_tokens=tokens)
    return {
        **{name: getattr(settings, name) for name in AXES},
        "profile_kind": "spec-sheet",
        "speedup": speedup,
        "moved_bytes": moved,
        "expert_bytes_per_gpu": memory,
        "skew": skew,
        "lossy": False,
        "reason": None,
        **changes,
    }


def test_the_best_of_equals_moves_the_fewest_bytes():
    base = row("contiguous", 1.0)
    assert best([base, row("eplb", 1.2, 9), row("balanced", 1.2 * (1 - TIE / 2))]).policy == "balanced"
    assert best([base, row("eplb", 1.2, 9), row("balanced", 1.2 * (1 - 2 * TIE))]).policy == "eplb"
    assert best([base, row("eplb", 1 + TIE / 2)]).policy == "contiguous"
    assert best([row("eplb", 1.2, 9, 10), row("predictive-layer", 1.2, 9, 5)]).policy == "predictive-layer"


def test_fields_without_a_fair_run_stay_empty_and_lossy_ones_never_win(tmp_path):
    rows = [
        row("contiguous", 1.0),
        row("oracle", 9.0),
        row("eplb", 5.0, lossy=True),
        row("oracle", 2.0, tokens=128),
        row("balanced", None, tokens=256, reason="too little memory"),
        row("balanced", 1.1, skew=8.0, trace="b.moetrace"),
    ]
    found = draw_regimes(rows, tmp_path / "map.png", {})
    assert {key: cell.policy for key, cell in found.cells.items()} == {
        (64, "a.moetrace", 1): "contiguous",
        (64, "b.moetrace", 1): "balanced",
    }
    assert found.batch_tokens == [64, 128] and found.left_out == ["eplb", "oracle"]
    assert found.traces == [("a.moetrace", 2.0), ("b.moetrace", 8.0)] and found.memory == [(1, 2)]


def test_a_map_holds_everything_else_fixed():
    rows = [row("contiguous", 1.0), row("contiguous", 1.0, gpus=4)]
    with pytest.raises(InputError, match="a map holds gpus fixed, the sweep has 4, 8: choose one, --where gpus=4"):
        regimes(rows, {})
    assert regimes(rows, {"gpus": "4"}).fixed[1] == "4 GPUs"
    with pytest.raises(InputError, match="nothing to draw"):
        regimes(rows, {"gpus": "2"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "best"], "unknown policy 'best'"),
        (["--policy", "eplb", "--baseline", "none"], "unknown policy 'none'"),
        ([], "nothing to run: give --policy"),
        (["--policy", "eplb", "--profile", "9xB300"], "no profile '9xB300'"),
        (["--policy", "eplb", "--gpus", "two"], "--gpus 'two': give numbers separated by commas"),
        (["--policy", "eplb", "--profile", f"{NODE},1xRTX4090-PCIe"], "different numbers of GPUs: give --gpus"),
        (["--policy", "eplb", "--phase", "training"], "unknown phase 'training'"),
        (["--policy", "eplb", "--shapes", "gpt-9"], "unknown shapes 'gpt-9'"),
        (["--policy", "eplb", "--skew", "high"], "--skew 'high': give numbers"),
        (["--policy", "eplb", "--map", "m.png", "--where", "colour=red"], "--where 'colour=red': give NAME=VALUE"),
        (["--policy", "eplb", "--where", "gpus=8"], "--where chooses rows for a map: give --map FILE"),
        (["--policy", "eplb", "--grid", "none.toml"], "none.toml: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trace, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    profile = [] if "--profile" in options else ["--profile", NODE]
    result = run(trace, *profile, *options, "--max-steps", "1", "--out", "s")
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_grid_file_whose_policy_is_no_name_is_said_in_one_line(trace, tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text("policy = [1]")
    result = run(trace, "--profile", NODE, "--grid", grid, "--out", tmp_path / "s")
    assert result.exit_code == 2 and "policy must be str, got 1" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy = [", "no TOML"),
        ("colour = 1", "colour is no setting of a run"),
        ('gpus = "two"', "gpus must be int, got 'two'"),
        ("[synthetic]\nskew = []", "[synthetic] skew: give numbers"),
        ("[synthetic]\nheight = 3", "[synthetic] height is not known"),
        ("synthetic = 3", "synthetic must be a table"),
    ],
)
def test_a_wrong_grid_file_is_said_in_one_line(trace, tmp_path, text, message):
    grid = tmp_path / "grid.toml"
    grid.write_text(text)
    result = run(trace, "--policy", "eplb", "--profile", NODE, "--grid", grid, "--out", tmp_path / "s")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()
