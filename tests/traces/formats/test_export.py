"""Export then import is the identity where the format can carry it; what it cannot carry is refused."""

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_spec, make_table
from moesim.traces import InputError, LoadTable, MoesimError, Phase, StackSpec, TokenTable, load_LE
from moesim.traces.formats import FORMATS, ImportOptions, recognise
from moesim.traces.importing import import_recording
from moesim.traces.store import Trace
from moesim.traces.writer import TraceWriter

STACK = StackSpec(name="decoder", num_layers=5, moe_layers=(1, 2, 4))
WRITABLE = [name for name, known in FORMATS.items() if known.write]
OF_TOKENS = ("vllm", "npz", "jsonl")
OF_LOADS = {"sglang": True, "vllm-loads": True, "tensorrt": True, "moe-infinity": True,
            "deepseek": False, "load-csv": False}  # fmt: skip
"""Whether the format keeps rows apart."""


def spec(experts=8, top_k=2, **changes):
    return make_spec(experts=experts, top_k=top_k, stacks=(STACK,), **changes)


def tokens(experts=8, top_k=2, requests=3, length=9, optional=True, seed=0):
    table = make_table(requests, length, 3, experts, top_k, seed, Phase.PREFILL, noise=0.9)
    changes = {"step": table.request} if optional else {"step": table.request, "topk_weights": None, "token_id": None}
    return TokenTable(**{**table.arrays(), **changes})


def written(path, table, kind="tokens", texts=(), **options):
    with TraceWriter(path, spec(**options), {"source": "test"}, kind=kind, shard_tokens=10) as writer:
        writer.add_requests(list(texts))
        writer.append("decoder", table)
    return Trace.open(path)


def loads_of(table, experts=8):
    rows = [load_LE(table.topk_ids[table.step == s], experts, table.dropped[table.step == s]) for s in range(3)]
    return LoadTable(load=np.stack(rows), step=np.arange(3, dtype=np.int32), phase=np.full(3, Phase.PREFILL, np.uint8))


def back(name, trace, folder):
    path = folder / "exported"
    FORMATS[name].write(trace, "decoder", path)
    assert recognise(path).name == name
    options = ImportOptions(experts=trace.spec.num_experts, top_k=trace.spec.top_k)
    return import_recording(path, folder / "back.moetrace", options=options, keep_warmup=True)


@pytest.mark.parametrize("experts", [8, 300])
@pytest.mark.parametrize("optional", [True, False])
def test_parquet_is_the_identity(tmp_path, experts, optional):
    table = tokens(experts=experts, optional=optional)
    if optional:
        ahead = np.arange(27 * 3 * 2 * 4).reshape(27, 3, 2, 4) % 8
        table = TokenTable(**{**table.arrays(), "lookahead_ids": ahead.astype(table.topk_ids.dtype)})
    trace = written(tmp_path / "a.moetrace", table, texts=["law", "code", "law"], experts=experts)
    again = back("parquet", trace, tmp_path)
    assert again.spec == trace.spec and again.request_texts == trace.request_texts
    arrays = again.table("decoder").arrays()
    assert arrays.keys() == table.arrays().keys()
    for name, column in table.arrays().items():
        assert arrays[name].dtype == column.dtype and (arrays[name] == column).all()
    assert again.provenance["import"]["notes"]["exported"] == {"source": "test"}
    assert list(again.verify())


def test_parquet_carries_loads(tmp_path):
    loads = loads_of(tokens())
    again = back("parquet", written(tmp_path / "a.moetrace", loads, "loads"), tmp_path)
    assert (again.loads("decoder").load == loads.load).all() and again.spec == spec()


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    trace = written(tmp_path / "a.moetrace", tokens())
    real = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(InputError, match=r'pip install "moesim\[parquet\]"'):
        FORMATS["parquet"].write(trace, "decoder", tmp_path / "out")


@pytest.mark.parametrize("name", OF_TOKENS)
@given(experts=st.sampled_from([4, 8, 300]), top_k=st.integers(1, 3), optional=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_tokens_survive(tmp_path_factory, name, experts, top_k, optional, seed):
    folder = tmp_path_factory.mktemp("round")
    table = tokens(experts, top_k, optional=optional, seed=seed)
    found = back(name, written(folder / "a.moetrace", table, experts=experts, top_k=top_k), folder).table("decoder")
    assert (found.topk_ids == table.topk_ids).all() and found.topk_ids.dtype == table.topk_ids.dtype
    if name != "vllm":  # one array: no requests, no weights
        assert (found.request == table.request).all() and (found.position == table.position).all()
        assert (found.topk_weights is None) == (not optional)
        assert not optional or (found.topk_weights == table.topk_weights).all()


@pytest.mark.parametrize("kind", ["tokens", "loads"])
@pytest.mark.parametrize("name", OF_LOADS)
def test_loads_survive(tmp_path, name, kind):
    table = tokens()
    loads = loads_of(table)
    trace = written(tmp_path / "a.moetrace", table if kind == "tokens" else loads, kind)
    again = back(name, trace, tmp_path)
    expected = loads.load if OF_LOADS[name] else loads.load.sum(axis=0)[None]
    assert (again.loads("decoder").load == expected).all()
    if name in ("sglang", "tensorrt", "load-csv"):
        assert again.spec.stacks[0].moe_layers == STACK.moe_layers


def test_every_writable_format_is_tested():
    assert set(WRITABLE) == {"parquet", *OF_TOKENS, *OF_LOADS}


@pytest.mark.parametrize("name", WRITABLE)
def test_nothing_is_replaced_and_failures_leave_nothing(tmp_path, name):
    trace = written(tmp_path / "a.moetrace", tokens())
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        FORMATS[name].write(trace, "decoder", taken)
    assert taken.read_text() == "mine"
    with pytest.raises(MoesimError):
        FORMATS[name].write(trace, "encoder", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", OF_TOKENS)
def test_loads_cannot_become_tokens(tmp_path, name):
    trace = written(tmp_path / "a.moetrace", loads_of(tokens()), "loads")
    with pytest.raises(MoesimError, match="holds loads per expert and no tokens"):
        FORMATS[name].write(trace, "decoder", tmp_path / "new")
    assert not (tmp_path / "new").exists()
