"""`moesim profile`: what is shipped, every number with its unit, and files of one's own."""

import json

import pytest
from click.testing import CliRunner

from moesim.cli import main
from moesim.sim.profile import load_profile, shipped_profiles


def run(*arguments):
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


def test_the_list_has_every_shipped_profile():
    table = run("list").stdout
    assert all(f" {name} " in table for name in shipped_profiles())
    assert [entry["name"] for entry in json.loads(run("list", "--json").stdout)] == shipped_profiles()


def test_show_gives_units_and_sources():
    told = run("show", "8xH200-NVLink").stdout
    for words in ("4,800 GB/s", "141 GB", "989 TFLOP/s", "20 µs", "gpu.tile_rows", "128", "spec-sheet", "data sheet"):
        assert words in told
    assert json.loads(run("show", "8xH200-NVLink", "--json").stdout)["gpu"]["hbm_bytes_per_s"] == 4.8e12
    assert "links.p2p" in run("show", "4xRTX4090-PCIe").stdout


def test_check_says_what_is_wrong_or_missing(tmp_path):
    path = tmp_path / "mine.json"
    load_profile("4xRTX4090-PCIe").save(path)
    sound = run("check", path)
    assert sound.exit_code == 0 and "sound (spec-sheet, 4 GPUs)" in sound.stdout
    assert "decide_s is empty" in sound.stdout and "links.p2p is null" in sound.stdout
    assert len(json.loads(run("check", path, "--json").stdout)["warnings"]) == 2
    path.write_text(path.read_text().replace('"tile_rows": 128', '"tile_rows": -1'))
    broken = run("check", path)
    assert broken.exit_code == 2 and broken.stderr.count("\n") == 1
    assert "gpu.tile_rows must be a positive number, got -1" in broken.stderr


@pytest.mark.parametrize("command", ["show", "check"])
def test_an_unknown_profile_lists_the_known_ones(command):
    told = run(command, "9xB300")
    assert told.exit_code == 2 and "8xB200-NVLink" in told.stderr
