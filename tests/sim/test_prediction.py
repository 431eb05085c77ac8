"""Studies of predictors: who is fitted on what, and that nobody is scored on it."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import make_spec, make_table, with_router_inputs
from moesim.predictors import PREDICTORS
from moesim.sim.prediction import Learning, able, fit, make_folds, mean_of, score
from moesim.traces import InputError, Phase, Workload
from moesim.traces.store import Trace
from moesim.traces.writer import TraceWriter


def write(path, *, requests=40, seed=0, texts=("a", "b"), full=False, layers=3):
    table = make_table(requests=requests, length=8, layers=layers, seed=seed)
    gates = None
    if full:
        table, own = with_router_inputs(table)
        gates = {"encoder": own}
    with TraceWriter(path, make_spec(layers), {}, gates=gates) as writer:
        writer.add_requests([texts[i % len(texts)] for i in range(requests)])
        writer.append("encoder", table)
    return Trace.open(path)


def folds(trace, split="request", **options):
    workload = Workload(batch=32)
    return make_folds(trace, phase=Phase.ENCODER, gpus=2, workload=workload, split=split, **options)


@pytest.mark.parametrize("split", ["request", "alternate", "time", "dataset:a", "dataset"])
def test_nobody_is_scored_on_what_was_fitted(tmp_path, split):
    for fold in folds(write(tmp_path / "x.moetrace"), split):
        assert not set(fold.fit.request.tolist()) & set(fold.scenario.run.request.tolist())


def test_every_data_set_is_held_out_in_turn(tmp_path):
    trace = write(tmp_path / "x.moetrace")
    one, other = folds(trace, "dataset")
    assert [fold.split for fold in (one, other)] == ["dataset:a", "dataset:b"]
    assert set(one.scenario.run.request.tolist()) == set(other.fit.request.tolist())
    with pytest.raises(InputError, match="holds one data set"):
        folds(write(tmp_path / "y.moetrace", texts=("a",)), "dataset")


def test_fitted_on_other_recordings_only(tmp_path):
    trace, other = write(tmp_path / "x.moetrace"), write(tmp_path / "y.moetrace", seed=1)
    (alone,) = folds(trace)
    (elsewhere,) = folds(trace, fit_on=[other])
    (both,) = folds(trace, fit_on=[trace, other])
    assert not np.array_equal(elsewhere.fit.topk_ids, alone.fit.topk_ids)
    assert len(both.fit) == len(alone.fit) + len(elsewhere.fit)
    assert len(np.unique(both.fit.request)) == len(np.unique(alone.fit.request)) + len(np.unique(elsewhere.fit.request))
    assert np.array_equal(both.scenario.run.topk_ids, alone.scenario.run.topk_ids)


def test_columns_that_one_recording_lacks_are_left_out(tmp_path):
    trace, other = write(tmp_path / "x.moetrace", full=True), write(tmp_path / "y.moetrace")
    (fold,) = folds(trace, fit_on=[trace, other])
    assert fold.fit.router_input is None and fold.fit.token_id is not None


def test_another_router_is_refused(tmp_path):
    trace, other = write(tmp_path / "x.moetrace"), write(tmp_path / "y.moetrace", layers=2)
    with pytest.raises(InputError, match=r"y\.moetrace: not the router"):
        folds(trace, fit_on=[other])


def test_who_is_able_depends_on_the_recording(tmp_path):
    (bare,), (full,) = folds(write(tmp_path / "x.moetrace")), folds(write(tmp_path / "y.moetrace", full=True))
    can, why = able(["markov", "cross-gate", "gate"], bare)
    assert can == ["markov"] and "--lookahead" in why["cross-gate"] and "--router-input" in why["gate"]
    assert able(list(PREDICTORS), full) == (list(PREDICTORS), {})


def test_a_report_holds_costs_and_means(tmp_path):
    reports = []
    for fold in folds(write(tmp_path / "x.moetrace"), "dataset"):
        fitted = {name: fit(name, fold, Learning()) for name in ("frequency", "markov", "window")}
        reports.append(score(fold, fitted, horizons=(1,), extra_slots=(1,)))
    mean = mean_of(reports)
    assert mean["split"] == "dataset:a, dataset:b"
    assert mean["predictors"]["markov"]["parameters"] == 2 * 64
    recalls = [one["predictors"]["markov"]["horizons"]["1"]["recall_at_1"] for one in reports]
    assert mean["predictors"]["markov"]["horizons"]["1"]["recall_at_1"] == pytest.approx(np.mean(recalls))
    assert mean["predictors"]["window"]["horizons"]["1"]["recall_at_1"] is None


def test_trained_predictors_are_saved_loaded_and_not_trained_again(tmp_path):
    (fold,) = folds(write(tmp_path / "x.moetrace"))
    told = []
    learning = Learning(epochs=1, checkpoints=tmp_path / "c", save=tmp_path / "s")
    first = fit("gru", fold, learning, lambda *what: told.append(what))
    assert told and told[-1][0] == "gru" and told[-1][1] == told[-1][2]
    told.clear()
    again = fit("gru", fold, replace(learning, save=None), lambda *what: told.append(what))
    assert not told, "the finished training was repeated"
    loaded = fit("gru", fold, Learning(load=tmp_path / "s"))
    assert loaded.seconds == 0.0
    reports = [score(fold, {"gru": one}, horizons=(1,), extra_slots=(1,)) for one in (first, again, loaded)]
    recalls = {one["predictors"]["gru"]["horizons"]["1"]["recall_at_1"] for one in reports}
    assert len(recalls) == 1
