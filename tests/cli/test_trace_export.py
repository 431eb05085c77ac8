"""`moesim trace export`: plans on disk, checked; what cannot be planned or replaced is one line."""

import json

import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.sim.plan_checks import Server, check_sglang
from moesim.traces.writer import TraceWriter


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "small.moetrace"
    with TraceWriter(path, make_spec(), {}) as writer:
        writer.append("encoder", make_table(requests=20))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["trace", "export", *map(str, arguments)])


def test_a_plan_is_written_with_the_options_of_the_server(trace, tmp_path):
    out = tmp_path / "deep" / "plan.json"
    told = run(trace, "--format", "sglang-plan", "--policy", "eplb", "--gpus", 4, "--out", out)
    assert told.exit_code == 0, told.output
    assert "12 slots a layer on 4 GPUs, 4 of them redundant" in told.stdout
    assert f"--init-expert-location {out} --ep-num-redundant-experts 4 --ep-size 4" in told.stdout
    check_sglang(out.read_text(), Server(experts=8, gpus=4, num_layers=3, moe_layers=(0, 1, 2)))
    again = run(trace, "--format", "sglang-plan", "--policy", "balanced", "--gpus", 2, "--out", out)
    assert again.exit_code == 2 and "exists already" in again.stderr
    forced = run(trace, "--format", "vllm-plan", "--policy", "balanced", "--gpus", 2, "--out", out, "--force", "--json")
    assert json.loads(forced.stdout)["slots"] == 10
    assert json.loads(out.read_text())["record_type"] == "eplb_initial_mapping"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "sglang-plan"], "--format sglang-plan needs --policy and --gpus"),
        (["--format", "sglang-plan", "--policy", "oracle", "--gpus", "2"], "is shown the future"),
        (["--format", "sglang-plan", "--policy", "best", "--gpus", "2"], "unknown policy 'best'"),
        (["--format", "sglang-plan", "--policy", "eplb", "--gpus", "9"], "9 GPUs for 8 experts"),
        (["--format", "sglang-plan", "--policy", "eplb", "--gpus", "2", "--phase", "decode"], "stack 'decoder'"),
        (["--format", "xml"], "'xml' is not one of"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(trace, tmp_path, options, message):
    told = run(trace, "--out", tmp_path / "plan", *options)
    assert told.exit_code == 2 and message in told.stderr
    assert not list(tmp_path.iterdir())
