"""Whatever bytes come in: a trace, or one line of InputError; never a traceback.

`make test` runs a few examples; `make fuzz` sets MOESIM_FUZZ_EXAMPLES and runs many.
"""

import os
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import make_spec, make_table
from moesim.traces import MoesimError
from moesim.traces.formats import FORMATS, ImportOptions
from moesim.traces.importing import import_recording
from moesim.traces.store import Trace
from moesim.traces.writer import TraceWriter
from samples import PAIRS, E, K, L

EXAMPLES = int(os.environ.get("MOESIM_FUZZ_EXAMPLES", "25"))
KNOWN = [ImportOptions(), ImportOptions(experts=E, top_k=K, layers=L)]
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def attempt(path, folder, name, options):
    """Import; on an error check that it is one line and a line that says something."""
    out = folder / "out.moetrace"
    try:
        trace = import_recording(path, out, format=name, options=options, keep_warmup=True, overwrite=True)
    except MoesimError as error:
        assert len(str(error)) > 10 and len(str(error)) < 2000
        return
    assert sum(shard.rows for shard in list(trace.verify())) > 0


def mutated(data, seed):
    """Bytes flipped, cut out, doubled or put in, a few times."""
    rng = random.Random(seed)
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(5)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + rng.choice((1, 4, 100, len(data)))]
        elif what == 2:
            data[at:at] = rng.choice((b"-", b"9", b"9999999999", b"[", b"}", b"null", b"\n", b"\x00", b"NaN", b"1e999"))
        elif what == 3:
            data[at:at] = data[at : at + rng.randrange(1, 60)]
        elif at < len(data):
            data[at] = rng.randrange(256)
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize(("name", "sample"), PAIRS, ids=[sample.__name__ for _, sample in PAIRS])
def test_damaged_recordings(folder, name, sample):
    original = folder / sample.__name__
    original.mkdir()
    sample(original)
    damaged = folder / f"{sample.__name__}-damaged"

    @fuzz
    @given(seed=st.integers(0, 2**32), options=st.sampled_from(KNOWN), named=st.booleans())
    def run(seed, options, named):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(original, damaged)
        path = damaged / sample_path.relative_to(original)
        files = sorted(file for file in damaged.rglob("*") if file.is_file())
        file = files[seed % len(files)]
        file.write_bytes(mutated(file.read_bytes(), seed))
        attempt(path, folder, name if named else None, options)

    sample_path = next(iter(original.iterdir())) if len(list(original.iterdir())) == 1 else original
    attempt(sample_path, folder, name, KNOWN[1])
    run()


@pytest.mark.parametrize("name", [n for n, known in FORMATS.items() if known.read])
@fuzz
@given(data=st.binary(max_size=300) | st.text(max_size=200).map(str.encode), options=st.sampled_from(KNOWN))
def test_any_bytes(folder, name, data, options):
    path = folder / "bytes"
    path.write_bytes(data)
    attempt(path, folder, name, options)


def test_damaged_parquet(folder):
    source, export = folder / "p.moetrace", folder / "p.parquet"
    with TraceWriter(source, make_spec(), {}) as writer:
        writer.append("encoder", make_table(requests=2))
    FORMATS["parquet"].write(Trace.open(source), "encoder", export)
    damaged = folder / "damaged.parquet"

    @fuzz
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        damaged.write_bytes(mutated(export.read_bytes(), seed))
        attempt(damaged, folder, "parquet", KNOWN[0])

    run()


@fuzz
@given(seed=st.integers(0, 2**32))
def test_damaged_traces(folder, seed):
    """A trace whose files were changed is read right, or refused."""
    source, damaged = folder / "t.moetrace", folder / "damaged.moetrace"
    if not source.exists():
        with TraceWriter(source, make_spec(), {}, shard_tokens=100) as writer:
            writer.add_requests(["law"] * 8)
            writer.append("encoder", make_table(requests=8))
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(source, damaged)
    file = sorted(damaged.iterdir())[seed % len(list(damaged.iterdir()))]
    file.write_bytes(mutated(file.read_bytes(), seed))
    try:
        trace = Trace.open(damaged)
        for _ in trace.verify():
            pass
        for stack in trace.stacks:
            trace.rows(stack)
    except MoesimError as error:
        assert "\n" not in str(error)
