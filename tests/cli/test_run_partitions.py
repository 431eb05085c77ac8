"""`moesim run-gpu --partitions` and `calibrate --partitions` as a user sees them, on a CPU."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from moesim.cli import main
from moesim.sim.profile import load_profile
from moesim.sim.results import load_results, save_results


def invoke(*arguments):
    return CliRunner().invoke(main, [str(word) for word in arguments])


def test_calibrate_simulate_run_and_compare(tiny, tmp_path):
    model, trace, _ = tiny
    profile, simulated, measured = (tmp_path / f"{name}.json" for name in ("here", "simulated", "measured"))
    log, picture = tmp_path / "decisions.jsonl", tmp_path / "timeline.json"
    same = ["--policy", "eplb", "--batch-tokens", 14, "--max-steps", 9]
    words = ["--partitions", 2, "--device", "cpu", "--batch-tokens", 128]
    result = invoke("calibrate", model, "--policy", "eplb", *words, "--out", profile)
    assert result.exit_code == 0, result.output
    assert load_profile(profile).decide_s.keys() == {"contiguous", "eplb"}
    assert load_profile(profile).gpus == 2 and "cpu threads" in result.stdout
    result = invoke("simulate", trace, *same, "--profile", profile, "--gpus", 2, "--out", simulated)
    assert result.exit_code == 0, result.output
    files = ["--out", measured, "--decision-log", log, "--timeline", picture]
    run = ["run-gpu", model, "--trace", trace, *same, "--partitions", 2, "--repeats", 1, "--warmup", 0, *files]
    result = invoke(*run)
    assert result.exit_code == 0, result.output
    assert "measured: 2 partitions (cpu threads) of" in result.stdout and "true router" in result.stdout
    base, eplb = load_results(measured)
    assert base.config["executor"] == "partitions"
    assert base.config["partitions"] == "cpu threads" and base.config["gpus"] == 2 and base.config["sms"] == []
    assert eplb.scores["transfers"] == eplb.scores["copies"] > 0 and eplb.phase_s()["blocked"] > 0
    assert {json.loads(line)["policy"] for line in log.read_text().splitlines()} == {"contiguous", "eplb"}
    rows = [e["args"]["name"] for e in json.loads(picture.read_text())["traceEvents"] if e["name"] == "thread_name"]
    assert {"GPU 0", "GPU 1", "all GPUs"} <= set(rows)
    result = invoke("compare", simulated, measured, "--json")
    assert result.exit_code == 0, result.output
    assert [row["policy"] for row in json.loads(result.stdout)["rows"]] == ["contiguous", "eplb"]
    on_ranks = [replace(found, config={**found.config, "executor": "ranks"}) for found in (base, eplb)]
    save_results(on_ranks, measured)
    result = invoke("compare", simulated, measured)
    assert result.exit_code == 2
    assert "profile was calibrated on partitions, and the measurement ran on ranks" in result.stderr


@pytest.mark.parametrize("where", ["--partitions", "--ranks"])
def test_recorded_routing_on_a_loaded_model_needs_neither_words_nor_widths(tiny, where):
    model, _, bare = tiny
    options = ["--policy", "balanced", "--batch-tokens", 14, "--max-steps", 2, "--repeats", 1, "--warmup", 0]
    result = invoke("run-gpu", model, "--trace", bare, "--routing", "replay", where, 3, *options, "--json")
    assert result.exit_code == 0, result.output
    config = json.loads(result.stdout)["config"]
    assert (config["routing"], config["weights"], config["gpus"]) == ("replay", "loaded", 3)
    assert config["executor"] == where.strip("-")


def test_random_weights_take_depth_and_routing_from_the_trace(tiny, monkeypatch):
    from moesim.backend import random_model

    small = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 12, "num_experts": 8}
    monkeypatch.setitem(random_model.NAMES, "switch-base-8", small)
    options = ["--policy", "balanced", "--batch-tokens", 14, "--max-steps", 2, "--repeats", 1, "--warmup", 0, "--json"]
    result = invoke("run-gpu", "--random", "switch-base-8", "--routing", "replay", "--trace", tiny[2],
                    "--partitions", 2, *options)  # fmt: skip
    assert result.exit_code == 0, result.output
    config = json.loads(result.stdout)["config"]
    assert (config["model"], config["weights"], config["layers"]) == ("switch-base-8", "random", 2)
    assert config["d_model"] == 16, "the trace has no widths: those of the model are taken"


def test_options_that_do_not_go_together_are_one_line(tiny):
    model, trace, bare = tiny
    replay = ["--routing", "replay"]
    for words, says in (
        ([model, "--partitions", 2, "--ranks", 2], "leave --ranks out"),
        ([model, "--partitions", 9], "--partitions 9 is more than the 8 experts"),
        ([model, "--partitions", 2, *replay], "give --trace"),
        (["--random", "switch-base-8"], "a random router says nothing"),
        ([model, "--random", "switch-base-8", "--partitions", 2], "not both"),
        (["--random", "switch-base-8", "--partitions", 2, "--trace", trace], "--random goes with --routing replay"),
        (["--partitions", 2], "nothing to run"),
        ([], "nothing to run"),
        (["--random", "tiny", "--partitions", 2, *replay, "--trace", trace], "no random model named tiny"),
        (["--random", "switch-base-16", "--partitions", 2, *replay, "--trace", bare], "the trace has 8 experts"),
        (["--random", "switch-base-8", "--partitions", 2, *replay, "--trace", trace], "recorded with another model"),
        ([model, "--partitions", 2, "--device", "cuda"], "--device cuda"),
    ):
        result = invoke("run-gpu", *words, "--policy", "eplb")
        assert result.exit_code == 2, (words, result.output)
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1 and says in lines[0], (words, result.stderr)
