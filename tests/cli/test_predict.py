"""`moesim predict` as a user sees it: tables, JSON, files, pictures, errors in one line, Ctrl-C."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table, with_router_inputs
from moesim.cli import main
from moesim.predictors import PREDICTORS
from moesim.traces.writer import TraceWriter


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "small.moetrace"
    table, gates = with_router_inputs(make_table(requests=24, length=16))
    with TraceWriter(path, make_spec(), {}, gates={"encoder": gates}) as writer:
        writer.add_requests([("a.txt", "b.txt")[i % 2] for i in range(24)])
        writer.append("encoder", table)
    return path


def run(*arguments, trace):
    return CliRunner().invoke(main, ["predict", str(trace), *map(str, arguments)])


def test_the_tables_and_what_they_are_held_against(trace):
    result = run("--predictor", "frequency,markov,window,oracle", "--horizon", "1..2", "--gpus", 4, trace=trace)
    assert result.exit_code == 0, result.output
    for words in (
        "Tokens, 1 layer ahead",
        "Loads, 2 layers ahead",
        "recall@1",
        "us/token and layer",
        "small.moetrace: encoder of switch, 3 layers x 8 experts, top-1; 2048 tokens a step",
        "multinomial floor",
        "planned on the true loads",
    ):
        assert words in result.stdout, words
    assert result.stdout.count("│ markov ") == 5 and result.stdout.count("│ window ") == 3
    assert result.stderr == ""


def test_json_is_all_that_is_on_stdout_and_is_what_is_written(trace, tmp_path):
    out = tmp_path / "deep" / "report.json"
    result = run("--predictor", "markov", "--batch-tokens", 64, "--json", "--out", out, trace=trace)
    report = json.loads(result.stdout)
    assert report == json.loads(out.read_text()) and report["format"] == "moesim-prediction"
    assert report["config"]["batch"] == "64 tokens" and report["folds"] == []
    markov = report["mean"]["predictors"]["markov"]
    assert markov["horizons"]["1"]["recall_at_1"] > 0.5 and set(markov["horizons"]["1"]["layers"]) == {"0", "1", "2"}
    assert {"torch", "numpy", "moesim"} <= report["config"]["versions"].keys()


def test_every_registered_predictor_is_scored_by_all(trace):
    result = run("--epochs", 1, "--batch-tokens", 128, "--max-steps", 1, "--json", trace=trace)
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["mean"]["predictors"]) == list(PREDICTORS)


def test_held_out_data_sets_are_folds(trace):
    report = json.loads(run("--predictor", "markov", "--split", "dataset", "--json", trace=trace).stdout)
    assert [fold["split"] for fold in report["folds"]] == ["dataset:a.txt", "dataset:b.txt"]
    parts = [fold["predictors"]["markov"]["horizons"]["1"]["recall_at_1"] for fold in report["folds"]]
    assert report["mean"]["predictors"]["markov"]["horizons"]["1"]["recall_at_1"] == pytest.approx(sum(parts) / 2)


def test_the_picture_is_one(trace, tmp_path):
    result = run("--predictor", "frequency,markov,window", "--picture", tmp_path / "p.png", trace=trace)
    assert result.exit_code == 0 and (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_report_but_for_the_time(trace):
    def scores(seed):
        text = run("--predictor", "gru", "--epochs", 1, "--seed", seed, "--json", trace=trace).stdout
        numbers = json.loads(text)["mean"]["predictors"]["gru"]["horizons"]["1"]
        return {key: value for key, value in numbers.items() if key not in ("us_per_token", "layers")}

    assert scores(1) == scores(1) != scores(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictor", "crystal-ball"], "unknown predictor 'crystal-ball'; known: frequency"),
        (["--predictor", ","], "names no predictor"),
        (["--predictor", "markov", "--horizon", "0"], "--horizon '0'"),
        (["--predictor", "markov", "--horizon", "one"], "--horizon 'one'"),
        (["--predictor", "markov", "--horizon", "3..1"], "--horizon '3..1'"),
        (["--predictor", "markov", "--horizon", "4"], "1 to the 3 layers"),
        (["--predictor", "markov", "--extra-slots", "-1"], "--extra-slots '-1'"),
        (["--predictor", "markov", "--at", "x"], "--at 'x'"),
        (["--predictor", "markov", "--split", "dataset:c"], "no request comes from data set 'c'"),
        (["--predictor", "markov", "--phase", "decode"], "decoder"),
        (["--predictor", "markov", "--chunked"], "only a prefill"),
        (["--predictor", "markov", "--fit-on", "none.moetrace"], "no trace there"),
        (["--predictor", "gru", "--load", "none"], "gru.safetensors"),
        (["--predictor", "gru", "--device", "abacus"], "abacus"),
        (["--predictor", "gru", "--seed", "-1"], "--seed"),
    ],
)
def test_errors_are_one_line(trace, arguments, message):
    result = run(*arguments, trace=trace)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")


def test_what_a_recording_does_not_suffice_for_is_left_out_or_refused(tmp_path):
    path = tmp_path / "bare.moetrace"
    with TraceWriter(path, make_spec(), {}) as writer:
        writer.append("encoder", make_table())
    result = run("--epochs", 0, "--json", trace=path)
    assert result.exit_code == 0 and "left out: gate reads what the routers were given" in result.stderr
    result = run("--predictor", "gate", trace=path)
    assert result.exit_code == 2 and "record with --router-input" in result.stderr


INTERRUPTED_IN_THE_FIRST_STEP = """
import os, signal
from moesim.cli import main
from moesim.predictors.learned import training

advance = training._Session.advance

def interrupted(session):
    os.kill(os.getpid(), signal.SIGINT)
    advance(session)

training._Session.advance = interrupted
main({arguments!r})
"""


def test_ctrl_c_keeps_the_training(trace, tmp_path):
    folder = tmp_path / "c"
    arguments = ["predict", str(trace), "--predictor", "gru", "--checkpoints", str(folder)]
    code = INTERRUPTED_IN_THE_FIRST_STEP.format(arguments=arguments)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr
    assert list(folder.glob("gru-*.safetensors"))
