"""Warm-up, padding and empty rows: found whatever the parts of the stream, and nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_table
from moesim.traces import LoadTable, concat, concat_loads
from moesim.traces.cleaning import RUN, Cleaner
from moesim.traces.tokens import TokenTable


def without_token_ids(table):
    return TokenTable(**{**table.arrays(), "token_id": None})


def constant(length, experts, *, layers=3, top_k=2, request=99):
    """Tokens that all choose the same experts."""
    table = make_table(requests=1, length=length, top_k=top_k, layers=layers)
    ids = np.broadcast_to(np.array(experts, np.uint8), table.topk_ids.shape).copy()
    changes = {"topk_ids": ids, "token_id": np.zeros(length, np.int32), "request": np.full(length, request, np.int32)}
    return TokenTable(**{**table.arrays(), **changes})


def parts_of(table, size):
    return iter([table.take(slice(i, i + size)) for i in range(0, len(table), size)])


def clean(table, size=1000, top_k=2, **options):
    cleaner = Cleaner(top_k, **options)
    return list(cleaner.clean(parts_of(table, size))), cleaner.found


TRAFFIC = make_table(requests=4, length=40, top_k=2, noise=0.5)


@pytest.mark.parametrize("known", [True, False])
@given(
    before=st.lists(st.integers(RUN, 40), max_size=3),
    after=st.lists(st.integers(RUN, 40), max_size=3),
    size=st.integers(1, 90),
)
@settings(max_examples=60, deadline=None)
def test_runs_are_found_wherever_the_stream_is_cut(known, before, after, size):
    def runs(lengths):
        return [constant(n, [i % 7, i % 7 + 1]) for i, n in enumerate(lengths)]

    whole = concat([*runs(before), TRAFFIC, *runs(after)])
    wanted = TRAFFIC
    if not known:
        whole, wanted = without_token_ids(whole), without_token_ids(wanted)
    left, found = clean(whole, size)
    assert concat(left).topk_ids.tolist() == wanted.topk_ids.tolist()
    assert concat(left).request.tolist() == wanted.request.tolist()
    assert (found.rows, found.warmup, found.padding) == (len(whole), sum(before), sum(after))
    assert found.left == len(TRAFFIC)


def test_a_short_run_is_traffic():
    whole = concat([TRAFFIC, constant(RUN - 1, [3, 4])])
    for size in (1, 7, len(whole)):
        left, found = clean(whole, size)
        assert len(concat(left)) == len(whole) and found.warmup == found.padding == 0


def test_equal_choices_of_different_tokens_are_traffic():
    run = constant(50, [3, 4])
    different = TokenTable(**{**run.arrays(), "token_id": np.arange(50, dtype=np.int32)})
    assert clean(different)[1].left == 50
    # Without token ids, two layers of top-1 prove nothing, three of top-2 do.
    thin = without_token_ids(constant(50, [3], layers=2, top_k=1))
    assert clean(thin, top_k=1)[1].left == 50
    assert clean(without_token_ids(run))[1].left == 0


def test_one_expert_twice_is_padding():
    padding = constant(3, [0, 0])
    left, found = clean(concat([TRAFFIC.take(slice(20)), padding, TRAFFIC.take(slice(20, None))]))
    assert found.padding == 3 and len(concat(left)) == len(TRAFFIC)


def test_everything_is_kept_where_asked_and_still_counted():
    whole = concat([constant(20, [1, 2]), TRAFFIC])
    left, found = clean(whole, 13, keep=True)
    assert len(concat(left)) == len(whole) == found.left
    told = found.to_dict()
    assert told["found"] == {"warmup": 20, "padding": 0, "empty": 0} and told["dropped"] == ["empty"]
    assert told["shares"]["warmup"] == pytest.approx(20 / 180)


def loads(rows):
    return LoadTable(
        load=np.array(rows, np.int64)[:, None].repeat(2, axis=1),
        step=np.arange(len(rows), dtype=np.int32),
        phase=np.ones(len(rows), np.uint8),
    )


@pytest.mark.parametrize("size", [1, 2, 10])
def test_loads_of_equal_tokens_and_empty_rows(size):
    equal, few, traffic, empty = [0, 64, 64, 0], [0, 8, 8, 0], [40, 30, 20, 10], [0, 0, 0, 0]
    left, found = clean(loads([equal, empty, traffic, equal, few, empty]), size)
    assert concat_loads(left).load[:, 0].tolist() == [traffic, few]
    assert (found.warmup, found.padding, found.empty, found.left) == (1, 1, 2, 2)
