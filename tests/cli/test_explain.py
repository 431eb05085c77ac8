"""`moesim explain`, and the options of `moesim simulate` that open loops, faults and offloading came with."""

import json

import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.traces import Phase, StackSpec
from moesim.traces.writer import TraceWriter

NODE = "8xH100-NVLink"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "small.moetrace"
    stack = StackSpec(name="decoder", num_layers=3, moe_layers=(0, 1, 2))
    table = make_table(requests=40, length=12, phase=Phase.PREFILL)
    table.phase[table.position >= 8] = Phase.DECODE
    with TraceWriter(path, make_spec(stacks=(stack,)), {}) as writer:
        writer.append("decoder", table)
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def simulate(trace, *options):
    return run("simulate", trace, "--policy", "predictive-layer", "--profile", NODE, "--gpus", 4, *options)


@pytest.fixture(scope="module")
def log(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "events.jsonl"
    result = simulate(trace, "--batch-tokens", 64, "--event-log", path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


def test_the_tables_of_a_log_are_those_of_the_run(log):
    path, printed = log
    result = run("explain", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(printed), "the same tables, to the letter"
    assert result.stdout.count("critical path of step") == 2 and "experts" in result.stdout


def test_json_holds_the_whole_path_and_a_timeline_is_written(log, tmp_path):
    path, _ = log
    result = run(
        "explain", path, "--policy", "predictive-layer", "--step", 2, "--json", "--timeline", tmp_path / "t.json"
    )
    data = json.loads(result.stdout)
    assert [entry["policy"] for entry in data["results"]] == ["contiguous", "predictive-layer"]
    found = data["critical_path"]["predictive-layer"]
    assert found["step"] == 2 and list(data["critical_path"]) == ["predictive-layer"]
    assert found["path"][0]["what"].startswith("attention layer 0 (GPU ")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "best"], "holds no policy 'best'; it has: contiguous, predictive-layer"),
        (["--step", 99], "the log has no step 99"),
        (["--timeline", "/proc/none/t.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_explained(log, options, message):
    result = run("explain", log[0], *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_log_that_was_cut_short(log, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_bytes(log[0].read_bytes()[:-200])
    result = run("explain", short)
    assert result.exit_code == 2 and "short.jsonl" in result.stderr and result.stderr.count("\n") == 1


def test_an_open_loop_with_its_requests(trace):
    options = ["--arrivals", "poisson:200", "--batch-tokens", 64, "--requests", 30, "--ttft-ms", 50, "--tpot-ms", 5]
    result = simulate(trace, *options)
    assert result.exit_code == 0, result.output
    for words in ("Requests:", "TTFT", "30 requests that arrive by themselves (poisson, 200 requests/s, seed 0)"):
        assert words in result.stdout
    data = json.loads(simulate(trace, *options, "--json").stdout)
    assert data["config"]["phase"] == "prefill and decode" and data["config"]["targets"] == {
        "ttft_s": 0.05,
        "tpot_s": 0.005,
    }
    serving = data["results"][1]["metrics"]["serving"]
    assert serving["requests"] == 30 and 0 <= serving["goodput_per_s"] <= serving["requests_per_s"]


def test_faults_rounding_and_offloading_are_said_in_the_footnotes(trace):
    result = simulate(trace, "--batch-tokens", 64, "--fault", "gpu:1:dies@0.0001", "--copy-dtype", "int4")
    assert "were not computed, no living GPU held their expert" in result.stdout
    assert "fault gpu:1:dies@0.0001" in result.stdout and "computed with copies in int4" in result.stdout
    result = run(
        "simulate", trace, "--policy", "all", "--profile", "1xRTX4090-PCIe", "--resident", 3, "--batch-tokens", 64
    )
    assert "Speedup over on-demand (simulated)" in result.stdout and "prefetch-layer" in result.stdout
    assert "conditions: 3 resident slots a GPU and layer" in result.stdout


def test_two_workers_print_what_one_does(trace):
    options = ["--batch-tokens", 64, "--micro-batches", 2, "--tensor-parallel", 2, "--send", "per-gpu"]
    one, two = (simulate(trace, *options, "--workers", n) for n in (1, 2))
    assert one.exit_code == two.exit_code == 0, two.output
    assert one.stdout == two.stdout and "2 micro-batches in flight together" in one.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--requests", 5], "belong to an open loop: give --arrivals"),
        (["--arrivals", "sometimes"], "arrivals are poisson:RATE"),
        (["--arrivals", "poisson:1", "--max-steps", 3], "exclude each other"),
        (["--arrivals", "poisson:1", "--batch-requests", 3], "give --batch-tokens"),
        (["--fault", "gpu:9:dies@1"], "there are GPUs 0 to 3"),
        (["--fault", "everything"], "is not of the form"),
        (["--tensor-parallel", 3], "must divide the 4 GPUs"),
        (["--resident", 1], "needs every expert on a GPU"),
        (["--resident", 99], "take 1 to 2"),
    ],
)
def test_options_that_make_no_sense_together(trace, options, message):
    result = simulate(trace, *options)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_a_run_that_fails_names_what_it_had_finished(trace, tmp_path, monkeypatch):
    from moesim.sim import runs
    from moesim.traces import PolicyError

    original = runs.simulate

    def failing(scenario, policy, *args, **kwargs):
        if policy.name == "eplb":
            raise PolicyError("it broke")
        return original(scenario, policy, *args, **kwargs)

    monkeypatch.setattr(runs, "simulate", failing)
    out = tmp_path / "out.json"
    result = run("simulate", trace, "--policy", "balanced,eplb,oracle", "--profile", NODE, "--gpus", 2, "--out", out)
    assert (
        result.exit_code == 2
        and f"eplb: it broke; done before and kept in {out}: contiguous, balanced" in result.stderr
    )
    assert [entry["policy"] for entry in json.loads(out.read_text())] == ["contiguous", "balanced"]
