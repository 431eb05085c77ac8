"""`moesim tune` as a user sees it, and the winner's file in other commands."""

import json
import shlex
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.cli.tune import write_winner
from moesim.sim.policies import POLICIES, recipe
from moesim.sim.tune import Candidate
from moesim.traces.writer import TraceWriter

NODE = "8xH100-NVLink"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "small.moetrace"
    with TraceWriter(path, make_spec(), {}) as writer:
        writer.append("encoder", make_table(requests=40))
    return path


def run(*arguments, command="tune"):
    return CliRunner().invoke(main, [command, *map(str, arguments)])


def test_the_winner_is_written_confirmed_and_simulated_by_the_printed_command(trace, tmp_path):
    out = tmp_path / "deep" / "winner.toml"
    options = [trace, "--profile", NODE, "--gpus", 4, "--batch-tokens", 64, "--dtype", "bfloat16", "--out", out]
    options += ["--micro-batches", 2, "--no-overlap"]
    result = run(*options, "--policies", "balanced,eplb,predictive-layer")
    assert result.exit_code == 0, result.output
    for words in ("Speedup over contiguous, simulated", "winner: ", "that the choice never saw", "constraints: exact."):
        assert words in result.stdout
    found = tomllib.loads(out.read_text())
    assert found["base"] == found["found"]["policy"]
    told = found["found"]
    assert told["profile"] == NODE and told["gpus"] == 4 and len(told["trace_sha256"]) == 64
    assert told["fit_requests"] + told["tune_requests"] + told["confirm_requests"] == 40
    words = shlex.split(result.stdout.splitlines()[-1])
    assert "--no-overlap" in words and "False" not in words
    assert words[:2] == ["moesim", "simulate"] and "--dtype" in words and str(out) in words
    simulated = CliRunner().invoke(main, [*words[1:], "--json"])
    named = [told["policy"] if word == str(out) else word for word in words[1:]]
    assert simulated.exit_code == 0, simulated.output
    ours, theirs = (
        json.loads(r.stdout)["results"][-1] for r in (simulated, CliRunner().invoke(main, [*named, "--json"]))
    )
    assert ours["metrics"] == theirs["metrics"] and ours["speedup"] == theirs["speedup"]


def test_json_has_every_candidate_and_nothing_else_is_on_stdout(trace, tmp_path):
    options = [trace, "--profile", NODE, "--gpus", 2, "--batch-tokens", 64, "--policies", "eplb,on-demand"]
    result = run(*options, "--extra-slots", "0,1", "--memory-gib", 0.00005, "--json")
    told = json.loads(result.stdout)
    assert result.stderr == ""
    names = {(one["policy"], one["extra_slots"], *one["changes"]) for one in told["candidates"]}
    assert ("eplb", 1, "interval 16") in names and ("contiguous", 0) in names
    assert told["winner"]["constraints"] == ["exact", "expert slots within 5e-05 GiB a GPU"]
    assert told["winner"]["confirmed_speedup"] > 0
    out = {one["reason"] for one in told["candidates"] if one["extra_slots"] == 1 and one["policy"] == "eplb"}
    assert len(out) == 1 and "GiB a GPU" in out.pop()


@pytest.mark.parametrize("changes", [(), (("interval", 3),)])
def test_a_winners_file_is_the_candidate_when_read_back(tmp_path, changes):
    candidate = Candidate(policy="eplb", extra_slots=2, changes=changes)
    path = tmp_path / "winner.toml"
    write_winner(candidate, {"tuned_speedup": 1.25, "constraints": ["exact"], "note": None}, path)
    assert recipe(str(path)) == candidate.recipe()
    assert tomllib.loads(path.read_text())["found"] == {"tuned_speedup": 1.25, "constraints": ["exact"]}
    assert ("[rule]" in path.read_text()) == bool(changes)


@pytest.mark.parametrize("name", [name for name, parts in POLICIES.items() if parts.miss is None])
def test_any_policys_file_is_the_policy_when_read_back(tmp_path, name):
    path = tmp_path / "winner.toml"
    write_winner(Candidate(policy=name, extra_slots=0), {}, path)
    assert recipe(str(path)) == POLICIES[name]


def test_a_users_own_policy_is_written_whole(trace, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "eplb"\nsummary = "mine"\n\n[rule]\nname = "periodic"\ninterval = 2\n')
    out = tmp_path / "winner.toml"
    write_winner(Candidate(policy=str(mine), extra_slots=1), {}, out)
    mine.unlink()
    assert "summary" in out.read_text() and recipe(str(out)).rule.interval == 2


def test_run_gpu_accepts_the_file(tmp_path):
    path = tmp_path / "winner.toml"
    write_winner(Candidate(policy="eplb", extra_slots=1), {}, path)
    from moesim.cli.run_gpu import RUNNABLE, policy_names

    assert policy_names(str(path), "contiguous", RUNNABLE) == ("contiguous", str(path))


def test_lossy_settings_are_refused_a_rank(trace):
    options = [trace, "--profile", NODE, "--gpus", 2, "--batch-tokens", 64, "--policies", "predictive-layer"]
    options += ["--extra-slots", 1]  # without, nothing is copied and all is exact
    told = run(*options, "--copy-dtype", "int4").stdout
    assert "out: predictive-layer, 1 extra slot" in told and "not exact (--allow-lossy)" in told
    told = run(*options, "--copy-dtype", "int4", "--allow-lossy").stdout
    assert "its quality has not been measured" in told and "predictive-layer" not in told.split("winner:")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "best"], "unknown policy 'best'"),
        (["--extra-slots", "some"], "--extra-slots 'some': give numbers"),
        (["--gpus", "9"], "has 8 GPUs, 9 cannot"),
        (["--latency-ms", "0"], "no candidate runs and keeps the constraints"),
        (["--batch-tokens", "100000", "--max-steps", "1", "--memory-gib", "0"], "no candidate runs"),
        (["--out", "file/x.toml"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trace, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    policies = [] if "--policies" in options else ["--policies", "balanced"]
    result = run(trace, "--profile", NODE, *policies, *options)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
