"""Forecasts in two parts on two threads: the same as in one, and nothing goes on behind whoever asked."""

import os
import threading

import numba
import numpy as np
import pytest
from weighed_cases import EXPERTS, seen_of, table

from moesim.predictors import PREDICTORS, RouterSpec, halves
from moesim.traces import split_requests


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(halves, "ENOUGH", 4)


def test_many_tokens_are_two_parts_where_there_are_two_threads(two, monkeypatch):
    assert halves.halves(3) == [slice(0, 3)]
    assert halves.halves(7) == [slice(0, 4), slice(4, 7)]
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 1)
    assert halves.halves(7) == [slice(0, 7)]


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [([1, 5, 2], [(0, [1, 5]), (6, [2])]), ([3, 3], [(0, [3]), (3, [3])]), ([9], [(0, [9])]), ([1, 1], [(0, [1, 1])])],
)
def test_requests_are_halved_whole(lengths, parts, two):
    found = halves.halves_of_requests(np.array(lengths))
    assert [(row, length_B.tolist()) for row, length_B in found] == parts


def test_the_first_half_of_requests_may_be_larger(two):
    for share, first in ((0.5, 4), (0.6, 5), (0.75, 6)):
        (_, near_B), (row, far_B) = halves.halves_of_requests(np.full(8, 128), share)
        assert len(near_B) == first and row == first * 128 and len(far_B) == 8 - first


def test_nothing_is_one_part(two):
    ((row, length_B),) = halves.halves_of_requests(np.zeros(0, np.int64))
    assert (row, len(length_B)) == (0, 0)


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
    go_on, gone_on = threading.Event(), threading.Event()
    busy = halves._Half(lambda _: go_on.wait(30) and gone_on.set(), None)
    halves._waiting(os.getpid()).put(busy)
    try:
        assert halves.together(str.upper, "ab") == ["A", "B"]
        with pytest.raises(ZeroDivisionError):
            halves.together(lambda part: 1 // part, [0, 1])
        with pytest.raises(ZeroDivisionError):
            halves.together(lambda part: 1 // part, [1, 0])
        assert not gone_on.is_set()
    finally:
        go_on.set()
    assert gone_on.wait(30), "and what it had to do in between was taken from it"


def asked(predictor, rows, layers):
    """What is said of every layer, from every distance."""
    seen, told = seen_of(rows, 0), []
    for routed in seen_of(rows, layers).routed:
        seen.routed.append(routed)
        told += [predictor.forecast(seen, layer) for layer in range(len(seen.routed), layers)]
    return told


@pytest.mark.parametrize(("name", "layers"), [("ridge", 5), ("neighbours", 5), ("neighbours", 13)])
def test_a_forecast_in_two_parts_is_that_in_one(name, layers, two, monkeypatch):
    fit, run = split_requests(table(layers=layers))
    predictor = PREDICTORS[name]()
    predictor.fit(fit, RouterSpec(num_experts=EXPERTS, top_k=2))
    used = []
    waiting = halves._waiting
    monkeypatch.setattr(halves, "_waiting", lambda process: used.append(process) or waiting(process))
    two_parts = asked(predictor, run, run.num_layers)
    assert used, "in two parts"
    monkeypatch.setattr(halves, "ENOUGH", 1 << 30)
    for mine, one in zip(two_parts, asked(predictor, run, run.num_layers), strict=True):
        assert mine.inclusion == pytest.approx(one.inclusion, abs=1e-5)
        assert mine.load == pytest.approx(one.load, rel=1e-4)
