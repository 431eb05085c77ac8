"""`moesim trace stats` and `info` on tokens and on loads: what is printed, written, and said to be missing."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.traces import LoadTable
from moesim.traces.writer import TraceWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces")
    with TraceWriter(path / "tokens.moetrace", make_spec(), {"synthetic": True}, shard_tokens=100) as writer:
        writer.append("encoder", make_table(requests=40))
    load = np.tile([[8, 6, 4, 2, 1, 1, 1, 1]] * 3, (5, 1, 1)).astype(np.int64)
    rows = LoadTable(load=load, step=np.arange(5, dtype=np.int32), phase=np.zeros(5, np.uint8))
    about = {
        "format": "sglang",
        "source": "x.pt",
        "bytes": 10,
        "complete": True,
        "cleaning": {"rows": 7, "found": {"warmup": 2}, "shares": {"warmup": 2 / 7}, "dropped": ["warmup"]},
        "notes": {"ranks": "one was taken"},
    }
    with TraceWriter(path / "loads.moetrace", make_spec(), {"import": about}, kind="loads") as writer:
        writer.append("encoder", rows)
    return path


def run(*arguments):
    told = CliRunner().invoke(main, ["trace", *map(str, arguments)])
    assert told.exit_code == 0, told.output
    return told.stdout


def test_every_column_and_what_it_means(folder):
    told = run("stats", folder / "tokens.moetrace", "--gpus", "2,4")
    for words in ("max/mean", "noise", "balanced 4", "adjacent", "next", "encoder: 1,024 tokens in windows, 2 windows"):
        assert words in told
    for words in ("mean of the layers", "over all layers (vLLM)", "sum of means / sum of maxima", "by chance"):
        assert words in told


def test_one_window_of_everything(folder):
    told = json.loads(run("stats", folder / "tokens.moetrace", "--window-tokens", 0, "--json"))["encoder"]
    assert told["windows"] == 1 and told["tokens"] == 1280 and told["layers"][0]["drift"] is None
    assert told["layers"][0]["balancedness"]["2"].keys() == {"sglang", "vllm"}
    assert told["vllm_balancedness"].keys() == {"2", "4", "8"} and told["no_overlaps"] is None


def test_every_window_as_csv(folder, tmp_path):
    out = tmp_path / "deep/windows.csv"
    run("stats", folder / "tokens.moetrace", "--window-tokens", 100, "--gpus", "2", "--per-window", out, "--top", 2)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 3 and rows[0]["drift"] == "" and float(rows[-1]["drift"]) > 0
    assert float(rows[0]["max_over_mean"]) > 1 and len(rows[0]["top_experts"].split()) == 2
    mean = np.mean([float(row["max_over_mean"]) for row in rows if row["layer"] == "1"])
    told = json.loads(run("stats", folder / "tokens.moetrace", "--window-tokens", 100, "--json"))["encoder"]
    assert told["layers"][1]["max_over_mean"] == pytest.approx(mean, rel=1e-4)


def test_loads_say_what_needs_tokens(folder, tmp_path):
    picture = tmp_path / "loads.png"
    told = run("stats", folder / "loads.moetrace", "--picture", picture)
    assert "120 tokens in windows, loads only, 5 windows, the rows as recorded" in told
    assert "adjacent, next: needs tokens, and this recording has loads only." in told
    assert picture.read_bytes().startswith(b"\x89PNG")
    as_json = json.loads(run("stats", folder / "loads.moetrace", "--window-tokens", 48, "--json"))["encoder"]
    assert as_json["windows"] == 2 and as_json["overlaps"] == [] and "loads only" in as_json["no_overlaps"]
    assert as_json["layers"][0]["max_over_mean"] == pytest.approx(8 / 3)


def test_info_tells_kind_origin_and_cleaning(folder):
    told = run("info", folder / "loads.moetrace")
    for words in ("imported from sglang: x.pt", "warmup: 28.6% of the rows, dropped", "ranks: one was taken",
                  "5 encoder rows of loads, without tokens"):  # fmt: skip
        assert words in told
    assert "over capacity" not in told
    assert "synthetic: made up, not recorded" in run("info", folder / "tokens.moetrace")
    as_json = json.loads(run("info", folder / "loads.moetrace", "--json"))
    assert as_json["kind"] == "loads" and as_json["dropped"] == {} and len(as_json["skew"]["encoder"]) == 3
    assert "5 rows of loads" in run("verify", folder / "loads.moetrace")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window-tokens", "-1"], "--window-tokens must be at least 1"),
        (["--gpus", "9"], "9 GPUs for 8 experts"),
        (["--gpus", "x"], "whole numbers with commas"),
        (["--stack", "decoder"], "no stack 'decoder'"),
    ],
)
def test_errors_are_one_line(folder, options, message):
    told = CliRunner().invoke(main, ["trace", "stats", str(folder / "tokens.moetrace"), *options])
    assert told.exit_code == 2 and message in told.stderr and told.stderr.count("\n") == 1
