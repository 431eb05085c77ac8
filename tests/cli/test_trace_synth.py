"""`moesim trace synth` as a user sees it: labelled, honest about what it missed, usable like any trace."""

import json

import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.traces.store import Trace
from moesim.traces.writer import TraceWriter

SIZES = ["--experts", "16", "--layers", "2", "--requests", "40", "--request-tokens", "32", "--window-tokens", "256"]


def run(*arguments):
    return CliRunner().invoke(main, ["trace", "synth", *map(str, arguments)])


def test_the_label_the_table_and_what_is_not_modelled(tmp_path):
    out = tmp_path / "s.moetrace"
    told = run("--out", out, *SIZES, "--skew", 2.5, "--domains", 2, "--shapes", "olmoe-1b-7b")
    assert told.exit_code == 0, told.output
    for words in ("synthetic, 1,280 tokens", "max/mean", "matched", "not fitted", "Not modelled: which words"):
        assert words in told.stdout
    trace = Trace.open(out)
    assert list(trace.verify()) and trace.spec.family == "synthetic" and trace.provenance["synthetic"] is True
    assert set(trace.request_texts) == {"domain-0", "domain-1"} and trace.spec.widths is not None
    assert trace.provenance["target"]["max/mean"] == 2.5 and trace.provenance["generator"]["seed"] == 0
    arguments = ["--policy", "balanced", "--profile", "8xH100-NVLink", "--split", "dataset:domain-1"]
    assert CliRunner().invoke(main, ["simulate", str(out), *arguments]).exit_code == 0


def test_like_a_trace(tmp_path):
    source = tmp_path / "real.moetrace"
    with TraceWriter(source, make_spec(), {}) as writer:
        writer.append("encoder", make_table(requests=40, noise=0.4))
    told = run("--out", tmp_path / "s.moetrace", "--like", source, "--window-tokens", 256, "--json")
    report = json.loads(told.stdout)
    assert report["generator"]["like"] == "real.moetrace" and str(tmp_path) not in json.dumps(report["generator"])
    assert report["generator"]["shape"]["experts"] == 8 and report["tokens"] == 40 * 32
    assert all(value is not None for name, value in report["target"].items() if name != "domain distance")
    assert "max/mean" not in report["not_reached"]
    assert Trace.open(tmp_path / "s.moetrace").spec.family == "synthetic:switch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--skew", "99"], "a max/mean of 99 cannot be"),
        (["--drift", "2"], "--drift must lie between 0 and 1, got 2"),
        (["--experts", "2", "--top-k", "2"], "experts must be more than top-k 2"),
        (["--like", "nothing"], "nothing: no trace there"),
        (["--requests", "0"], "requests must be at least 1"),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    told = run("--out", "s.moetrace", *arguments)
    assert told.exit_code == 2 and message in told.stderr and told.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
