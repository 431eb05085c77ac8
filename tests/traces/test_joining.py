"""Traces one after the other: numbered on, told apart, refused where the routers differ."""

import numpy as np
import pytest

from helpers import make_spec, make_table
from moesim.traces import InputError, LoadTable, TokenTable, split_requests
from moesim.traces.joining import concat_traces
from moesim.traces.store import Trace
from moesim.traces.writer import TraceWriter


def written(path, table, *, texts=(), kind="tokens", about=None, **spec):
    with TraceWriter(path, make_spec(**spec), about or {}, kind=kind, shard_tokens=50) as writer:
        writer.add_requests(list(texts))
        writer.append("encoder", table)
    return path


def test_requests_and_steps_are_numbered_on_and_the_parts_can_be_told_apart(tmp_path):
    first, second = make_table(requests=3, length=40), make_table(requests=2, length=40, seed=1)
    law = written(tmp_path / "law.moetrace", first, texts=["statutes", "cases", "cases"])
    code = written(tmp_path / "code.moetrace", second)
    joined, left_out = concat_traces([law, code], tmp_path / "both.moetrace")
    assert list(joined.verify()) and left_out == []
    assert joined.request_texts == ("statutes", "cases", "cases", "code", "code")
    table = joined.table("encoder")
    assert (table.topk_ids == np.concatenate([first.topk_ids, second.topk_ids])).all()
    assert (table.request == np.concatenate([first.request, second.request + 3])).all()
    assert set(table.step[:120].tolist()) == {0} and set(table.step[120:].tolist()) == {1}
    fit, run = split_requests(table, "dataset:code", joined.request_texts)
    assert set(run.request.tolist()) == {3, 4} and len(fit) == 120


def test_columns_that_one_trace_lacks_are_left_out(tmp_path):
    table = make_table(requests=1)
    bare = TokenTable(**{**table.arrays(), "topk_weights": None, "token_id": None})
    paths = [written(tmp_path / "a.moetrace", table), written(tmp_path / "b.moetrace", bare)]
    joined, left_out = concat_traces(paths, tmp_path / "c.moetrace")
    assert left_out == ["topk_weights", "token_id"]
    assert joined.table("encoder").topk_weights is None and len(joined.table("encoder")) == 64


def test_loads_can_be_joined_and_synthetic_parts_stay_labelled(tmp_path):
    rows = LoadTable(load=np.ones((4, 3, 8), np.int64), step=np.arange(4, dtype=np.int32), phase=np.zeros(4, np.uint8))
    paths = [
        written(tmp_path / f"{i}.moetrace", rows, kind="loads", about={"synthetic": True} if i else {}) for i in (0, 1)
    ]
    joined, _ = concat_traces(paths, tmp_path / "c.moetrace")
    assert joined.loads("encoder").step.tolist() == list(range(8))
    assert joined.provenance["synthetic"] is True


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"experts": 16}, "its num_experts is 16, that of .*a.moetrace 8"),
        ({"layers": 2}, r"its stacks is \[\('encoder', 2\)\]"),
        ({"vocab_size": 77}, "its vocab_size is 77"),
    ],
)
def test_different_routers_are_not_joined(tmp_path, other, message):
    shape = {name: other[name] for name in ("experts", "layers") if name in other}
    a = written(tmp_path / "a.moetrace", make_table(requests=1))
    b = written(tmp_path / "b.moetrace", make_table(requests=1, **shape), **other)
    with pytest.raises(InputError, match=message):
        concat_traces([a, b], tmp_path / "c.moetrace")
    assert not (tmp_path / "c.moetrace").exists()


def test_kinds_are_not_mixed(tmp_path):
    rows = LoadTable(load=np.ones((4, 3, 8), np.int64), step=np.arange(4, dtype=np.int32), phase=np.zeros(4, np.uint8))
    a = written(tmp_path / "a.moetrace", make_table(requests=1))
    b = written(tmp_path / "b.moetrace", rows, kind="loads")
    with pytest.raises(InputError, match=r"b.moetrace holds loads and .*a.moetrace tokens"):
        concat_traces([a, b], tmp_path / "c.moetrace")


def test_a_joined_trace_does_not_replace_another_unasked(tmp_path):
    a = written(tmp_path / "a.moetrace", make_table(requests=1))
    with pytest.raises(InputError, match="exists already"):
        concat_traces([a, a], a)
    assert len(Trace.open(a).table("encoder")) == 32
