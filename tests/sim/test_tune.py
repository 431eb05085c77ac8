"""Tuning: three parts that share nothing, a choice that never sees the last, and the simplest of equals."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import make_quality, make_spec, make_table
from moesim.sim import tune as tuning
from moesim.sim.execution import Execution
from moesim.sim.policies import POLICIES, recipe
from moesim.sim.profile import load_profile
from moesim.sim.scenario import make_scenario
from moesim.sim.tune import (
    Candidate,
    Constraints,
    Trial,
    candidates,
    choose,
    confirmation,
    default_policies,
    is_noise,
    three_parts,
    tune,
)
from moesim.traces import InputError, LoadTable, Phase, Workload, held_out, load_LE

NODE = load_profile("8xH100-NVLink")
NAMES = ("balanced", "eplb", "predictive-layer")


def make(table=None, batch=64, **options):
    table = make_table(requests=48) if table is None else table
    options = {"gpus": 4, "extra_slots": 0, **options}
    return make_scenario(make_spec(), table, phase=Phase.ENCODER, workload=Workload(batch=batch), **options)


def test_the_parts_share_no_request_and_nothing_is_left_out():
    table = make_table(requests=200, length=4)
    whole = make(table)
    tune_part, confirm_part = three_parts(whole)
    parts = [set(t.request.tolist()) for t in (whole.fit, tune_part.run, confirm_part.run)]
    assert set.union(*parts) == set(range(200)) and sum(map(len, parts)) == 200
    assert [len(part) for part in parts] == [100, 50, 50]
    assert tune_part.fit is whole.fit and confirm_part.fit is whole.fit
    for part in (tune_part, confirm_part):
        assert sum(len(batch.tokens) for batch in part.batches) == len(part.run)


@given(st.integers(0, 1 << 20))
def test_the_second_halving_is_independent_of_the_first(first):
    requests = np.arange(first, first + 4096, dtype=np.int32)
    run_R, confirm_R = held_out(requests), confirmation(requests)
    for half in (run_R, ~run_R):
        assert 0.47 < confirm_R[half].mean() < 0.53


def test_loads_are_divided_by_time():
    table = make_table(requests=40)
    counted = np.stack([load_LE(table.topk_ids[table.request == r], 8) for r in range(40)])
    loads = LoadTable(load=counted, step=np.arange(40, dtype=np.int32), phase=np.zeros(40, np.uint8))
    whole = make(loads)
    tune_part, confirm_part = three_parts(whole)
    assert [*tune_part.batches, *confirm_part.batches] == list(whole.batches)
    found = tune(whole, NODE, candidates(["balanced", "eplb"], [0, 1]))
    assert found.requests["fit"] == 20 and found.winner.confirmed is not None


def test_too_few_requests_are_refused():
    with pytest.raises(InputError, match="too few requests"):
        tune(make(make_table(requests=2)), NODE, candidates(["balanced"], [0]))


def outcome(found):
    return [(t.candidate, t.reason, t.steps, t.speedup, t.moved_bytes, t.memory_bytes) for t in found.trials]


def test_the_choice_never_sees_what_confirms_it():
    table = make_table(requests=48)
    rng = np.random.default_rng(1)
    rows = held_out(table.request) & confirmation(table.request)
    ids = table.topk_ids.copy()
    ids[rows] = rng.integers(0, 8, (rows.sum(), 3, 1))
    scrambled = replace(table, topk_ids=ids)
    choice = candidates(NAMES, [0, 1])
    ours, theirs = (tune(make(one), NODE, choice) for one in (table, scrambled))
    assert ours.winner.candidate == theirs.winner.candidate and ours.ties == theirs.ties
    assert outcome(ours) == outcome(theirs)
    confirmed = [[t.confirmed for t in found.trials if t.confirmed is not None] for found in (ours, theirs)]
    assert confirmed[0] != confirmed[1], "scrambling did reach the confirmation"


def test_equal_inputs_give_equal_outcomes_and_no_clock_decides(monkeypatch):
    choice = candidates(NAMES, [0, 1])
    first = tune(make(), NODE, choice)
    ticks = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(tuning.time, "monotonic", lambda: float(next(ticks)))
    assert outcome(tune(make(), NODE, choice)) == outcome(first)
    cut = tune(make(), NODE, choice, budget_s=2500)
    assert cut.cut_short and sum(trial.steps == 0 for trial in cut.trials) > 0 and cut.winner.confirmed is not None


def test_tuned_speedups_are_simulated_on_the_tuning_requests_alone():
    whole = make()
    found = tune(whole, NODE, candidates(["eplb"], [1]))
    part, confirm = three_parts(whole)
    judge = tuning.Judge(NODE, Execution())
    one = Candidate(policy="eplb", extra_slots=1)
    trial = next(t for t in found.trials if t.candidate == one)
    for scenario, told in ((part, trial.speedup), (confirm, trial.confirmed)):
        base, _ = judge.run(Candidate(policy="contiguous", extra_slots=0), scenario, 99)
        result, _ = judge.run(one, scenario, 99)
        assert told == pytest.approx(base.total_s / result.total_s, rel=1e-12)


def trial_of(policy, step_s, moved=0, memory=1, extra=0):
    candidate = Candidate(policy=policy, extra_slots=extra)
    steps = np.array(step_s, float)
    return Trial(
        candidate=candidate,
        steps=len(steps),
        speedup=10 / steps.sum(),
        step_s=steps,
        moved_bytes=moved,
        memory_bytes=memory,
    )


def test_the_simplest_of_those_within_the_noise_wins():
    slow = trial_of("contiguous", [2.0, 2.1, 1.9, 2.0])
    simple = trial_of("balanced", [1.00, 1.04, 0.97, 1.01])
    busy = trial_of("predictive-layer", [1.01, 0.98, 1.00, 1.00], moved=100)
    winner, ties = choose([slow, busy, simple])
    assert winner is simple and ties == [busy]
    clear = trial_of("predictive-layer", [0.90, 0.93, 0.86, 0.91], moved=100)
    winner, ties = choose([slow, clear, simple])
    assert winner is clear and not ties
    less = trial_of("eplb", [1.00, 1.04, 0.97, 1.01], memory=0)
    assert choose([simple, less])[0] is less


def test_noise_is_twice_the_standard_error_of_paired_steps():
    rng = np.random.default_rng(0)
    common = rng.random(50)
    assert not is_noise(common + 1.01, common + 1.0), "a steady difference counts, however much steps differ"
    assert is_noise(rng.random(50), rng.random(50) + 0.02)
    assert is_noise(np.array([1.0, 1.0]), np.array([1.0, 0.9999]))
    assert not is_noise(np.array([1.0, 1.0]), np.array([1.0, 0.9]))
    assert is_noise(np.ones(4), np.ones(4) * 2), "slower is never faster"


def test_halving_ends_with_all_steps_and_a_few_candidates():
    assert list(tuning._rounds(3, 100)) == [(3, 100)]
    assert list(tuning._rounds(32, 128)) == [(32, 16), (16, 32), (8, 64), (4, 128)]
    assert list(tuning._rounds(32, 40)) == [(32, 20), (16, 40)], "the first steps are enough for a rule to act"
    assert list(tuning._rounds(32, 5)) == [(32, 5)]


def test_candidates_that_are_halved_away_ran_fewer_steps():
    found = tune(make(make_table(requests=300), batch=64), NODE, candidates(NAMES, [0, 1, 2]))
    steps = sorted({trial.steps for trial in found.trials})
    assert len(steps) > 1 and steps[-1] == found.steps["tune"] and found.winner.steps == steps[-1]
    assert all(t.confirmed is None for t in found.trials if t.steps < steps[-1])


def test_constraints_leave_out_what_breaks_them_and_say_why():
    expert = make_spec().expert_bytes("float32")
    most = 3 * (2 + 1) * expert
    found = tune(make(), NODE, candidates(NAMES, [0, 1, 2]), constraints=Constraints(memory_bytes=most))
    for trial in found.trials:
        assert (trial.reason is not None) == (trial.candidate.extra_slots == 2)
        assert trial.reason is None or "GiB a GPU" in trial.reason
    with pytest.raises(InputError, match=r"no candidate runs and keeps the constraints .*steps take up to"):
        tune(make(), NODE, candidates(NAMES, [0]), constraints=Constraints(latency_s=1e-9))
    with pytest.raises(InputError, match="GiB a GPU"):
        tune(make(), NODE, candidates(NAMES, [0]), constraints=Constraints(memory_bytes=0))


def test_what_cannot_run_is_out_with_its_reason():
    found = tune(make(), NODE, candidates(["balanced", "on-demand"], [0, 100]))
    assert any(trial.reason is None for trial in found.trials)
    offload = tune(make(resident=1), NODE, candidates(["eplb", "on-demand"], [0], as_named=True), baseline="on-demand")
    (reason,) = [t.reason for t in offload.trials if t.candidate.policy == "eplb"]
    assert "needs every expert on a GPU" in reason


LOSSY = Execution(copy_dtype="int4")


def test_lossy_ones_win_only_when_allowed_and_measured():
    whole = replace(make(), model_digest="abc")
    choice = candidates(["predictive-layer"], [1])
    other, right = (make_quality(name, copy_dtype="int4") for name in ("eplb", "predictive-layer"))

    def run(**options):
        found = tune(whole, NODE, choice, execution=LOSSY, constraints=Constraints(**options))
        return next(t for t in found.trials if t.candidate == choice[0]), found

    trial, found = run()
    assert trial.reason == "not exact (--allow-lossy)" and found.winner is not trial
    trial, found = run(allow_lossy=True)
    assert "quality has not been measured" in trial.reason and trial.quality == "quality not measured"
    trial, _ = run(allow_lossy=True, qualities=(other,))
    assert trial.reason is not None, "of another policy"
    trial, _ = run(allow_lossy=True, qualities=(right,))
    assert trial.reason is None and "top-1 87.5%" in trial.quality


def test_candidates_change_intervals_and_only_where_there_are_any():
    found = candidates(["eplb", "balanced"], [0, 1])
    assert {c.changes for c in found if c.policy == "eplb"} == {(), *((("interval", n),) for n in (4, 16, 32))}
    assert {c.changes for c in found if c.policy == "balanced"} == {()}
    assert candidates(["eplb", "eplb"], [0], as_named=True) == [Candidate(policy="eplb", extra_slots=0)]
    changed = next(c for c in found if c.changes == (("interval", 4),))
    assert changed.recipe().rule.interval == 4 and recipe("eplb").rule.interval == 8
    assert changed.name == "eplb, interval 4, 0 extra slots"


def test_default_candidates_know_no_future_and_run_on_machines():
    for offload in (False, True):
        names = default_policies(offload=offload)
        assert names and all(not POLICIES[name].clairvoyant for name in names)
        assert all((POLICIES[name].miss is not None) == offload for name in names)
    assert not any(POLICIES[name].simulated_only for name in default_policies(offload=False))
    assert not math.isnan(tune(make(), NODE, candidates(default_policies(offload=False), [1])).winner.speedup)
