"""`moesim run-gpu` as a user sees it: one error line before anything starts, results of a real run on two CPU ranks."""

import json

import pytest
from click.testing import CliRunner

from moesim.cli import main
from moesim.sim.cost import expert_curve
from moesim.sim.policies import POLICIES
from moesim.sim.profile import load_profile
from moesim.sim.results import PHASES, load_results
from moesim.traces.store import Trace
from moesim.traces.writer import TraceWriter


@pytest.fixture(scope="module")
def inputs(tiny):
    """(model folder, trace)."""
    return tiny[:2]


def invoke(*arguments):
    return CliRunner().invoke(main, ["run-gpu", *map(str, arguments)])


def test_results_log_and_json_of_one_run(inputs, tmp_path):
    model, trace = inputs
    out, log, picture = (tmp_path / name for name in ("measured.json", "decisions.jsonl", "timeline.json"))
    options = ["--policy", "eplb", "--ranks", 2, "--device", "cpu", "--batch-tokens", 14, "--repeats", 2, "--warmup", 0]
    files = ["--out", out, "--decision-log", log, "--timeline", picture]
    result = invoke(model, "--trace", trace, *options, "--json", *files)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [entry["policy"] for entry in data["results"]] == ["contiguous", "eplb"]
    assert data["kind"] == "measured" and data["config"]["routing"] == "model" and data["config"]["ranks"] == 2
    base, eplb = load_results(out)
    for measured in (base, eplb):
        assert measured.config["dtype"] == "float32" and len(measured.config["repeat_total_s"]) == 2
        assert measured.scores["total_s_min"] <= measured.total_s <= measured.scores["total_s_max"]
        assert all(step.phase_s.keys() == set(PHASES) for step in measured.steps)
    assert eplb.scores["transfers"] > 0
    assert sum(step.moved_bytes for step in eplb.steps) == eplb.scores["transfers"] * 2 * 32 * 48 * 4
    decisions = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["policy"] for line in decisions} == {"contiguous", "eplb"}
    assert base.config["utilisation"]["duration_s"] > base.total_s
    check_timelines(trace, base, out, picture, tmp_path)


def check_timelines(trace, base, measured, picture, folder):
    """The measured one alone, then beside the simulated one; what a rank did lasts as long as its steps."""
    drawn = json.loads(picture.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in drawn if e["name"] == "process_name"] == ["contiguous", "eplb"]
    ends = [e["ts"] + e["dur"] for e in drawn if e["ph"] == "X" and e["pid"] == 1]
    assert max(ends) == pytest.approx(base.total_s * 1e6, rel=1e-3)
    simulated, both = folder / "simulated.json", folder / "both.json"
    options = ["--policy", "eplb", "--profile", "8xH100-NVLink", "--gpus", "2", "--batch-tokens", "14"]
    simulate = ["simulate", str(trace), *options, "--out", str(simulated)]
    compare = ["compare", str(simulated), str(measured), "--timeline", str(both)]
    done = CliRunner().invoke(main, simulate)
    assert done.exit_code == 0, done.output
    assert_one_line(CliRunner().invoke(main, compare), "the simulated contiguous has no timeline: run simulate with")
    for words in ([*simulate, "--timeline", str(folder / "simulated-timeline.json")], compare):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    processes = [e["args"]["name"] for e in json.loads(both.read_text())["traceEvents"] if e["name"] == "process_name"]
    assert processes == [f"{policy}: {kind}" for policy in ("contiguous", "eplb") for kind in ("simulated", "measured")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--policy", "best"], "unknown policy 'best'; known: contiguous"),
        (["--policy", "oracle"], "'oracle' runs in the simulator only: a bound that no machine can reach"),
        (["--policy", ","], "names no policy"),
        (["--ranks", 0], "--ranks must be at least 1"),
        (["--ranks", 9], "more than the 8 experts"),
        (["--phase", "decode"], "--phase decode runs with --resident only"),
        (["--out", "/dev/null/x.json"], "/dev/null/x.json: cannot be written"),
        (["--repeats", 0], "--repeats must be at least 1"),
        (["--trace", "nowhere.moetrace"], "nowhere.moetrace: no trace there"),
    ],
)
def test_a_wrong_option_is_one_line(inputs, change, says):
    model, trace = inputs
    result = invoke(model, "--trace", trace, "--policy", "eplb", "--device", "cpu", *change)
    assert_one_line(result, says)


def test_cuda_that_is_not_there(inputs):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model, trace = inputs
    assert_one_line(invoke(model, "--trace", trace, "--policy", "eplb", "--device", "cuda"), "sees no CUDA GPU")


def test_more_ranks_than_gpus(inputs, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    model, trace = inputs
    result = invoke(model, "--trace", trace, "--policy", "eplb", "--device", "cuda", "--ranks", 2)
    assert_one_line(result, "--ranks 2 is more than the 1 GPUs")


def test_models_that_cannot_be_run(inputs, tmp_path):
    model, trace = inputs
    assert_one_line(invoke(tmp_path / "none", "--policy", "eplb"), "no such model folder")
    assert_one_line(invoke(tmp_path, "--policy", "eplb"), "config.json is missing")
    config = json.loads((model / "config.json").read_text())
    for change, says in (
        ({"num_sparse_encoder_layers": 0}, "no MoE layers in its encoder"),
        ({"model_type": "t5"}, "model type 't5'"),
        ({"d_ff": 64}, "recorded with another model: its d_ff is 48, that of"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert_one_line(invoke(tmp_path, "--trace", trace, "--policy", "eplb", "--device", "cpu"), says)


def test_a_trace_of_a_model_of_the_same_shape_and_other_weights(inputs, tmp_path):
    model, trace = inputs
    spec, provenance = Trace.open(trace).spec, {"model_sha256": {"model.safetensors": "0" * 64}}
    with TraceWriter(tmp_path / "other.moetrace", spec, provenance) as writer:
        writer.append("encoder", Trace.open(trace).table("encoder"))
    options = ["--policy", "eplb", "--device", "cpu"]
    result = invoke(model, "--trace", tmp_path / "other.moetrace", *options)
    assert_one_line(result, "was recorded with other weights than those in")


def test_calibration_of_ranks_has_no_decode(tmp_path):
    result = CliRunner().invoke(main, ["calibrate", "--phase", "decode", "--out", str(tmp_path / "profile.json")])
    assert_one_line(result, "--phase decode goes with --resident")


def test_by_hand_under_torchrun_the_ranks_must_agree(inputs, monkeypatch):
    model, trace = inputs
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--policy", "eplb", "--device", "cpu"]
    assert_one_line(invoke(model, "--trace", trace, *options, "--ranks", 3), "torchrun started 2 ranks")
    assert_one_line(invoke(model, *options), "under torchrun give --trace")


def assert_one_line(result, says):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and says in line


def test_calibrate_writes_a_profile_that_simulate_reads(inputs, tmp_path):
    model, trace = inputs
    profile = tmp_path / "here.json"
    result = CliRunner().invoke(
        main, ["calibrate", str(model), "--device", "cpu", "--batch-tokens", "128", "--out", str(profile)]
    )
    assert result.exit_code == 0, result.output
    assert "decision point: contiguous" in result.stdout
    measured = load_profile(profile)
    assert measured.name == "here" and measured.measured and measured.gpus == 2
    assert measured.decide_s.keys() == {name for name, parts in POLICIES.items() if not parts.simulated_only}
    assert all(seconds > 0 for seconds in measured.decide_s.values())
    assert "measured curve of experts: 1 to " in result.stdout and "measured curve of copies: " in result.stdout
    assert measured.links.p2p.curve and measured.links.all_to_all.curve
    spec = Trace.open(trace).spec
    curve = expert_curve(measured.gpu, spec, "float32")
    assert curve.rows == (1, 4, 16, 64, 256, 1024) and curve.distinct[-1] == spec.num_experts // 2 + 1, (
        "replica slots, too"
    )
    options = ["--policy", "eplb", "--profile", str(profile), "--gpus", "2", "--batch-tokens", "14", "--json"]
    simulated = CliRunner().invoke(main, ["simulate", str(trace), *options])
    assert simulated.exit_code == 0, simulated.output
    assert json.loads(simulated.stdout)["config"]["profile_kind"] == "measured"


def test_calibrate_reports_a_wrong_option_in_one_line(inputs, tmp_path):
    for options, says in (
        (["--ranks", "9"], "more than the 8 experts"),
        (["--ranks", "0"], "--ranks must be at least 1"),
    ):
        out = str(tmp_path / "no.json")
        result = CliRunner().invoke(main, ["calibrate", str(inputs[0]), "--device", "cpu", "--out", out, *options])
        assert_one_line(result, says)
