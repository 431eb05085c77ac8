"""The page docs/backend.md: its example runs as it stands and computes what the model computes, and so do its commands,
one after the other."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moesim.cli import main
from moesim.sim.profile import load_profile

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/backend.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_gives_the_models_own_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = blocks("python")
    made = {}
    exec(compile(code, PAGE, "exec"), made)
    for name in ("eager", "graphed"):
        torch.testing.assert_close(made[name], made["expected"], rtol=1e-4, atol=1e-5)
    assert torch.equal(made["tokens"], made["expected_tokens"])


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    # A random model of the published shape, only narrower.
    from moesim.backend import random_model

    narrow = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4}
    monkeypatch.setitem(random_model.NAMES, "switch-base-8", {**random_model.NAMES["switch-base-8"], **narrow})
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "moesim"
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert {shlex.split(line)[1] for line in lines} >= {"calibrate", "simulate", "run-gpu", "compare", "quality"}
    compared = json.loads(Path("comparison.json").read_text())
    assert [row["policy"] for row in compared["rows"]] == ["contiguous", "balanced"]
    assert load_profile("host.json").decide_s.keys() == {"contiguous", "on-demand", "lfu"}
    drawn = json.loads(Path("both.json").read_text())["traceEvents"]
    assert "balanced: measured" in {event["args"]["name"] for event in drawn if event["name"] == "process_name"}


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")))
def test_links_lead_somewhere(target):
    assert (PAGE.parent / target).exists()
