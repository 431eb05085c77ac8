"""GPUs that are partitions of one device slow each other down while they compute."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import make_spec
from moesim.sim.cost import expert_seconds, together_seconds
from moesim.sim.profile import load_profile
from moesim.traces import InputError

SECONDS = st.lists(st.floats(0, 10), min_size=2, max_size=6)


def test_by_hand():
    # 4 and 2 seconds of work, half as fast together: both run until the second has done its 2 (4 s), then one is alone.
    assert together_seconds(np.array([4.0, 2.0]), 1.0).tolist() == [6.0, 4.0]
    # Three: 1 s of each at 1 + .5 x 2 / 2, then 1 s of two at 1 + .5 / 2, then 1 s alone.
    assert together_seconds(np.array([3.0, 1.0, 2.0]), 0.5).tolist() == pytest.approx([1.5 + 1.25 + 1, 1.5, 2.75])


@given(SECONDS, st.floats(0, 2))
def test_bounds_and_order(alone, slowdown):
    alone_G = np.array(alone)
    ends_G = together_seconds(alone_G, slowdown)
    assert (ends_G >= alone_G * (1 - 1e-12)).all()
    assert (ends_G <= alone_G * (1 + slowdown) * (1 + 1e-12) + 1e-12).all()
    assert (np.argsort(ends_G, kind="stable") == np.argsort(alone_G, kind="stable")).all()
    assert ends_G[alone_G == 0].sum() == 0


@given(st.floats(0, 10), st.floats(0, 2))
def test_equal_work_takes_as_long_as_the_slowdown_says_and_one_gpu_none(seconds, slowdown):
    assert together_seconds(np.full(5, seconds), slowdown) == pytest.approx(np.full(5, seconds * (1 + slowdown)))
    assert together_seconds(np.array([seconds]), slowdown).tolist() == [seconds]


def test_many_phases_at_once_as_one_by_one():
    alone_NG = np.random.default_rng(0).random((7, 4))
    assert together_seconds(alone_NG, 0.4).tolist() == [together_seconds(row, 0.4).tolist() for row in alone_NG]


def test_a_profile_carries_it_and_expert_phases_feel_it(tmp_path):
    profile = load_profile("8xA100-NVLink")
    shared = replace(profile, gpu=replace(profile.gpu, shared_slowdown=0.5))
    shared.save(tmp_path / "shared.json")
    assert load_profile(tmp_path / "shared.json") == shared
    tokens_EG = np.array([[100, 0], [0, 100]])
    alone = expert_seconds(tokens_EG, profile.gpu, make_spec(), "bfloat16")
    assert expert_seconds(tokens_EG, shared.gpu, make_spec(), "bfloat16") == pytest.approx(1.5 * alone)
    data = json.loads((tmp_path / "shared.json").read_text())
    data["gpu"]["shared_slowdown"] = -1
    (tmp_path / "wrong.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="shared_slowdown"):
        load_profile(tmp_path / "wrong.json")
    assert asdict(profile)["gpu"]["shared_slowdown"] == 0.0
