"""Policies that execute their forecasts, in the simulator: what is computed is the forecast, not the recording."""

from dataclasses import replace

import numpy as np
import pytest

from moesim.predictors import RoutedLayer, RouterSpec, Seen, TokenTableLookup
from moesim.sim.driver import Driver
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.residency import Cluster
from moesim.traces import Phase, StepTokens, TokenTable

E, L, T = 4, 2, 12
CLUSTER = Cluster(layers=L, experts=E, gpus=1, extra_slots=0, resident=2)
RECIPE = replace(POLICIES["on-demand"], predictor="token-table", routing="predicted")


def table(seed=0):
    rng = np.random.default_rng(seed)
    return TokenTable(
        topk_ids=rng.integers(0, E, (T, L, 1)).astype(np.uint8),
        dropped=np.zeros((T, L), np.bool_),
        token_id=rng.integers(0, 3, T).astype(np.int32),
        request=np.zeros(T, np.int32),
        position=np.arange(T, dtype=np.int32),
        step=np.zeros(T, np.int32),
        phase=np.full(T, Phase.ENCODER, np.uint8),
    )


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.setitem(POLICIES, "under test", RECIPE)
    return make_policy("under test", CLUSTER, table())


def tokens():
    t = table(1)
    return StepTokens(request=t.request, position=t.position, token_id=t.token_id)


def executed(policy, routed_seed):
    """[L, T] what the driver lets run, whatever was routed."""
    driver, routed = Driver(policy), table(routed_seed)
    driver.begin_step(tokens())
    found = []
    for layer in range(L):
        driver.routed(RoutedLayer(ids=routed.topk_ids[:, layer]))
        found.append(driver.executed(np.zeros(T, np.bool_)).ids_TK[:, 0].tolist())
        left_GE = np.bincount(found[-1], minlength=E)[None]
        while left_GE.any():
            for move in driver.fetch(left_GE).moves:
                driver.arrived(move)
            left_GE = left_GE - driver.dispatch(left_GE).sum(axis=2)
    driver.end_step()
    return found, driver


def test_the_forecast_runs_and_nothing_depends_on_the_router(policy):
    predictor = TokenTableLookup()
    predictor.fit(table(), RouterSpec(num_experts=E, top_k=1))
    seen = Seen(step=0, tokens=tokens())
    wanted = [predictor.forecast(seen, layer).topk[:, 0].tolist() for layer in range(L)]
    assert executed(policy, 1)[0] == wanted
    assert executed(policy, 2)[0] == wanted


def test_what_ran_is_what_later_layers_and_steps_see(policy):
    found, driver = executed(policy, 1)
    assert driver._past[-1].topk_ids[:, :, 0].T.tolist() == found
    assert driver._foreseen == {}
