"""Re-batching: every token once, whole requests, decode in step, ranks balanced; splits that share no request."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_table
from moesim.traces import (
    InputError,
    LoadTable,
    Phase,
    TokenTable,
    Workload,
    assign_ranks,
    batches,
    held_out,
    load_LE,
    merge_steps,
    split_loads,
    split_requests,
    total_load_LE,
)
from moesim.traces.expand import tokens_of_loads


def make_loads(rows=6, layers=2, experts=8, tokens=10, top_k=2, seed=0):
    """Loads that a top-k router can have produced."""
    rng = np.random.default_rng(seed)
    ids = rng.random((rows, tokens, layers, experts)).argsort(axis=3)[..., :top_k]
    load = np.stack([load_LE(step, experts) for step in ids])
    return LoadTable(load=load, step=np.arange(rows, dtype=np.int32), phase=np.full(rows, 1, np.uint8))


workloads = st.builds(
    Workload,
    batch=st.integers(1, 200),
    unit=st.sampled_from(["tokens", "requests", "recorded"]),
    shuffle=st.none() | st.integers(0, 5),
)


@given(st.integers(1, 20), st.integers(1, 20), workloads, st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_every_token_is_in_one_batch_and_requests_stay_whole(requests, length, workload, seed):
    table = make_table(requests=requests, length=length, seed=seed)
    steps = batches(table, workload, Phase.ENCODER)
    rows = np.concatenate([step.rows for step in steps])
    assert sorted(rows) == list(range(len(table)))
    most = {"tokens": max(workload.batch, length), "requests": workload.batch * length, "recorded": len(table)}
    for step in steps:
        assert len(step.rows) <= most[workload.unit]
        assert len(step.rows) % length == 0
    assert (np.concatenate([step.tokens.token_id for step in steps]) == table.token_id[rows]).all()


def test_batches_by_tokens_by_requests_and_as_recorded():
    table = make_table(requests=6, length=4)
    table = TokenTable(**{**table.arrays(), "step": table.request // 4})

    def sizes(**workload):
        return [len(step.rows) for step in batches(table, Workload(**workload), Phase.ENCODER)]

    assert sizes(batch=11) == [8, 8, 8]
    assert sizes(batch=5, unit="requests") == [20, 4]
    assert sizes(batch=1, unit="recorded") == [16, 8]


def test_a_shuffle_is_seeded_and_changes_the_order_only():
    table = make_table(requests=30, length=2)

    def order(seed):
        steps = batches(table, Workload(batch=2, shuffle=seed), Phase.ENCODER)
        return [int(step.tokens.request[0]) for step in steps]

    assert order(None) == list(range(30))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(30))


def test_decode_steps_hold_one_token_of_each_request_in_flight():
    table = make_table(requests=5, length=4, phase=Phase.DECODE)
    steps = batches(table, Workload(batch=2), Phase.DECODE)
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


TEXTS = ["law", "code", "law", "chat", "code", "law", "law"]


@pytest.mark.parametrize(
    ("split", "run"),
    [
        ("alternate", {1, 3, 5}),
        ("time", {4, 5, 6}),
        ("dataset:law", {0, 2, 5, 6}),
        ("request", {r for r in range(7) if held_out(np.array([r], np.int32))[0]}),
    ],
)
def test_splits_share_no_request(split, run):
    table = make_table(requests=7)
    fitted, executed = split_requests(table, split, TEXTS)
    assert set(executed.request.tolist()) == run
    assert set(fitted.request.tolist()) == set(range(7)) - run
    assert len(fitted) + len(executed) == len(table)


def test_time_is_the_order_of_arrival_not_of_numbers():
    table = make_table(requests=4, length=2).take(np.array([6, 7, 4, 5, 2, 3, 0, 1]))
    assert set(split_requests(table, "time")[1].request.tolist()) == {0, 1}


@pytest.mark.parametrize("texts", [2, 3, 4, 5, 8])
def test_each_half_holds_half_of_every_text_though_texts_come_in_turn(texts):
    request = np.arange(400, dtype=np.int32)
    for text in range(texts):
        assert 0.4 < held_out(request[request % texts == text]).mean() < 0.6
    assert held_out(request[:2]).tolist() == [False, True]


def test_clear_errors():
    with pytest.raises(InputError, match="at least 1 of its tokens, got 0"):
        Workload(batch=0)
    with pytest.raises(InputError, match="seed of a shuffle must not be negative"):
        Workload(shuffle=-1)
    with pytest.raises(InputError, match="unknown split 'odd'; known: request, alternate, time, dataset:NAME"):
        Workload(split="odd")
    with pytest.raises(InputError, match="no decode tokens"):
        batches(make_table(), Workload(batch=8), Phase.DECODE)
    with pytest.raises(InputError, match="no request comes from data set 'sql'; known: chat, code, law"):
        split_requests(make_table(requests=7), "dataset:sql", TEXTS)
    with pytest.raises(InputError, match="leaves nothing to fit on"):
        split_requests(make_table(requests=2), "dataset:law", ["law", "law"])
    with pytest.raises(InputError, match="split 'alternate' needs requests"):
        split_loads(make_loads(), "alternate")
    with pytest.raises(InputError, match="has 1 row of loads"):
        split_loads(make_loads(rows=1), "time")
    with pytest.raises(InputError, match="knows no requests"):
        merge_steps(make_loads(), Workload(unit="requests"), 2)


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_drawn_tokens_reproduce_every_load_and_repeat_no_expert(rows, top_k, tokens, seed):
    loads = make_loads(rows=rows, top_k=top_k, tokens=tokens, seed=seed)
    table = tokens_of_loads(loads, top_k)
    assert (total_load_LE(table, 8) == total_load_LE(loads, 8)).all()
    for step in range(rows):
        assert (load_LE(table.topk_ids[table.step == step], 8) == loads.load[step]).all()
    ordered = np.sort(table.topk_ids, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all()
    assert (tokens_of_loads(loads, top_k).topk_ids == table.topk_ids).all()


def test_loads_that_no_top_k_router_can_produce_are_refused():
    loads = make_loads(top_k=2)
    with pytest.raises(InputError, match="cannot come from top-3 routing"):
        tokens_of_loads(loads, 3)
    uneven = LoadTable(load=loads.load + np.eye(8, dtype=int)[0], step=loads.step, phase=loads.phase)
    with pytest.raises(InputError, match="row 0 of the loads cannot come from top-2"):
        tokens_of_loads(uneven, 2)
    huge = LoadTable(load=loads.load * 2**40, step=loads.step, phase=loads.phase)
    with pytest.raises(InputError, match=r"more than the 536,870,912 that are drawn at once"):
        tokens_of_loads(huge, 2)


@given(st.integers(1, 40), st.none() | st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_merged_rows_keep_their_sum_and_the_batch(batch, shuffle):
    loads = make_loads(rows=7, tokens=10, top_k=2)
    merged = merge_steps(loads, Workload(batch=batch, shuffle=shuffle), 2)
    assert (total_load_LE(merged, 8) == total_load_LE(loads, 8)).all()
    assert (merged.load.sum(axis=2) // 2 <= max(batch, 10)).all()
    assert len(merge_steps(loads, Workload(unit="recorded"), 2)) == 7
