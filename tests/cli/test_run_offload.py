"""`moesim run-gpu` and `moesim calibrate` with --resident: the shipped model on the CPU, and what simulate and
compare make of it."""

import json

import pytest
from click.testing import CliRunner
from switch_models import SHIPPED

from moesim.backend import random_model
from moesim.backend.offload_options import Offloading
from moesim.cli import run_offload
from moesim.cli.main import main
from moesim.cli.run_gpu import policy_names
from moesim.sim.profile import load_profile
from moesim.sim.results import load_results
from moesim.traces import InputError
from moesim.traces.record import RecordOptions, load_model, record
from moesim.traces.texts import read_texts

SAME = ["--batch-tokens", "256", "--max-steps", "3", "--phase", "encoder"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    model, tokenizer = load_model(str(SHIPPED), device="cpu", dtype="float32")
    options = RecordOptions(max_tokens=2600, lookahead=0, generate=5)
    texts = read_texts([SHIPPED / "samples"])
    return record(model, tokenizer, texts, tmp_path_factory.mktemp("t") / "t", options, source=str(SHIPPED))


def moesim(*words):
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def run(trace, *words):
    code, out, err = moesim("run-gpu", SHIPPED, "--trace", trace, "--device", "cpu", "--json", *words)
    assert code == 0, err
    told = json.loads(out)
    return {row["policy"]: row for row in told["results"]}, told


def test_simulated_beside_measured_with_a_profile_of_this_executor(trace, tmp_path):
    measured, simulated, profile = (tmp_path / f"{name}.json" for name in ("measured", "simulated", "profile"))
    rows, told = run(
        trace, "--policy", "lfu,belady,contiguous", "--resident", "25%", *SAME, "--repeats", 2, "--out", measured
    )
    assert told["baseline"] == "on-demand" and set(rows) == {"on-demand", "lfu", "belady", "contiguous"}
    assert told["config"]["routing"] == "model" and told["config"]["executor"] == "offload"
    slots = {result.policy: result.config["resident"] for result in load_results(measured)}
    assert slots == {"on-demand": 8, "lfu": 8, "belady": 8, "contiguous": None}
    assert rows["contiguous"]["metrics"]["moved_bytes"] == 0 < rows["belady"]["metrics"]["moved_bytes"]
    assert 0 < rows["lfu"]["metrics"]["hit_rate"] < 1
    code, out, err = moesim(
        "calibrate", SHIPPED, "--resident", "25%", "--batch-tokens", 256, "--device", "cpu", "--out", profile
    )
    assert code == 0, err
    found = load_profile(profile)
    assert found.links.host.curve is not None and found.gpu.expert_curves and found.cpu is not None
    assert {"on-demand", "lfu", "prefetch-ridge"} <= set(found.decide_s) and "Holds for encoder" in out
    code, _, err = moesim(
        "simulate", trace, "--profile", profile, "--resident", "25%", "--gpus", 1, "--policy", "on-demand,lfu", *SAME,
        "--dtype", "float32", "--out", simulated,
    )  # fmt: skip
    assert code == 0, err
    code, out, err = moesim("compare", simulated, measured, "--json")
    assert code == 0 and json.loads(out)["baseline"] == "on-demand", err
    (lfu,) = (row for row in json.loads(out)["rows"] if row["policy"] == "lfu")
    assert lfu["simulated"] > 0 and lfu["measured"] > 0 and lfu["simulated_phase_s"]["decide"] > 0


def test_decode_continues_the_recorded_requests(trace):
    words = ["--phase", "decode", "--batch-tokens", 3, "--max-steps", 5, "--repeats", 1, "--warmup", 0]
    rows, told = run(trace, "--policy", "prefetch-layer", "--resident", 4, *words, "--copy-dtype", "int8")
    assert told["config"]["phase"] == "decode" and told["config"]["copy_dtype"] == "int8"
    row = rows["prefetch-layer"]
    assert row["metrics"]["rounded_tokens"] > 0
    assert row["speedup"] is None, "what it costs in quality was not measured"


def test_fewer_bits_have_a_speedup_once_their_quality_is_measured(trace, tmp_path):
    quality, bits = tmp_path / "quality.json", ["--resident", "50%", "--copy-dtype", "int8"]
    words = ["--policy", "on-demand,lfu", *bits, "--max-requests", 2, "--device", "cpu", "--out", quality]
    code, _, err = moesim("quality", SHIPPED, "--trace", trace, *words)
    assert code == 0, err
    words = ["--policy", "lfu", *bits, *SAME, "--repeats", 1, "--warmup", 0]
    rows, _ = run(trace, *words, "--quality", quality)
    assert rows["lfu"]["speedup"] > 0 and rows["lfu"]["quality"]["copy_dtype"] == "int8"
    rows, _ = run(trace, *words, "--phase", "decode", "--batch-tokens", 2, "--quality", quality)
    assert rows["lfu"]["speedup"] is None, "its quality in decode is another"


def test_a_policy_file_has_a_decision_log(trace, tmp_path):
    own, log = tmp_path / "own.toml", tmp_path / "decisions.jsonl"
    own.write_text(moesim("policy", "show", "lfu")[1])
    words = ["--policy", own, "--resident", 8, *SAME, "--repeats", 1, "--warmup", 0, "--decision-log", log]
    rows, _ = run(trace, *words)
    assert set(rows) == {"on-demand", str(own)}
    assert {json.loads(line)["policy"] for line in log.read_text().splitlines()} == {"on-demand", str(own)}


def test_all_means_what_runs_with_experts_in_host_memory():
    names = policy_names("all", "on-demand", run_offload.RUNNABLE)
    assert names[0] == "on-demand" and {"lfu", "belady", "hobbit", "oracle-prefetch"} <= set(names)
    assert not {"eplb", "contiguous", "predictive-replication-executed"} & set(names)


def test_random_weights_are_as_deep_as_the_replayed_trace(trace, tmp_path, monkeypatch):
    small = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 12, "num_experts": 32}
    monkeypatch.setitem(random_model.NAMES, "switch-base-32", small)
    words = ["--random", "switch-base-32", "--policy", "lfu", "--resident", 8, "--repeats", 1, "--warmup", 0]
    words += ["--routing", "replay", "--max-steps", 2, "--device", "cpu", "--json"]
    code, _, err = moesim("run-gpu", *words, "--trace", trace)
    assert code != 0 and "recorded with another model: d_model 128, the model has 16" in err
    for stack, phase, batch in (("encoder", "encoder", 64), ("decoder", "decode", 2)):
        arrays, bare = tmp_path / f"{stack}.npz", tmp_path / f"{stack}.moetrace"
        assert moesim("trace", "export", trace, "--stack", stack, "--format", "npz", "--out", arrays)[0] == 0
        assert moesim("trace", "import", arrays, "--stack", stack, "--phase", phase, "--out", bare)[0] == 0
        code, out, err = moesim("run-gpu", *words, "--trace", bare, "--phase", phase, "--batch-tokens", batch)
        assert code == 0, err
        config = json.loads(out)["config"]
        assert (config["weights"], config["layers"], config["d_model"]) == ("random", 4, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resident", "half"], "a number of slots or a share"),
        (["--resident", "inf%"], "a number of slots or a share"),
        (["--resident", "101%"], "is more than all; 32 experts take 1 to 32"),
        (["--resident", "0"], "0 slots a layer"),
        ([], "about experts in host memory: add --resident 25%"),
        (["--resident", "4", "--partitions", "2"], "leave --ranks, --partitions"),
        (["--resident", "4", "--policy", "predictive-replication-executed"], "moesim quality"),
        (["--resident", "4", "--out", "/dev/null/results.json"], "/dev/null/results.json: cannot be written"),
        (["--resident", "33"], "32 experts take 1 to 32"),
        (["--resident", "4", "--ranks", "2"], "one device, in one process"),
        (["--resident", "4", "--phase", "prefill"], "encoder, decode, not prefill"),
        (["--copy-dtype", "int8"], "add --resident"),
        (["--resident", "4", "--routing", "replay"], "give --trace"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, message, trace):
    given = [] if "--routing" in words else ["--trace", trace]
    code, _, err = moesim("run-gpu", SHIPPED, "--policy", "lfu", "--device", "cpu", *given, *words)
    assert code != 0 and message in err and len(err.strip().splitlines()) == 1


def test_a_model_without_moe_layers_is_refused_before_it_is_loaded(trace, tmp_path):
    config = json.loads((SHIPPED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_sparse_encoder_layers": 0}))
    for words in (
        ["run-gpu", tmp_path, "--policy", "lfu"],
        ["calibrate", tmp_path, "--out", tmp_path / "profile.json"],
    ):
        code, _, err = moesim(*words, "--resident", "4", "--device", "cpu")
        assert code != 0 and err.endswith("the model has no MoE layers in its encoder\n")


def test_a_policy_that_needs_every_expert_on_the_device_is_refused(trace):
    code, _, err = moesim(
        "run-gpu", SHIPPED, "--policy", "balanced", "--resident", "4", "--trace", trace, "--device", "cpu"
    )
    assert code != 0 and "needs every expert on a GPU" in err


def test_shares_are_rounded():
    assert [Offloading(resident=text).slots(128) for text in ("10%", "25%", "50 %", "7")] == [13, 32, 64, 7]
    with pytest.raises(InputError, match="is 0 slots"):
        Offloading(resident="0.1%").slots(128)
