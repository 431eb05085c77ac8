"""Re-batching: every token once, whole requests, decode in step, ranks balanced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_table
from moesim.traces import InputError, Phase, assign_ranks, batches, held_out, split_requests


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 200), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_one_batch_and_requests_stay_whole(requests, length, budget, seed):
    table = make_table(requests=requests, length=length, seed=seed)
    steps = batches(table, budget, Phase.ENCODER)
    rows = np.concatenate([step.rows for step in steps])
    assert sorted(rows) == list(range(len(table)))
    for step in steps:
        assert len(step.rows) <= max(budget, length)
        assert len(step.rows) % length == 0
    assert (np.concatenate([step.tokens.token_id for step in steps]) == table.token_id[rows]).all()


def test_decode_steps_hold_one_token_of_each_request_in_flight():
    table = make_table(requests=5, length=4, phase=Phase.DECODE)
    steps = batches(table, 2, Phase.DECODE)
    for step in steps:
        assert len(set(step.tokens.request)) == len(step.rows) <= 2
    for request in range(5):
        order = [
            int(p) for s in steps for p, r in zip(s.tokens.position, s.tokens.request, strict=True) if r == request
        ]
        assert order == [0, 1, 2, 3]
    assert len(steps) == 12  # two at a time: requests 0+1, 2+3, then 4 alone


def test_ranks_hold_whole_requests_and_share_the_tokens():
    request = np.repeat([7, 8, 9, 10], [5, 3, 2, 2]).astype(np.int32)
    assert assign_ranks(request, 2).tolist() == [0] * 5 + [1] * 3 + [1] * 2 + [0] * 2
    assert assign_ranks(request, 1).tolist() == [0] * 12


def test_fit_and_run_share_no_request():
    fit, run = split_requests(make_table(requests=7))
    assert not set(fit.request) & set(run.request)
    assert len(fit) + len(run) == 7 * 32


@pytest.mark.parametrize("texts", [2, 3, 4, 5, 8])
def test_each_half_holds_half_of_every_text_though_texts_come_in_turn(texts):
    request = np.arange(400, dtype=np.int32)
    for text in range(texts):
        assert 0.4 < held_out(request[request % texts == text]).mean() < 0.6
    assert held_out(request[:2]).tolist() == [False, True]


def test_clear_errors():
    with pytest.raises(InputError, match="at least 1, got 0"):
        batches(make_table(), 0, Phase.ENCODER)
    with pytest.raises(InputError, match="no decode tokens"):
        batches(make_table(), 8, Phase.DECODE)
