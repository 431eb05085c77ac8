"""The command line as scripts know it: commands and options are frozen here, so that a change is a decision."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from moesim.cli import main

SHIPPED = str(Path(__file__).parents[2] / "models/switch-mini")

WORKLOAD = "--batch-tokens --batch-requests --chunked --batch-recorded --shuffle --split"
SURFACE = {
    "record": "--model --text --dataset --dataset-split --dataset-column --dataset-revision --dataset-documents --out "
    "--device --dtype --batch --max-tokens --encoder-tokens --prefill-tokens --generate --lookahead --router-input "
    "--force --json",
    "trace info": "--json",
    "trace stats": "--stack --window-tokens --gpus --top --picture --per-window --json",
    "trace verify": "--json",
    "trace import": "--out --format --model --experts --layers --top-k --phase --stack --physical-map --keep-warmup "
    "--force --json",
    "trace export": f"--format --out --stack --policy --gpus --extra-slots --phase {WORKLOAD} --force --json",
    "trace concat": "--out --force --json",
    "trace formats": "--json",
    "trace synth": "--out --like --experts --layers --top-k --requests --request-tokens --skew --drift --coupling "
    "--overlap --domains --domain-shift --arrival --window-tokens --shapes --seed --force --json",
    "predict": f"--predictor --horizon {WORKLOAD} --fit-on --phase --gpus --extra-slots --at --max-steps --seed "
    "--epochs --device --checkpoints --save --load --json --out --picture",
    "simulate": f"--policy --baseline --profile --gpus {WORKLOAD} --phase --extra-slots --resident --max-steps "
    "--shapes --dtype --contention --tensor-parallel --micro-batches --no-overlap --send --copy-dtype --arrivals "
    "--requests --seed --max-running --ttft-ms --tpot-ms --fault --quality --workers --json --out --picture "
    "--timeline --event-log --decision-log",
    "sweep": "--policy --baseline --profile --gpus --batch-tokens --extra-slots --resident --skew --shapes --phase "
    "--chunked --shuffle --split --max-steps --dtype --contention --tensor-parallel --micro-batches --no-overlap "
    "--send --copy-dtype --grid --out --workers --ray --optuna --objective --seed --map --where --json",
    "tune": f"--profile --gpus --policies --extra-slots --as-named {WORKLOAD} --phase --resident --max-steps --shapes "
    "--dtype --contention --tensor-parallel --micro-batches --no-overlap --send --copy-dtype --memory-gib --latency-ms "
    "--allow-lossy --quality --budget-seconds --out --json",
    "explain": "--policy --step --timeline --json",
    "run-gpu": "--policy --baseline --ranks --partitions --random --routing --resident --copy-dtype --device --trace "
    f"--text {WORKLOAD} --phase --extra-slots --max-steps --repeats --warmup --dtype --quality --json --out "
    "--decision-log --timeline",
    "calibrate": "--policy --ranks --partitions --random --resident --copy-dtype --phase --device --out --dtype "
    "--batch-tokens --extra-slots",
    "profile list": "--json",
    "profile show": "--json",
    "profile check": "--json",
    "quality": "--policy --trace --text --resident --phase --batch-requests --max-requests --split --copy-dtype --gate "
    "--seed --dtype --device --json --out",
    "policy list": "--json",
    "policy show": "",
    "compare": "--baseline --quality --timeline --json --out",
    "demo": "--model --out --ranks --device --max-tokens --batch-tokens",
}


def commands(group=main, prefix=""):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def options(command):
    return " ".join((p.secondary_opts or p.opts)[-1] for p in command.params if isinstance(p, click.Option))


def test_commands_and_options_are_frozen():
    assert {name: options(command) for name, command in commands()} == SURFACE


@pytest.mark.parametrize("name", SURFACE)
def test_help_has_an_example(name):
    result = CliRunner().invoke(main, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert f"moesim {name}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "none.moetrace", "--policy", "best", "--profile", "8xH100-NVLink"], "unknown policy 'best'"),
        (["simulate", "none.moetrace", "--policy", "all", "--profile", "8xH100-NVLink"], "no trace there"),
        (["trace", "verify", "none.moetrace"], "no trace there"),
        (["compare", "a.json", "b.json"], "a.json: cannot be read"),
        (["demo", "--model", "nothing"], "nothing/samples: no such folder"),
        (["run-gpu", "nothing", "--policy", "balanced", "--ranks", "2"], "nothing"),
        (["run-gpu", SHIPPED, "--policy", "oracle", "--ranks", "2"], "oracle"),
        (["run-gpu", SHIPPED, "--policy", "balanced", "--ranks", "33"], "33"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_the_installed_command_runs():
    told = subprocess.check_output(
        [sys.executable, "-c", "from moesim.cli import main; main(['--version'])"], text=True
    )
    assert "version 0.1.0" in told
