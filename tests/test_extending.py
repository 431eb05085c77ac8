"""The example of docs/extending.md: it runs as it stands, and registering it is all that it takes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers import make_spec, make_table
from moesim.cli import main
from moesim.predictors import PREDICTORS, Adapting
from moesim.traces.writer import TraceWriter

PAGE = Path(__file__).parents[1] / "docs/extending.md"


@pytest.fixture
def follows(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "follows.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("follows", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Follows


def scored(trace, *arguments):
    asked = ["predict", str(trace), "--predictor", "frequency,markov,follows", "--batch-tokens", "128", "--json"]
    result = CliRunner().invoke(main, [*asked, *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["mean"]["predictors"]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_example_is_scored_once_it_is_registered(follows, top_k, tmp_path, monkeypatch):
    monkeypatch.setitem(PREDICTORS, "follows", follows)
    path = tmp_path / "small.moetrace"
    with TraceWriter(path, make_spec(top_k=top_k), {}) as writer:
        writer.append("encoder", make_table(requests=40, top_k=top_k))
    told = scored(path)
    recall = {name: numbers["horizons"]["1"][f"recall_at_{top_k}"] for name, numbers in told.items()}
    # Both layers are as they follow from the token with a chance of 0.8 + 0.2 / 8 each.
    assert recall["follows"] == pytest.approx(0.825**2, abs=0.1)
    assert recall["follows"] > 1.5 * recall["frequency"] and recall["follows"] > recall["markov"] - 0.05
    assert told["follows"]["parameters"] == 3 * 8 * 8
    assert told["follows"]["horizons"]["1"]["calibration_error"] < 0.15


def test_the_example_adapts_and_says_what_it_needs(follows):
    assert isinstance(follows(), Adapting) and follows.needs == ("tokens",) and follows.name not in PREDICTORS
