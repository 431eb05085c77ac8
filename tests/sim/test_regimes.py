"""Where replicas pay: the simulator against what benchmarks/regime_sweep.py derives from the cost model."""

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_sweep():
    spec = importlib.util.spec_from_file_location("regime_sweep", BENCHMARKS / "regime_sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sweep = load_sweep()
Case = sweep.Case
SIZE = sweep.Size(sweep=(1024, 2048, 4096, 8192, 12288), bisections=0, layers=4, most_steps=2)


@cache
def found(**changed):
    return sweep.examine(Case(**changed), SIZE)


def test_replicas_cost_exactly_one_more_read_at_few_tokens_and_pay_at_many():
    mild, strong = found(sigma=1.0).points, found(sigma=2.0).points
    gpu, spec = sweep.node_of(Case()).gpu, sweep.spec_of(64, SIZE)
    read_s = spec.expert_bytes("bfloat16") / gpu.hbm_rate
    # This skew is mild enough that every expert has tokens.
    assert mild[1024][0] == pytest.approx((gpu.launch_s + 8 * read_s) / (gpu.launch_s + 9 * read_s), rel=1e-3)
    assert mild[1024][1] < 1 and strong[1024][0] < 1
    assert strong[12288][0] > 1.3 and strong[12288][1] > 1.2


def test_the_crossover_falls_with_the_hbm_rate_until_a_read_takes_less_than_a_tile():
    half, one, double, fourfold = (found(sigma=2.0, hbm=factor).experts for factor in (0.5, 1.0, 2.0, 4.0))
    assert half > 1.25 * one > 1.25**2 * double
    ridge, tile = sweep.ridge_rows(Case(hbm=2.0))
    assert ridge < tile < sweep.ridge_rows(Case())[0]
    assert fourfold == pytest.approx(double, rel=1e-6)


def test_the_crossover_falls_with_skew_and_rises_with_the_number_of_experts():
    mild, middle, strong = (found(sigma=sigma).experts for sigma in (1.0, 1.5, 2.0))
    assert mild > middle > strong
    few, more, most = (found(experts=experts).experts for experts in (16, 32, 64))
    assert few < more < most


@pytest.mark.parametrize(
    "changed", [{}, {"experts": 32}, {"sigma": 2.0}, {"sigma": 2.0, "hbm": 0.5}], ids=["base", "E", "skew", "HBM"]
)
def test_where_a_read_takes_longer_than_a_tile_the_crossover_is_where_the_mean_field_says(changed):
    """Apart from the interpolation, between points a factor of 2 apart."""
    row = found(**changed)
    assert row.experts == pytest.approx(row.mean_field, rel=0.25)


def test_at_very_few_tokens_replicas_move_whole_experts_and_level_the_reads():
    few = sweep.Size(sweep=(16, 256), bisections=0, layers=4, most_steps=24)
    row = sweep.examine(Case(sigma=1.0), few)
    assert row.points[16][0] > 1 > row.points[256][0]
    assert 16 < row.falling < 256


def test_closed_form_by_hand():
    """HBM x1: ridge 593.4e12 / 2.8475e12 rows = 208.4; (9 x 208.4 - 7.5 x 128) / 0.25."""
    ridge, tile = sweep.ridge_rows(Case())
    assert ridge == pytest.approx(593.4 / 2.8475) and tile == 128
    assert sweep.closed_form(Case(), 0.25) == pytest.approx((9 * 593.4 / 2.8475 - 960) / 0.25)
    assert sweep.closed_form(Case(hbm=4.0), 0.25) == pytest.approx(1.5 * 128 / 0.25)


def test_crossovers_are_interpolated_in_the_logarithm_and_the_last_one_counts():
    at = {16: 1.2, 64: 0.9, 128: 1.1, 256: 0.9, 1024: 1.1}
    assert sweep.crossover(at) == pytest.approx(512)
    assert sweep.passes(at, rising=False) == (16, 64)
    assert sweep.crossover({16: 0.9, 32: 0.95}) is None


def test_the_script_writes_a_table_and_a_picture(tmp_path):
    out = tmp_path / "new" / "regimes"
    command = [sys.executable, "-W", "error", BENCHMARKS / "regimes.py", "--quick", "--out", out]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "regimes.md" in done.stdout and "simulating" not in done.stdout
    assert "| base |" in text and "quick run" in text and "![Speedup over tokens a step](regimes.png)" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
