"""Forecasts in two parts on two threads: the same as in one, and nothing goes on behind whoever asked."""

import os
import threading

import numba
import numpy as np
import pytest
from weighed_cases import EXPERTS, seen_of, table

from helpers import make_table, with_router_inputs
from moesim.predictors import PREDICTORS, RouterSpec, halves
from moesim.predictors.learned.gate_attention import GateAttention
from moesim.predictors.learned.training import Training
from moesim.traces import split_requests


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(halves, "ENOUGH", 4)


def parts(tokens, end_B=None):
    return [(rows.start, rows.stop) for rows in halves.halves(tokens, None if end_B is None else np.array(end_B))]


def test_many_tokens_are_two_parts_of_whole_requests(two):
    assert parts(3) == [(0, 3)] and parts(7) == [(0, 3), (3, 7)]
    assert parts(10, [2, 6, 10]) == [(0, 6), (6, 10)]
    assert parts(10, [10]) == [(0, 10)], "nothing to part"


def test_one_thread_is_one_part(two, monkeypatch):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 1)
    assert parts(7) == [(0, 7)]


def test_two_parts_are_worked_on_at_once_in_their_order():
    both = threading.Barrier(2, timeout=30)
    assert halves.together(lambda part: (both.wait() >= 0, part), "ab") == [(True, "a"), (True, "b")]


@pytest.mark.parametrize("bad", "ab")
def test_an_error_waits_for_the_other_part(bad):
    both, ended = threading.Barrier(2, timeout=30), []

    def work(part):
        both.wait()
        if part == bad:
            raise ValueError(part)
        ended.append(part)

    with pytest.raises(ValueError, match=bad):
        halves.together(work, "ab")
    assert ended == [part for part in "ab" if part != bad]


def test_nobody_waits_for_a_thread_that_has_not_begun():
    go_on = threading.Event()
    busy = halves._helper(os.getpid()).submit(go_on.wait, 30)
    try:
        assert halves.together(str.upper, "ab") == ["A", "B"]
        with pytest.raises(ZeroDivisionError):
            halves.together(lambda part: 1 // part, [0, 1])
        assert not busy.done()
    finally:
        go_on.set()
    assert busy.result(), "and what it had to do in between was taken from it"


def asked(predictor, rows, layers):
    """What is said of every layer and distance, and how many parts it was worked out in."""
    seen, told = seen_of(rows, 0), []
    for routed in seen_of(rows, layers).routed:
        seen.routed.append(routed)
        told += [predictor.forecast(seen, layer) for layer in range(len(seen.routed), layers)]
    return told


@pytest.mark.parametrize("name", ["ridge", "neighbours", "gate-attention"])
def test_a_forecast_in_two_parts_is_that_in_one(name, two, monkeypatch):
    if name == "gate-attention":
        rows, gates = with_router_inputs(make_table(requests=30, length=12, layers=4, top_k=1, noise=0.1))
        router = RouterSpec(num_experts=8, top_k=1, gates=gates)
        predictor = GateAttention(training=Training(epochs=1, batch_tokens=128, learning_rate=1e-2, seed=0))
    else:
        rows, router, predictor = table(), RouterSpec(num_experts=EXPERTS, top_k=2), PREDICTORS[name]()
    fit, run = split_requests(rows)
    predictor.fit(fit, router)
    used = []
    helper = halves._helper
    monkeypatch.setattr(halves, "_helper", lambda process: used.append(process) or helper(process))
    two_parts = asked(predictor, run, run.num_layers)
    assert used, "in two parts"
    monkeypatch.setattr(halves, "ENOUGH", 1 << 30)
    for mine, one in zip(two_parts, asked(predictor, run, run.num_layers), strict=True):
        assert mine.inclusion == pytest.approx(one.inclusion, abs=1e-5)
        assert mine.load == pytest.approx(one.load, rel=1e-4)
