"""Tokens of finished steps become units: they are found, the oldest make room, and forecasts get better."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from weighed_cases import EXPERTS, pairs, recall, seen_of, table, told

from moesim.predictors import RouterSpec, neighbours_online
from moesim.predictors.neighbours_fit import MEASURED, NEIGHBOURS
from moesim.predictors.neighbours_kernels import followed, settled
from moesim.predictors.neighbours_online import OnlineNeighbours
from moesim.traces import concat, split_requests


def fitted(rows):
    predictor = OnlineNeighbours()
    predictor.fit(rows, RouterSpec(num_experts=EXPERTS, top_k=rows.topk_ids.shape[2]))
    return predictor


def observed(predictor, rows):
    predictor.observe(seen_of(rows, rows.num_layers))


def of_half(rows, first):
    """`pairs` of which the second is `first` to `first` + 3 after the first: of each expert half of the pairs."""
    ids = rows.topk_ids.copy()
    ids[:, 1] = (ids[:, 0] + first + ids[:, 1] % 4) % EXPERTS
    ids[:, 2] = (ids[:, 0] + ids[:, 1]) % EXPERTS
    return replace(rows, topk_ids=ids)


def test_what_the_fit_never_saw_is_learned_from_finished_steps():
    early, late = split_requests(of_half(pairs(120, seed=1), 4))
    predictor = fitted(of_half(pairs(60), 0))
    assert recall(predictor, late, 2) < 0.3
    observed(predictor, early)
    assert recall(predictor, late, 2) > 0.5


def test_an_observed_token_is_its_own_nearest_unit_when_it_comes_again():
    fit, run = split_requests(table())
    predictor = fitted(fit)
    units = len(fit)
    observed(predictor, run)
    seen = seen_of(replace(run, request=run.request + 1000), 3)
    predictor.forecast(seen, 3)
    state = seen.memo["neighbours-online"].parts[0]
    nearest_T = np.take_along_axis(state.found_2TN[0], state.far_2TN[0].argmin(axis=1)[:, None], axis=1)[:, 0]
    assert ((nearest_T >= units) & (state.far_2TN[0].min(axis=1) < 10)).mean() > 0.9


def test_the_oldest_make_room(monkeypatch):
    monkeypatch.setattr(neighbours_online, "ROOM", 100)
    fit, run = split_requests(table())
    predictor, same = fitted(fit), fitted(fit)
    few, many = run.take(slice(0, 36)), concat([run, replace(run, request=run.request + 1000)])
    assert len(many) > 100 > 2 * len(few)
    for _ in range(2):
        observed(predictor, few)
    assert (predictor.units[0].residual_DUE[0, len(fit) : len(fit) + 72] != 0).any(axis=1).all()
    assert not predictor.units[0].residual_DUE[0, len(fit) + 72 :].any(), "no more than came"
    observed(predictor, many)
    observed(same, many.take(slice(len(many) - 100, len(many))))
    for mine, other in zip(predictor.units, same.units, strict=True):
        rows, others = (np.sort(units.residual_DUE[0, len(fit) :], axis=0) for units in (mine, other))
        assert np.abs(rows.astype(int) - others).mean() < 3, "the last hundred, whatever was there before"


def test_fitted_units_and_copies_stay_as_they_are():
    fit, run = split_requests(table())
    predictor = fitted(fit)
    copy = deepcopy(predictor)
    said = told(copy, run, 2).inclusion
    kept = [units.residual_DUE[:, : len(fit)].copy() for units in predictor.units]
    observed(predictor, run)
    assert np.array_equal(told(copy, run, 2).inclusion, said)
    assert not np.array_equal(told(predictor, run, 2).inclusion, said)
    assert all(
        np.array_equal(units.residual_DUE[:, : len(fit)], was) for units, was in zip(predictor.units, kept, strict=True)
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_are_enough(layers):
    rows = table(layers=layers)
    predictor = fitted(rows)
    observed(predictor, rows)
    assert told(predictor, rows, layers - 1).load.sum() == pytest.approx(2 * len(rows), rel=1e-4)


def test_who_settles_is_found_along_the_graph():
    rng = np.random.default_rng(0)
    unit_UQ = np.zeros((80, MEASURED), np.int8)
    unit_UQ[:60] = rng.integers(-60, 60, (60, MEASURED))
    far_UU = np.square(unit_UQ[:60, None].astype(int) - unit_UQ[None, :60]).sum(axis=2)
    near_UN = np.zeros((80, 8), np.int32)
    near_UN[:60] = np.argsort(far_UU, axis=1)[:, 1:9]
    z_TQ = (unit_UQ[:20] + rng.integers(-3, 4, (20, MEASURED))).astype(np.int16)
    far_TU = np.square(z_TQ[:, None].astype(int) - unit_UQ[None, :60]).sum(axis=2)
    found_TK = np.argsort(far_TU, axis=1)[:, :NEIGHBOURS].astype(np.int32)
    far_TK = np.take_along_axis(far_TU, found_TK.astype(int), axis=1).astype(np.int32)
    settled(np.arange(60, 80), z_TQ, found_TK, far_TK, unit_UQ, near_UN)
    assert np.array_equal(unit_UQ[60:], z_TQ)
    assert np.array_equal(near_UN[60:], found_TK[:, :8]), "the nearest first"
    assert all(60 + t in near_UN[t] for t in range(20)), "and they are their neighbours' neighbours"
    followed(near_UN, z_TQ, unit_UQ, found_TK, far_TK, 1)
    assert (far_TK.min(axis=1) == 0).all()
