"""No speedup of a lossy policy is printed without its quality beside it; one function decides."""

import json
from dataclasses import replace

import pytest

from helpers import make_quality
from moesim.sim.policies import POLICIES, recipe_digest
from moesim.sim.quality import (
    NOT_MEASURED,
    comparable,
    how_to_measure,
    is_lossy,
    load_qualities,
    quality_of,
    save_qualities,
    speedup_text,
)
from moesim.sim.results import Result
from moesim.sim.totals import PHASES, StepRecord
from moesim.traces import InputError

FATE = make_quality("fate", resident=8)


def result(policy, seconds=1.0, *, config=None, **counts):
    record = StepRecord(
        duration_s=seconds, tokens=4, phase_s=dict.fromkeys(PHASES, 0.0), load_LG=[[4]], busy_s=[seconds], **counts
    )
    digest = recipe_digest(POLICIES[policy]) if policy in POLICIES else ""
    given = {"policy_digest": digest, "model_digest": "abc", "resident": 8, "phase": "encoder", **(config or {})}
    return Result(kind="simulated", policy=policy, config=given, steps=[record])


BASE = result("on-demand", 2.0)


@pytest.mark.parametrize(
    ("one", "lossy"),
    [
        (result("on-demand"), False),
        (result("on-demand", rounded_tokens=1), True),
        (result("on-demand", skipped_tokens=1), True),
        (result("on-demand", substituted_tokens=1), True),
        (result("on-demand", lost_tokens=1), False),  # a fault's doing, reported as such
        (result("fate"), True),  # by its recipe, also where nothing was rounded yet
        (result("gone.toml"), False),
    ],
)
def test_what_is_lossy(one, lossy):
    assert is_lossy(one) is lossy


def test_an_exact_policy_has_its_speedup():
    assert speedup_text(result("lfu"), BASE, []) == ("2.000x", "exact")
    assert how_to_measure([result("lfu"), BASE], []) is None


def test_a_lossy_one_only_beside_its_quality():
    fate = result("fate")
    assert speedup_text(fate, BASE, []) == ("-", NOT_MEASURED)
    assert speedup_text(fate, BASE, [FATE]) == ("2.000x", "loss 2.000 +0.250, top-1 87.5%, error 5.0%")
    assert "moesim quality MODEL --trace TRACE --policy fate --resident 8 --out" in how_to_measure([BASE, fate], [])


def test_a_lossy_baseline_makes_every_speedup_wait():
    rounded = result("on-demand", rounded_tokens=1)
    assert speedup_text(result("lfu"), rounded, []) == ("-", f"{NOT_MEASURED} of on-demand")
    assert not comparable(result("lfu"), rounded, [FATE])
    measured = replace(FATE, policy="on-demand", policy_digest=recipe_digest(POLICIES["on-demand"]))
    assert comparable(result("lfu"), rounded, [measured])


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ({}, True),
        ({"phase": "prefill"}, True),
        ({"phase": "prefill and decode"}, True),
        ({"phase": "decode"}, False),
        ({"resident": 16}, False),
        ({"model_digest": "abd"}, False),
        ({"model_digest": ""}, False),
        ({"copy_dtype": "int4"}, False),
        ({"policy_digest": recipe_digest(replace(POLICIES["fate"], eviction="lfu"))}, False),
    ],
)
def test_it_must_be_of_the_same_model_slots_precision_and_phase(config, fits):
    assert (quality_of(result("fate", config=config), [FATE]) is FATE) is fits
    assert quality_of(result("hobbit", config=config), [FATE]) is None


def test_an_unknown_model_matches_nothing():
    nameless = result("fate", config={"model_digest": ""})
    assert quality_of(nameless, [replace(FATE, model_digest="")]) is None


def test_reads_back(tmp_path):
    path = tmp_path / "deep" / "quality.json"
    save_qualities([FATE, replace(FATE, policy="hobbit")], path)
    assert load_qualities(path) == [FATE, replace(FATE, policy="hobbit")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "not a file of moesim quality"),
        ('{"format": "moesim-quality", "version": 9}', "version 9"),
        ('{"format": "moesim-quality", "version": 2}', "no entries"),
        ('{"format": "moesim-quality", "version": 2, "entries": [{}]}', "damaged entry"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "quality.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_qualities(path)


def test_numbers_must_be_numbers(tmp_path):
    path = tmp_path / "quality.json"
    save_qualities([FATE], path)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["entries"][0]["loss"] = "low"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match="loss is 'low'"):
        load_qualities(path)
    with pytest.raises(InputError, match=r"cannot be read .* moesim quality --out"):
        load_qualities(tmp_path / "none.json")
