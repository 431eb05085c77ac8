"""A user's own policies: read back as written, run as the named one they equal, and wrong ones refused by line."""

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli.main import main
from moesim.sim.policies import POLICIES, recipe
from moesim.sim.policies.files import recipe_toml
from moesim.traces import InputError


@pytest.mark.parametrize("name", POLICIES)
def test_what_show_prints_is_the_policy_when_read_back(name, tmp_path):
    path = tmp_path / "shown.toml"
    path.write_text(recipe_toml(POLICIES[name]))
    shown = recipe(str(path))
    assert recipe_toml(shown) == path.read_text()
    choices = ("placement", "predictor", "rule", "split", "miss", "routing")
    for part in (*choices, "double_buffered", "phase_locked", "simulated_only"):
        assert getattr(shown, part) == getattr(POLICIES[name], part)


def test_a_base_lends_the_parts_that_are_not_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "eplb"\nsplit = "exact"\n\n[rule]\nname = "periodic"\ninterval = 3\n\n[found]\nby = 1\n')
    mine = recipe(str(path))
    assert mine.predictor == "window" and mine.rule.interval == 3
    assert mine.split is POLICIES["balanced"].split


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('base = "eplb"\nplacment = "balanced"\n', 2, "placment is not a part"),
        ('base = "nobody"\n', 1, "no named policy"),
        ('placement = "balanced"\npredictor = "prophet"\n', 2, "'prophet' is not known"),
        ('placement = "balanced"\nsummary = 3\n', 2, "summary must be a str"),
        ('placement = "balanced"\n\n[rule]\nname = "periodic"\ninterval = "often"\n', 5, "interval must be int"),
        ('placement = "balanced"\n\n[rule]\nname = "periodic"\nevery = 3\n', 5, "every is not an option"),
        ('placement = "balanced"\n\n[rule]\nname = "replicate"\n', 3, "needs next_batch"),
        ('base = "probe"\n\n[rule]\nname = "replicate"\nnext_batch = false\nplan = "best"\n', 6, "plan = 'best'"),
        ('base = "probe"\n\n[rule]\nname = "replicate"\nnext_batch = false\ncap = true\n', 6, "cap must be int"),
        ('placement = "balanced"\nrule = "replicate"\n', 2, "rule needs a name"),
        ('summary = "no parts"\n', 1, "no placement and no base"),
        ('base = ["eplb"]\n', 1, "no named policy"),
        ('placement = "balanced"\n\n[rule]\nname = ["never"]\n', 3, "rule needs a name"),
        ('base = "eplb"\n\n[rule]\nname = "periodic"\ninterval = 0\n', 5, "interval must be at least 1"),
        ('base = "eplb"\n\n[rule]\nname = "periodic"\nmoves = 0\n', 5, "moves must be at least 1"),
        (
            'base = "lina"\n\n[rule]\nname = "replicate"\nnext_batch = false\nmost_per_gpu = -1\n',
            6,
            "most_per_gpu must",
        ),
        ('base = "sp-moe"\n\n[rule]\nname = "prefetch-draft"\ndraft_s = inf\n', 5, "draft_s must be a finite"),
        ('base = "sp-moe"\n\n[rule]\nname = "prefetch-draft"\nafter = -5\n', 5, "after must be a layer"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(text, line, what, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"line {line}: .*{what}"):
        recipe(str(path))


@pytest.mark.parametrize("text", [b"base = ", b"\xff\xfe", b'a = "b'])
def test_what_is_no_toml_is_refused(text, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_bytes(text)
    with pytest.raises(InputError, match="no TOML"):
        recipe(str(path))


def test_a_missing_file_and_an_unknown_name_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        recipe(str(tmp_path / "nowhere.toml"))
    with pytest.raises(InputError, match=r"known: contiguous.*or a file"):
        recipe("nobody")


def test_a_function_gives_a_policy_and_its_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_policies.py").write_text(
        "from dataclasses import replace\nfrom moesim.sim.policies import POLICIES\n"
        "def mine():\n    return replace(POLICIES['eplb'], predictor='ema')\n"
        "def wrong():\n    return 3\ndef fails():\n    raise ValueError('no')\n"
    )
    assert recipe("own_policies:mine").predictor == "ema"
    with pytest.raises(InputError, match=r"must return a moesim\.sim\.policies\.Recipe, not int"):
        recipe("own_policies:wrong")
    with pytest.raises(InputError, match="ValueError: no"):
        recipe("own_policies:fails")
    with pytest.raises(InputError, match="AttributeError"):
        recipe("own_policies:absent")


@given(st.text())
def test_any_summary_survives(text):
    from dataclasses import replace
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        path.write_text(recipe_toml(replace(POLICIES["eplb"], summary=text)), encoding="utf-8", newline="")
        assert recipe(str(path)).summary == text


def test_the_commands_list_and_show():
    listed = CliRunner().invoke(main, ["policy", "list"])
    assert listed.exit_code == 0 and all(name in listed.output for name in POLICIES)
    shown = CliRunner().invoke(main, ["policy", "show", "eplb"])
    assert shown.exit_code == 0 and 'predictor = "window"' in shown.output
    unknown = CliRunner().invoke(main, ["policy", "show", "nobody"])
    assert unknown.exit_code == 2 and unknown.output.startswith("Error: unknown policy")
