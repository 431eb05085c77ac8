"""`moesim quality`, and what `simulate` and `compare` make of its file."""

import json

import pytest
from click.testing import CliRunner
from switch_models import SHIPPED

from moesim.cli.main import main
from moesim.sim.quality import load_qualities

RESIDENT, SIMULATE = 8, ["--profile", "1xRTX4090-PCIe", "--resident", "8", "--batch-tokens", "256", "--max-steps", "3"]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(trace, quality file, what was printed)."""
    folder = tmp_path_factory.mktemp("quality")
    trace, out = folder / "t.moetrace", folder / "quality.json"
    options = ["--max-tokens", 4000, "--router-input", "--lookahead", 3]
    assert run("record", "--model", SHIPPED, "--text", SHIPPED / "samples", "--out", trace, *options).exit_code == 0
    asked = ["--policy", "fate,on-demand", "--resident", RESIDENT, "--max-requests", 2, "--out", out, "--device", "cpu"]
    told = run("quality", SHIPPED, "--trace", trace, *asked)
    assert told.exit_code == 0, told.output
    return trace, out, told.output


def test_prints_what_was_measured_on_what(measured):
    _, out, told = measured
    fate, exact = load_qualities(out)
    assert (fate.policy, exact.policy, fate.resident) == ("fate", "on-demand", RESIDENT)
    assert f"{fate.loss - fate.exact_loss:+.4f} ± {fate.loss_error:.4f}" in told
    assert "2 held-out requests of t.moetrace" in told and "8 slots a layer" in told


def test_simulate_prints_no_speedup_of_a_lossy_policy_without_its_quality(measured):
    trace = measured[0]
    told = run("simulate", trace, "--policy", "fate,lfu", *SIMULATE)
    lines = told.output.splitlines()
    speeds = {name: [line for line in lines if line.startswith(f"│ {name} ")] for name in ("fate", "lfu")}
    assert [cell.strip() for cell in speeds["fate"][0].split("│")[2:7]] == ["-"] * 5, "neither speedup nor times"
    assert speeds["lfu"][0].split("│")[2].strip().endswith("x")
    assert "quality not measured: moesim quality MODEL --trace TRACE --policy fate --resident 8" in told.output
    entries = json.loads(run("simulate", trace, "--policy", "fate,lfu", *SIMULATE, "--json").output)["results"]
    by_name = {entry["policy"]: entry for entry in entries}
    assert by_name["fate"]["speedup"] is None and by_name["fate"]["quality"] is None
    assert by_name["lfu"]["speedup"] > 0 and by_name["lfu"]["quality"] == "exact"


def test_simulate_prints_it_beside_its_quality(measured):
    trace, out, _ = measured
    told = run("simulate", trace, "--policy", "fate", *SIMULATE, "--quality", out, "--json")
    fate = json.loads(told.output)["results"][1]
    assert fate["speedup"] > 0
    assert fate["quality"]["loss"] == load_qualities(out)[0].loss
    told = run("simulate", trace, "--policy", "fate", *SIMULATE, "--quality", out)
    assert f"{fate['speedup']:.3f}x" in told.output and "top-1" in told.output
    assert "quality not measured" not in told.output
    elsewhere = ["9" if option == "8" else option for option in SIMULATE]
    told = run("simulate", trace, "--policy", "fate", *elsewhere, "--quality", out)
    assert "quality not measured" in told.output, "it was measured with 8 slots"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "best"], "unknown policy 'best'"),
        (["--policy", ","], "--policy names no policy"),
        (["--policy", "eplb", "--resident", "8"], "needs every expert on a GPU"),
        (["--policy", "on-demand", "--resident", "40"], "--resident 40 is 40 slots a layer"),
        (["--policy", "oracle-prefetch", "--resident", "8"], "shown recorded routing"),
    ],
)
def test_errors_are_one_line(measured, arguments, message):
    result = run("quality", SHIPPED, "--trace", measured[0], *arguments, "--max-requests", 1)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_lossy_means_those_that_run_with_so_many_slots():
    from moesim.cli.quality import _policies

    assert "fate" in _policies("lossy", 8) and "predictive-replication-executed" not in _policies("lossy", 8)
    assert "fate" not in _policies("lossy", None) and "predictive-replication-executed" in _policies("lossy", None)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    result = run("quality", tmp_path, "--policy", "fate")
    assert result.exit_code == 2 and "not a model folder" in result.stderr
