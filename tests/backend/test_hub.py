"""Models by folder or hub id; the hub's own cache stands in for the network."""

import json

import pytest
from click.testing import CliRunner
from switch_models import SHIPPED

from moesim.backend.hub import model_folder, model_name
from moesim.cli import main
from moesim.traces import InputError

REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The shipped model as the hub's library would have left it after fetching it."""
    here = tmp_path / "models--somebody--switch-mini"
    (here / "refs").mkdir(parents=True)
    (here / "refs/main").write_text(REVISION)
    snapshot = here / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).symlink_to(SHIPPED / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_folder_is_itself_and_what_is_no_id_is_left_alone(tmp_path):
    assert model_folder(str(SHIPPED)) == SHIPPED
    assert model_folder(str(tmp_path / "none")) == tmp_path / "none"


def test_an_id_is_found_in_the_cache_and_keeps_its_name(cached):
    assert model_folder("somebody/switch-mini") == cached
    assert model_name(cached) == "somebody/switch-mini" and model_name(SHIPPED) == "switch-mini"


def test_what_cannot_be_fetched_is_one_line():
    with pytest.raises(InputError, match=r"^nobody/nothing: no such model folder, and the model hub does not give it"):
        model_folder("nobody/nothing")


def test_run_gpu_takes_an_id(cached, tmp_path):
    recording = SHIPPED / "recording.moetrace"
    asked = ["run-gpu", "somebody/switch-mini", "--trace", recording, "--policy", "lfu", "--resident", 8, "--json"]
    ran = CliRunner().invoke(main, [str(a) for a in [*asked, "--max-steps", 2, "--repeats", 1, "--device", "cpu"]])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert "somebody/switch-mini" in json.dumps(told)
