"""Metrics from step records, files of results, and the comparison of two runs: against numbers worked out by hand."""

import json
from dataclasses import replace

import pytest

from moesim.sim.comparison import compare
from moesim.sim.results import PHASES, Result, StepRecord, load_results, save_results
from moesim.traces import InputError

CONFIG = {
    "family": "switch",
    "d_model": 16,
    "d_ff": 32,
    "phase": "encoder",
    "gpus": 2,
    "extra_slots": 1,
    "batch": "64 tokens",
    "order": "arrival",
    "recorded": "tokens",
    "steps": 2,
    "tokens": 100,
    "dtype": "float32",
}


def record(duration, load=((3, 1),), **more):
    phase = dict.fromkeys(PHASES, 0.0) | {"experts": duration}
    fields = {
        "tokens": 50,
        "phase_s": phase,
        "load_LG": [list(row) for row in load],
        "busy_s": [duration, duration / 2],
    }
    return StepRecord(duration_s=duration, **{**fields, **more})


def result(policy, durations, kind="simulated", **config):
    return Result(kind=kind, policy=policy, config={**CONFIG, **config}, steps=[record(d) for d in durations])


def test_where_the_time_of_the_gpus_goes():
    spent = {"attention": 2.0, "decide": 0.5, "communication": 1.5, "experts": 4.0, "blocked": 1.0}
    steps = [record(10.0, phase_s=spent, busy_s=[6.0, 2.0])] * 2
    shares = Result(kind="simulated", policy="p", config=CONFIG, steps=steps).totals.time_shares()
    expected = {"compute": 0.4, "barrier": 0.2, "communication": 0.15, "weights": 0.1, "deciding": 0.05, "idle": 0.1}
    assert shares == pytest.approx(expected) and sum(shares.values()) == pytest.approx(1)


def test_metrics_by_hand():
    steps = [record(1.0, load=((3, 1), (2, 2))), record(3.0, load=((0, 0), (1, 0)), moved_bytes=10, hidden_bytes=4)]
    m = Result(kind="simulated", policy="p", config=CONFIG, steps=steps).metrics()
    assert m["throughput_tokens_per_s"] == 25
    assert m["latency_p50_s"] == 2
    # Ratios mean/max per layer and step: 2/3, 1, 1 (an idle layer is balanced), 1/2.
    # Sums: 2 + 2 + 0 + .5 over 3 + 2 + 0 + 1.
    assert m["balancedness_mean_of_ratios"] == pytest.approx((2 / 3 + 1 + 1 + 0.5) / 4)
    assert m["balancedness_ratio_of_sums"] == pytest.approx(4.5 / 6)
    assert m["utilisation_G"] == [1.0, 0.5]
    assert (m["moved_bytes"], m["hidden_bytes"]) == (10, 4)


def test_results_come_back_as_they_were_written(tmp_path):
    results = [result("a", [1.0, 2.0]), result("b", [0.5])]
    save_results(results, tmp_path / "r.json")
    assert load_results(tmp_path / "r.json") == results
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "not a result of moesim"),
        ('{"format": "moesim-result", "version": 99}', "version 99"),
        ('{"format": "moesim-result", "version": 4}', "damaged result"),
        ('{"format": "moesim-result", "version": 4, "steps": [{}]}', "damaged result"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_results(path)
    assert "bad.json" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_results(tmp_path / "none.json")


def test_empty_steps_are_damaged(tmp_path):
    data = result("a", [1.0]).to_dict()
    data["totals"]["steps"] = 0
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="damaged"):
        load_results(tmp_path / "r.json")


def test_comparison_by_hand():
    simulated = [result("contiguous", [4.0]), result("fast", [2.0])]
    measured = [
        result("contiguous", [3.0], "measured", repeat_total_s=[3.0, 3.3, 2.7]),
        result("fast", [2.0], "measured", repeat_total_s=[2.0, 1.65, 2.7]),
    ]
    row = compare(simulated, measured, "contiguous").rows[1]
    assert (row.policy, row.simulated, row.measured) == ("fast", 2.0, 1.5)
    assert row.error == pytest.approx(1 / 3)
    assert (row.measured_low, row.measured_high) == (1.0, 2.0)


def test_what_cannot_be_compared_is_refused():
    base, fast = result("contiguous", [4.0]), result("fast", [2.0])
    measured = [replace(base, kind="measured"), replace(fast, kind="measured")]
    with pytest.raises(InputError, match="simulated results lack the baseline 'balanced'"):
        compare([base, fast], measured, "balanced")
    with pytest.raises(InputError, match="no policy beside"):
        compare([base], measured, "contiguous")
    with pytest.raises(InputError, match="batch is '64 tokens' in the simulation and '32 tokens'"):
        compare([base, fast], [measured[0], result("fast", [1.0], "measured", batch="32 tokens")], "contiguous")
    with pytest.raises(InputError, match="expected measured results, found a simulated one"):
        compare([base, fast], [base], "contiguous")
