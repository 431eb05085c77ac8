"""`moesim profile`: what is shipped, every number with its unit, and files of one's own."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from moesim.cli import main
from moesim.sim.curves import ExpertCurve, MessageCurve
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


def with_curves(path):
    """A shipped profile with one curve of each kind, the messages' seconds falling at the end."""
    profile = load_profile("8xH100-NVLink")
    experts = ExpertCurve(
        d_model=8,
        d_ff=16,
        gated=True,
        dtype="bfloat16",
        distinct=(1, 2),
        rows=(1, 64),
        seconds=((1e-5, 2e-5), (2e-5, 4e-5)),
    )
    messages = MessageCurve(nbytes=(1e3, 1e6, 2e6), seconds=(1e-5, 2e-5, 1e-5))
    links = replace(profile.links, all_to_all=replace(profile.links.all_to_all, curve=messages))
    replace(profile, gpu=replace(profile.gpu, expert_curves=(experts,)), links=links).save(path)


def test_curves_are_shown_by_their_range_and_rule(tmp_path):
    path = tmp_path / "mine.json"
    with_curves(path)
    told = run("show", path).stdout
    for words in ("links.all_to_all.curve", "1 kB to 2 MB (3 points)", "gpu.expert_curves[0]", "1 to 64 tokens each"):
        assert words in told
    assert "linear in logs between points" in told and "ratio of the fitted roofline" in told
    assert "links.p2p.curve" not in told and "450 GB/s" in told
    plain = run("show", "8xH100-NVLink").stdout
    assert "curve" not in plain and "linear in logs" not in plain
    assert json.loads(run("show", path, "--json").stdout)["gpu"]["expert_curves"][0]["rows"] == [1, 64]


def test_check_warns_of_times_that_fall_and_refuses_damaged_curves(tmp_path):
    path = tmp_path / "mine.json"
    with_curves(path)
    checked = run("check", path)
    assert checked.exit_code == 0 and "gpu.expert_curves" not in checked.stdout
    assert "links.all_to_all.curve: a longer message took over 10% less time" in checked.stdout
    data = json.loads(path.read_text())
    data["gpu"]["expert_curves"][0]["seconds"][1] = [1e-6, 4e-5]
    path.write_text(json.dumps(data))
    assert "gpu.expert_curves[0]: more work took over 10% less time" in run("check", path).stdout
    data["gpu"]["expert_curves"][0]["seconds"][1] = [1e-6]
    path.write_text(json.dumps(data))
    broken = run("check", path)
    assert broken.exit_code == 2 and broken.stderr.count("\n") == 1
    assert "gpu.expert_curves[0].seconds[1] must have one time for each of 2 points, got 1" in broken.stderr


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
