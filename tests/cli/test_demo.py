"""The whole pipeline as `make demo` runs it, small: what it leaves behind, and that both sides decided alike."""

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from moesim.cli import main
from moesim.sim.results import load_results
from moesim.sim.tune import default_policies
from moesim.traces.store import Trace

MODEL = Path(__file__).parents[2] / "models/switch-mini"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--model", MODEL, "--out", out, "--device", "cpu", "--max-tokens", 8000, "--batch-tokens", 512]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return out, result.output


def test_it_ends_with_the_comparison(demo):
    out, told = demo
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["baseline"] == "contiguous"
    assert all(row["measured"] > 0 and row["simulated"] > 0 for row in comparison["rows"])
    assert "Speedup over contiguous: simulated beside measured" in told
    assert "error" in told


def test_it_leaves_trace_results_and_picture(demo):
    out, _ = demo
    assert list(Trace.open(out / "trace.moetrace").verify())
    assert {r.policy for r in load_results(out / "simulated.json")} >= set(default_policies(offload=False))
    assert {r.kind for r in load_results(out / "measured.json")} == {"measured"}
    assert (out / "load.png").read_bytes().startswith(b"\x89PNG") and (out / "load.png").stat().st_size > 10_000


def test_the_winner_is_tuned_on_requests_and_confirmed_on_others(demo):
    out, told = demo
    found = tomllib.loads((out / "winner.toml").read_text())["found"]
    assert found["profile_kind"] == "measured" and found["confirmed_speedup"] > 0
    assert min(found[f"{part}_requests"] for part in ("fit", "tune", "confirm")) > 0
    winner = json.loads((out / "winner.json").read_text())["winner"]
    assert winner == found["policy"] and f"Run the winner, {winner}" in told
    assert winner in {r.policy for r in load_results(out / "measured.json")}


def test_simulated_and_measured_runs_computed_the_same_tokens(demo):
    out, _ = demo
    simulated = {r.policy: r for r in load_results(out / "simulated.json")}
    for result in load_results(out / "measured.json"):
        if result.policy == "contiguous":
            ours, theirs = simulated["contiguous"].totals, result.totals
            for name in ("tokens", "steps", "layers", "balance", "mean_load", "peak_load"):
                assert getattr(ours, name) == getattr(theirs, name), name
