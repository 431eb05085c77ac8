"""docs/results.md and README say what the committed JSON says, and claims are judged by the numbers alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def made(monkeypatch):
    """benchmarks/results_page.py, results_claims.py and results_tables.py as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results_claims
    import results_page
    import results_tables

    yield results_page, results_claims, results_tables
    for name in ("marks", "results_page", "results_claims", "results_tables"):
        sys.modules.pop(name)


def test_pages_equal_what_the_committed_json_generates():
    words = [sys.executable, str(ROOT / "benchmarks/results_page.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def timing(median_s):
    return {"median_s": median_s, "min_s": 0.5 * median_s, "max_s": 2 * median_s, "repeats": 3}


def section(entries, status="ok", name="NVIDIA H100"):
    about = {"device_name": name, "driver": "580.1", "cuda": "13.0", "versions": {"torch": "2.11"}, "commit": "abc"}
    return {"status": status, "wall_s": 12.0, "environment": about, "entries": entries}


def report(**sections):
    return {
        "format": "moesim-gpu-benchmark",
        "version": 1,
        "date": "2026-12-01T10:00:00+00:00",
        "small": False,
        "wall_s": 400.0,
        "file": "2026-12-01-gpu.json",
        "sections": sections,
    }


MODELS = {
    "encoder 64": {"tokens": 64, "hf": timing(0.02), "ours": timing(0.001), "speedup": 20.0, "speedup_range": [15, 30]},
    "encoder 1024": {"tokens": 1024, "ours": {"error": "OutOfMemoryError: too much"}},
    "encoder 32768": {"tokens": 32768, "speedup": 3.99, "speedup_range": [3.9, 4.1]},
    "decode 1": {"speedup": 4.0, "speedup_range": [3.0, 5.0]},
    "exact float32": {"tokens": [4, 32], "tokens_equal": False},
}


def verdicts(made, found):
    return {f"{claim.goal}: {claim.what}": (claim.verdict, claim.measured) for claim in made[1].claims(found)}


def test_a_claim_is_met_by_its_number_and_not_run_without_one(made):
    told = verdicts(made, report(models=section(MODELS)))
    speed = "speedup over Hugging Face as shipped"
    assert told[f"encoder, {speed}: 64 tokens"] == ("met", "20x")
    assert told[f"encoder, {speed}: 1,024 tokens"] == ("not run", "not run")
    assert told[f"encoder, {speed}: 4,096 tokens"] == ("not run", "not run")
    assert told[f"encoder, {speed}: 32,768 tokens"] == ("not met", "3.99x")
    assert told[f"decode, {speed}: batch 1"] == ("met", "4x")
    assert told["tokens of generate in float32: switch-base-8, with padding"] == ("not met", "different")


def test_without_a_run_nothing_is_claimed(made):
    assert {verdict for verdict, _ in verdicts(made, {}).values()} == {"not run"}


def test_one_kernel_that_is_wrong_is_named(made):
    good = {"max_error": 1e-6, "tolerance": 1e-5, "within": True}
    rows = {
        "errors/switch/float32/triton/capacity": good,
        "errors/switch/float32/loop/capacity": {**good, "max_error": 2e-5, "within": False},
        "errors/gated/float32/triton": {"error": "RuntimeError: no such kernel"},
        "errors/switch/bfloat16/triton/capacity": {"max_error": 1e-3, "tolerance": 2e-2, "within": True},
    }
    told = verdicts(made, report(layers=section(rows)))
    start = "MoE layer against float64: "
    wrong = "errors/switch/float32/loop/capacity, errors/gated/float32/triton"
    assert told[f"{start}float32"] == ("not met", f"2e-05; not: {wrong}")
    assert told[f"{start}bfloat16"] == ("met", "0.001")
    assert told[f"{start}float16"] == ("not run", "not run")


def test_the_fastest_kernel_counts_against_the_floor(made):
    def row(layer_s, graph=True):
        ends = {"layer_min_s": 0.9 * layer_s, "layer_max_s": 1.1 * layer_s}
        return {"layer_s": layer_s, "floor_s": 1e-3, "over_floor": layer_s / 1e-3, "graph": graph, **ends}

    rows = {
        "speed/4096 tokens/zipf/own loop": row(1e-3, graph=False),
        "speed/4096 tokens/zipf/triton": row(1.4e-3),
        "speed/4096 tokens/zipf/grouped_mm": row(2e-3),
    }
    told = verdicts(made, report(layers=section(rows)))
    assert told["MoE layer over its floor: 4,096 tokens, zipf"] == ("met", "1.4x")
    assert told["MoE layer over its floor: 4,096 tokens, uniform"][0] == "not run"


def test_partitions_and_fidelity(made):
    def row(speedup, busy):
        return {"experts_speedup": speedup, "experts_speedup_range": [speedup - 0.1, speedup + 0.1], "busy_share": busy}

    case = "8 partitions/16384 tokens/spread 1.4"
    names = ("predictive-layer", "eplb", "oracle-batch")
    rows = {
        f"{case}/predictive-layer": row(1.5, 0.94),
        f"{case}/predictive-batch": row(1.3, 0.99),
        f"{case}/oracle-batch": row(1.9, 0.99),
        "exact/replay, 8 partitions": {"identical": True, "max_difference": 0.0, "finite": False},
        "fidelity": {"configurations": 3},
    }
    rows |= {
        f"fidelity/{case}/{name}": {"errors": {"step": error, "experts": 9.0}}
        for name, error in zip(names, (-0.2, 0.01, 0.04), strict=True)
    }
    told = verdicts(made, report(partitions=section(rows)))
    where = case.replace("/", ", ")
    start = "virtual GPUs: "
    assert told[f"{start}expert phase, predictive replication over contiguous: {where}"] == ("met", "1.5x")
    assert told[f"{start}expert phase, predictive replication over contiguous: 4 partitions"][0] == "not run"
    assert told[f"{start}busy share of that phase: {where}"] == ("not met", "94%")
    assert told[f"{start}outputs under every policy, slots poisoned: replay, 8 partitions"] == ("not met", "0")
    assert told["simulated against measured speedup, absolute error: median"] == ("met", "4%")
    assert told["simulated against measured speedup, absolute error: worst"] == ("not met", "20%")
    assert told["simulated against measured speedup: configurations"] == ("not met", "3")


def test_quality_of_executors_and_of_what_is_not_exact(made):
    rows = {
        "exact/dropin/bfloat16": {"loss_change": -5e-4, "within": True},
        "exact/offload-on-demand/bfloat16": {"loss_change": 0.02, "within": False},
        "exact/dropin/float32": {"loss_change": 9.0},
        "exact/partitions/bfloat16": {"error": "RuntimeError: broken"},
        "tokens/dropin": {"equal": True, "tokens": 768},
        "lossy/hobbit": {"loss_change": 0.013, "loss_error": 0.002},
        "lossy/predicted-markov": {"loss_change": 0.5, "loss_error": 0.1},
    }
    told = {what: value for what, value in verdicts(made, report(quality=section(rows))).items() if "quality" in what}
    loss = "quality: change of the loss by an exact executor, bfloat16: "
    assert told == {
        f"{loss}dropin": ("met", "0.0005 nats"),
        f"{loss}offload-on-demand": ("not met", "0.02 nats"),
        f"{loss}partitions": ("not run", "not run"),
        "quality: tokens of generate, float32: dropin": ("met", "equal"),
        "quality: tokens of generate, float32: offload": ("not run", "not run"),
        "quality: loss of what is not exact: hobbit": ("met", "+0.013 nats"),
        "quality: loss of what is not exact: predicted-markov": ("met", "+0.5 nats"),
        "quality: loss of what is not exact: fate": ("not run", "not run"),
        "quality: loss of what is not exact: on-demand:int8": ("not run", "not run"),
        "quality: loss of what is not exact: on-demand:int4": ("not run", "not run"),
    }


def test_offloading_beside_its_oracle(made):
    summary = {
        "best_causal": "prefetch-ridge",
        "ratio_to_oracle": 1.2,
        "ratio_to_oracle_range": [1.1, 1.3],
        "speedup_over_lru": 1.3,
        "oracle_speedup_over_lru": 1.56,
        "int8_speedup_over_lru": 1.8,
        "int8_speedup_over_lru_range": [1.7, 1.9],
    }
    rows = {
        "decode-1/25%": summary,
        "decode-1/25%/lru": {"speedup": 1.0},
        "fidelity/decode-1/25%/x": {"errors": {"step": 0.1}},
    }
    told = verdicts(made, report(offload=section(rows)))
    over = "offloading: best causal exact policy over the oracle: decode-1, 25% resident"
    assert told[over] == ("not met", "1.2x; over LRU 1.3x (prefetch-ridge), the oracle 1.56x")
    assert told["offloading: int8 copies over on-demand LRU: decode-1, 25% resident"] == ("met", "1.8x")
    assert told["offloading: int8 copies over on-demand LRU: encoder-1024, 10% resident"][0] == "not run"
    assert told["simulated against measured speedup, absolute error: worst"] == ("met", "10%")


def test_the_page_prints_all_that_is_there_and_says_what_is_not(made):
    page = made[0].page(report(models=section(MODELS, status="timed out after 110 s")))
    assert "From [2026-12-01-gpu.json](../benchmarks/results/2026-12-01-gpu.json), 2026-12-01, 400 s in all." in page
    assert "| models | timed out after 110 s | 12 | NVIDIA H100 driver 580.1, CUDA 13.0 | torch 2.11 | abc |" in page
    assert "| layers | not run |" in page and "## Offloading\n\nNot run." in page
    assert "The section did not end well: timed out after 110 s." in page
    assert "20 ms (10 ms .. 40 ms)" in page and "OutOfMemoryError: too much" in page


def test_the_newest_run_counts_and_no_rehearsal(made, tmp_path):
    for name, date, small in (("a", "2026-12-02", False), ("b", "2026-12-01", False), ("c", "2026-12-03", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**report(), "date": date, "small": small}))
    (tmp_path / "d.json").write_text(json.dumps([{"format": "moesim-result"}]))
    assert made[0].newest(tmp_path)["file"] == "a.json"
    assert made[0].newest(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("layer_s", 0.00123, "1.23 ms"),
        ("experts_s", 4.5e-5, "45 us"),
        ("wall_s", 12.0, "12 s"),
        ("peak_bytes", 15_300_000_000, "15.3 GB"),
        ("copy_bytes_per_s", 4.1e12, "4.1e+03 GB/s"),
        ("tokens", 32768, "32,768"),
        ("throughput_tokens_per_s", 1234.5, "1234"),
        ("within", False, "no"),
        ("speedup_range", [1.25, 2], "1.25 .. 2"),
        ("load", [{}, {}, {}], "3 values"),
        ("ours", {"median_s": 1e-3, "min_s": 5e-4, "max_s": 2e-3}, "1 ms (500 us .. 2 ms)"),
    ],
)
def test_cells(made, key, value, text):
    assert made[2].cell(key, value) == text


def test_what_all_rows_share_stands_above_them(made):
    told = made[2].group_text({"a": {"routing": "replay", "n": 1}, "b": {"routing": "replay", "n": 2, "x": {"y": 3}}})
    assert told == "In all rows: routing replay.\n\n" + made[2].table(
        ["", "n", "x.y"], [["a", "1", ""], ["b", "2", "3"]]
    )
    assert made[2].table(["x"], [["a|b"]]) == "| x |\n| --- |\n| a\\|b |\n"


def test_readme_has_a_row_for_each_goal(made):
    lines = made[0].readme_part(report(models=section(MODELS))).splitlines()
    assert (
        "| encoder, speedup over Hugging Face as shipped | >= 8x, >= 4x | 3.99x .. 20x | 1 of 2, 2 not run |" in lines
    )
    assert "| decode, speedup over Hugging Face as shipped | >= 4x | 4x | 1 of 1, 2 not run |" in lines
    assert "| MoE layer over its floor | <= 1.5x | not run | not run |" in lines
    assert lines[-1].startswith("Measured on NVIDIA H100, 2026-12-01")


def test_a_part_of_a_page_stands_between_its_marks(made, tmp_path):
    import marks

    (begin, end), page = marks.marks("measured"), tmp_path / "page.md"
    marks.write_part(page, "old\n")
    assert page.read_text() == f"{begin}\nold\n{end}\n"
    page.write_text(f"a\n{page.read_text()}z")
    marks.write_part(page, "new\n")
    assert page.read_text() == f"a\n{begin}\nnew\n{end}\nz"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match=r"page\.md: needs the lines .* nothing was written"):
        marks.write_part(page, "new\n")
    assert page.read_text() == "no marks"
