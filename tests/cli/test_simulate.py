"""`moesim simulate` as a user sees it: tables, JSON, files, errors in one line, Ctrl-C."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.sim import runs
from moesim.sim.events import result_of
from moesim.sim.log import read_log
from moesim.sim.policies import POLICIES, is_trained, needs_tokens, offloading
from moesim.sim.profile import load_profile
from moesim.sim.results import load_results
from moesim.traces import LoadTable, Phase, load_LE
from moesim.traces.writer import TraceWriter

NODE = "8xH100-NVLink"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "small.moetrace"
    with TraceWriter(path, make_spec(), {}) as writer:
        writer.append("encoder", make_table(requests=20))
    return path


def run(*arguments, trace):
    return CliRunner().invoke(main, ["simulate", str(trace), *map(str, arguments)])


def test_the_tables_and_their_footnotes(trace):
    result = run("--policy", "all", "--profile", NODE, "--batch-tokens", 64, "--dtype", "bfloat16", trace=trace)
    assert result.exit_code == 0, result.output
    everywhere = [name for name in POLICIES if name not in offloading()]
    left_out = [name for name in everywhere if is_trained(name) or "gate" in (POLICIES[name].predictor or "")]
    for name in everywhere:
        assert result.stdout.count(f"│ {name} ") == (0 if name in left_out else 4)
        assert (name in result.stderr) == (name in left_out)
    for words in (
        "Speedup over contiguous (simulated)",
        "encoder of switch, 8 GPUs, 64 tokens a step in order of arrival, 5 steps, 320 tokens",
        "bfloat16; fitted on one part of the requests and run on the other, split by request",
        "8xH100-NVLink (from spec sheets, not measured: NVIDIA H100 SXM5 80 GB)",
        "time of decisions: not modelled",
    ):
        assert words in result.stdout
    assert result.stderr.startswith("left out: ") and result.stderr.count("\n") == 1
    assert "(trains a net first, so it is run where it is named)" in result.stderr
    assert "(asks the gates of later layers: record with --lookahead 1 or more)" in result.stderr


def test_all_policies_with_too_few_slots_and_what_became_of_their_copies(trace):
    options = ["--policy", "all", "--profile", "1xRTX4090-PCIe", "--resident", 3, "--batch-tokens", 4, "--max-steps", 8]
    result = run(*options, trace=trace)
    assert result.exit_code == 0, result.output
    for name in ("on-demand", "lfu", "arc", "belady", "prefetch-layer", "moe-infinity", "oracle-prefetch"):
        assert result.stdout.count(f"│ {name} ") == 5
    for words in ("Experts that were there when they were needed", "wasted: prefetched and displaced unused"):
        assert words in result.stdout
    assert "fiddler (is the same as on-demand-cpu)" in result.stderr
    assert "hobbit, hobbit-exact, fate, pre-gated (asks the gates of later layers" in result.stderr
    told = json.loads(run(*options, "--json", trace=trace).stdout)["results"][0]["metrics"]["cache"]
    assert len(told["hit_rate_L"]) == 3 and 0 < told["hit_rate"] < 1 and told["prefetch_precision"] is None


def test_json_is_all_that_is_on_stdout(trace):
    options = ["--policy", "oracle,eplb", "--baseline", "balanced", "--profile", NODE, "--gpus", 2, "--json"]
    result = run(*options, "--batch-tokens", 64, trace=trace)
    data = json.loads(result.stdout)
    assert data["baseline"] == "balanced" and data["config"]["gpus"] == 2
    assert [entry["policy"] for entry in data["results"]] == ["balanced", "oracle", "eplb"]
    base, oracle, _ = data["results"]
    assert base["speedup"] == 1
    seconds = [sum(entry["phase_s"].values()) for entry in (base, oracle)]
    assert oracle["speedup"] == pytest.approx(seconds[0] / seconds[1])
    assert {"balancedness_mean_of_ratios", "balancedness_ratio_of_sums", "recall"} <= oracle["metrics"].keys()


def test_a_measured_profile_is_called_measured_and_its_decisions_are_charged(trace, tmp_path):
    path = tmp_path / "here.json"
    load_profile(NODE).save(path)
    data = json.loads(path.read_text())
    data["provenance"]["kind"] = "measured"
    data["decide_s"] = {"contiguous": 0.0, "eplb": 0.5}
    path.write_text(json.dumps(data))
    result = run("--policy", "eplb", "--profile", path, "--batch-tokens", 64, trace=trace)
    assert "(measured on NVIDIA H100" in result.stdout and "time of decisions: modelled" in result.stdout
    result = run("--policy", "eplb", "--profile", path, "--batch-tokens", 64, "--json", trace=trace)
    base, eplb = json.loads(result.stdout)["results"]
    assert base["phase_s"]["decide"] == 0 and eplb["phase_s"]["decide"] == pytest.approx(0.5 * 4 * 5)
    result = run("--policy", "eplb,oracle", "--profile", path, "--batch-tokens", 64, trace=trace)
    assert "time of decisions: not modelled for oracle" in result.stdout


def test_results_and_logs_are_written(trace, tmp_path):
    files = {name: tmp_path / "deep" / name for name in ("out", "event-log", "decision-log")}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    result = run("--policy", "oracle", "--profile", NODE, "--max-steps", 2, *options, trace=trace)
    assert result.exit_code == 0, result.output
    results = load_results(files["out"])
    assert [r.policy for r in results] == ["contiguous", "oracle"]
    assert all(r.kind == "simulated" and r.totals.steps <= 2 and not r.steps for r in results)
    events, decisions = (
        [json.loads(line) for line in files[name].read_text().splitlines()] for name in ("event-log", "decision-log")
    )
    assert {event["policy"] for event in events} == {"contiguous", "oracle"}
    assert {"attention", "experts", "communication"} <= {event["what"] for event in events}
    assert {decision["decision"] for decision in decisions} == {"dispatch", "transfers"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "best"], "unknown policy 'best'; known: contiguous, balanced"),
        (["--policy", "eplb", "--baseline", "none"], "unknown policy 'none'"),
        (["--policy", ","], "--policy names no policy"),
        (["--policy", "eplb", "--profile", "9xB300"], "no profile '9xB300'"),
        (["--policy", "eplb", "--gpus", "9"], "has 8 GPUs, 9 cannot"),
        (["--policy", "eplb", "--gpus", "0"], "has 8 GPUs, 0 cannot"),
        (["--policy", "eplb", "--batch-tokens", "0"], "a batch must hold at least 1"),
        (["--policy", "eplb", "--extra-slots", "-1"], "extra slots must not be negative"),
        (["--policy", "eplb", "--phase", "decode"], "nothing was recorded of stack 'decoder'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trace, options, message):
    profile = [] if "--profile" in options else ["--profile", NODE]
    result = run(*profile, *options, trace=trace)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_files_that_cannot_be_read_or_written(trace, tmp_path):
    result = run("--policy", "eplb", "--profile", NODE, trace=tmp_path / "none.moetrace")
    assert result.exit_code == 2 and "none.moetrace" in result.stderr
    (tmp_path / "file").write_text("")
    for option in ("--out", "--event-log", "--decision-log"):
        result = run("--policy", "eplb", "--profile", NODE, option, tmp_path / "file" / "x", trace=trace)
        assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_a_model_without_encoder_is_simulated_in_prefill(tmp_path):
    spec = make_spec()
    decoder = spec.to_dict()
    decoder["stacks"][0]["name"] = "decoder"
    path = tmp_path / "decoder.moetrace"
    with TraceWriter(path, spec.from_dict(decoder), {}) as writer:
        writer.append("decoder", make_table(phase=Phase.PREFILL))
    result = run("--policy", "eplb", "--profile", NODE, "--json", trace=path)
    assert json.loads(result.stdout)["config"]["phase"] == "prefill"


@pytest.mark.parametrize(("after", "kept"), [(0, "before the first policy"), (1, "kept in")])
def test_ctrl_c_keeps_what_is_done_and_says_so(trace, tmp_path, monkeypatch, after, kept):
    simulated = runs.simulate
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)

        def stop(_done):
            if len(calls) > after:
                raise KeyboardInterrupt

        return simulated(*args, **{**kwargs, "progress": stop})

    monkeypatch.setattr(runs, "simulate", interrupted)
    out = tmp_path / "out.json"
    result = run("--policy", "all", "--profile", NODE, "--out", out, trace=trace)
    assert result.exit_code == 130 and kept in result.stderr
    assert out.exists() == bool(after)
    if after:
        assert [r.policy for r in load_results(out)] == ["contiguous"] and "contiguous" in result.stderr


def test_ctrl_c_without_out_says_that_nothing_is_kept(trace, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moesim.sim.runs.simulate", interrupted)
    result = run("--policy", "all", "--profile", NODE, trace=trace)
    assert result.exit_code == 130 and "nothing is kept" in result.stderr


def test_simulating_never_imports_torch(trace):
    code = (
        "import sys\nfrom moesim.cli import main\n"
        f"main(['simulate', {str(trace)!r}, '--policy', 'all', '--profile', {NODE!r}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def loads(trace, tmp_path_factory):
    """The same recording, counted request by request."""
    path = tmp_path_factory.mktemp("traces") / "loads.moetrace"
    table = make_table(requests=20)
    counted = [load_LE(table.topk_ids[table.request == r], 8) for r in range(20)]
    rows = LoadTable(load=np.stack(counted), step=np.arange(20, dtype=np.int32), phase=np.zeros(20, np.uint8))
    with TraceWriter(path, make_spec(), {}, kind="loads") as writer:
        writer.append("encoder", rows)
    return path


def test_loads_run_whatever_needs_no_tokens(loads):
    result = run("--policy", "all", "--profile", NODE, "--gpus", 2, "--batch-tokens", 64, "--json", trace=loads)
    assert result.exit_code == 0, result.output
    assert "left out: predictive-layer, predictive-buffered, predictive-batch" in result.stderr
    assert "(learns from what every token chose, and this recording has loads only)" in result.stderr
    told = json.loads(result.stdout)
    ran = [entry["policy"] for entry in told["results"]]
    assert ran[:5] == ["contiguous", "balanced", "eplb", "oracle-batch", "oracle"]
    assert not any(needs_tokens(name) for name in ran)
    config = told["config"]
    assert (config["recorded"], config["split"], config["steps"], config["tokens"]) == ("loads", "time", 5, 320)
    # The same tokens reach the same GPUs whether they were recorded or drawn: contiguous placement, later half.
    table = make_table(requests=20)
    load_LG = load_LE(table.topk_ids[table.request >= 10], 8).reshape(3, 2, 4).sum(axis=2)
    log = loads.parent / "events.jsonl"
    saved = run("--policy", "balanced", "--profile", NODE, "--gpus", 2, "--event-log", log, trace=loads)
    assert "attention is underestimated" in saved.stdout
    contiguous = result_of(read_log(log)["contiguous"])
    assert (np.array([step.load_LG for step in contiguous.steps]).sum(axis=0) == load_LG).all()


def test_a_policy_that_needs_tokens_says_so(loads):
    result = run("--policy", "predictive-layer", "--profile", NODE, trace=loads)
    assert result.exit_code == 2
    assert "predictor 'markov' learns from what every token chose" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch-requests", "3"], {"batch": "3 requests", "steps": 4}),
        (["--batch-recorded"], {"batch": "as recorded", "steps": 1}),
        (["--shuffle", "3"], {"order": "shuffle 3"}),
        (["--split", "alternate", "--batch-tokens", "32"], {"split": "alternate", "steps": 10}),
        (["--split", "time"], {"split": "time", "tokens": 320}),
    ],
)
def test_workloads(trace, options, told):
    result = run("--policy", "balanced", "--profile", NODE, "--json", *options, trace=trace)
    assert result.exit_code == 0, result.output
    assert told.items() <= json.loads(result.stdout)["config"].items()


def test_two_kinds_of_batch_exclude_each_other(trace):
    result = run("--policy", "eplb", "--profile", NODE, "--batch-tokens", 8, "--batch-requests", 2, trace=trace)
    assert (result.exit_code, "--batch-tokens and --batch-requests exclude" in result.stderr) == (2, True)


def test_timeline_and_contention(trace, tmp_path):
    out = tmp_path / "deep/timeline.json"
    options = ["--policy", "eplb", "--profile", NODE, "--batch-tokens", 32, "--contention", "share", "--json"]
    result = run(*options, "--timeline", out, trace=trace)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["config"]["contention"] == "share"
    made = json.loads(out.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in made if e["name"] == "process_name"} == {"contiguous", "eplb"}
    assert {e["ph"] for e in made} == {"M", "X", "C", "s", "f"}
    again = run(*options, trace=trace)
    assert json.loads(again.stdout) == told
