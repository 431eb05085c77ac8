"""What every counting and gate-reading predictor's forecast must be, on random recordings."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_table
from moesim.predictors import PREDICTORS, PastStep, RouterSpec, Seen, routed_layer
from moesim.traces import Gates, step_tokens

LOADS_ONLY = ("ema", "distribution")
NAMES = [
    *LOADS_ONLY,
    *("frequency", "markov", "token-table", "previous-token", "markov-2", "path", "nearest-matrix"),
    *("cross-gate", "cross-gate-over", "stacked-gate", "draft-gate", "mixture"),
]


@st.composite
def recordings(draw):
    """(recording with everything that there can be, its routers, E, K); ids as random as they come."""
    E = draw(st.integers(2, 9))
    K = draw(st.integers(1, min(3, E)))
    requests, length, L = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    table = make_table(requests=requests, length=length, layers=L, experts=E, top_k=K)
    skewed = rng.gumbel(size=(len(table), L, E)) + rng.normal(size=E) * draw(st.sampled_from([0, 1, 4]))
    width = draw(st.integers(K, E))
    table = replace(
        table,
        topk_ids=np.argsort(-skewed, axis=2)[:, :, :K].astype(np.uint8),
        topk_weights=rng.random((len(table), L, K)).astype(np.float16),
        lookahead_ids=rng.permuted(np.tile(np.arange(E, dtype=np.uint8), (len(table), L, 2, 1)), axis=3)[..., :width],
        router_input=rng.normal(size=(len(table), L, 3)).astype(np.float16),
    )
    weight = rng.normal(size=(L, E, 3)).astype(np.float32)
    gates = Gates(weight=weight, bias=np.zeros((L, E), np.float32))
    return table, RouterSpec(num_experts=E, top_k=K, gates=gates)


@st.composite
def situations(draw):
    """(fitted recording, routers, what is seen, layer, queued): of another recording with the same routers."""
    table, router = draw(recordings())
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    rows = rng.permutation(len(table))
    run = table.take(rows[: draw(st.integers(1, len(rows)))])
    tokens = step_tokens(run, np.arange(len(run)))
    point = draw(st.integers(0, table.num_layers))
    layer = draw(st.integers(0, table.num_layers - 1))
    seen = Seen(step=1, tokens=tokens, queued=tokens, routed=[routed_layer(run, i) for i in range(point)])
    if draw(st.booleans()):
        before = replace(tokens, position=tokens.position - 1)
        seen.past.append(PastStep(tokens=before, topk_ids=run.topk_ids))
    return table, router, seen, layer, draw(st.booleans())


def made(name, table, router):
    predictor = PREDICTORS[name]()
    predictor.fit(table, router)
    return predictor


@pytest.mark.parametrize("name", NAMES)
@given(situation=situations())
@settings(max_examples=60, deadline=None)
def test_a_forecast_gives_every_token_its_experts(name, situation):
    table, router, seen, layer, queued = situation
    T, E, K = len(seen.tokens), router.num_experts, router.top_k
    predictor = made(name, table, router)
    forecast = predictor.forecast(seen, layer, queued=queued)
    assert forecast.load.shape == (E,) and (forecast.load >= 0).all()
    assert forecast.load.sum() == pytest.approx(T * K)
    assert predictor.cost().flops >= 0 and predictor.cost().parameters >= 0
    if name in LOADS_ONLY:
        assert forecast.topk is None and forecast.inclusion is None
        return
    inclusion = forecast.inclusion
    assert inclusion.shape == (T, E) and inclusion.sum(axis=1) == pytest.approx(K, rel=1e-4)
    assert (inclusion >= 0).all() and (inclusion <= 1 + 1e-6).all()
    assert forecast.load == pytest.approx(inclusion.sum(axis=0), rel=1e-4, abs=1e-4)
    assert forecast.topk.shape[0] == T and forecast.topk.shape[1] >= K
    assert ((forecast.topk >= 0) & (forecast.topk < E)).all()
    assert all(len(set(row)) == len(row) for row in forecast.topk.tolist())


@pytest.mark.parametrize("name", NAMES)
@given(situation=situations())
@settings(max_examples=10, deadline=None)
def test_a_forecast_is_the_same_every_time(name, situation):
    table, router, seen, layer, queued = situation
    predictor = made(name, table, router)
    one = predictor.forecast(seen, layer, queued=queued)
    seen.memo.clear()
    for two in (
        predictor.forecast(seen, layer, queued=queued),
        made(name, table, router).forecast(seen, layer, queued=queued),
    ):
        assert one.load.tolist() == two.load.tolist()
        assert one.topk is None or one.topk.tolist() == two.topk.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_worked_out_early_does_not_change_what_is_said_later(name):
    """Asked at every decision point or at the last only, a predictor says the same."""
    table = make_table(requests=10, layers=4, experts=8, top_k=2)
    rng = np.random.default_rng(0)
    wide = np.tile(np.arange(8, dtype=np.uint8), (len(table), 4, 2, 1))
    table = replace(
        table,
        lookahead_ids=rng.permuted(wide, axis=3)[..., :4],
        router_input=rng.normal(size=(len(table), 4, 3)).astype(np.float16),
    )
    gates = Gates(weight=rng.normal(size=(4, 8, 3)).astype(np.float32), bias=np.zeros((4, 8), np.float32))
    predictor = made(name, table, RouterSpec(num_experts=8, top_k=2, gates=gates))
    tokens = step_tokens(table, np.arange(64))
    often, once = Seen(step=0, tokens=tokens), Seen(step=0, tokens=tokens)
    for point in range(4):
        told = [predictor.forecast(often, layer) for layer in range(point, 4)][-1]
        for seen in (often, once):
            seen.routed.append(routed_layer(table, point, slice(0, 64)))
    once.routed.pop()
    assert told.load.tolist() == predictor.forecast(once, 3).load.tolist()
