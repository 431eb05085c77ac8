"""Every command of the README runs, in the order in which it stands there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from moesim.cli import main

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_the_moesim_commands_run_one_after_the_other(tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in LINES:
        words = shlex.split(line, comments=True)
        if words[0] == "moesim":
            result = CliRunner().invoke(main, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran += 1
    assert ran >= 8


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_the_make_targets_exist(line):
    words = shlex.split(line, comments=True)
    subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_every_line_is_covered():
    known = ("moesim ", "make ", "python3 -m venv .venv", ".venv/bin/pip install -e .")
    assert [line for line in LINES if not line.startswith(known)] == []


def test_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
