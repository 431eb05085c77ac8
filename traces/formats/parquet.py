"""Parquet: moesim's own export for pandas and DuckDB, one row a token (or a row of loads), and back without loss.

Columns with more than one number a token are fixed-size lists, flattened in the order of the shape in the metadata. The
model spec, the texts of the requests and the provenance stand in the schema's metadata as JSON. Needs pyarrow (extra
`parquet`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError, TraceError
from moesim.traces.formats.base import PART_TOKENS, Format, ImportOptions, Recording
from moesim.traces.formats.text_files import replacing
from moesim.traces.spec import ModelSpec
from moesim.traces.store import DTYPES, LOAD_DTYPES, Trace
from moesim.traces.tokens import LoadTable, TokenTable

KEY = b"moesim"
MOST_ROWS = 1 << 20
"""Rows of one row group; more would not be read in bounded memory."""


def recognise(path: Path) -> bool:
    """The magic bytes."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def read(path: Path, _options: ImportOptions) -> Recording:
    """What `write` wrote. Raises InputError where pyarrow is missing or the file is not an export of moesim."""
    parquet = _pyarrow_parquet()
    try:
        file = parquet.ParquetFile(path)
        about = json.loads((file.schema_arrow.metadata or {})[KEY])
        spec, kind, stack = ModelSpec.from_dict(about["spec"]), about["kind"], about["stack"]
        shapes = {name: tuple(int(n) for n in shape) for name, shape in about["shapes"].items()}
        layers = spec.stack(stack)
        requests = [about["texts"][i] for i in about["request_text"]]
        if kind not in ("tokens", "loads") or not all(isinstance(text, str) for text in requests):
            raise TypeError("kind or texts")
        if spec.num_experts < 1 or any(n < 0 for shape in shapes.values() for n in shape):
            raise TypeError("shapes")
    except _damage() as error:
        raise InputError(f"{path}: not a Parquet export of moesim, or damaged ({str(error)[:80]})") from None
    return Recording(
        kind=kind,
        layers=layers.moe_layers,
        num_layers=layers.num_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        spec=spec,
        stack=stack,
        parts=_parts(path, file, kind, shapes, spec),
        requests=requests,
        notes={"exported": about.get("provenance", {})},
    )


def write(trace: Trace, stack: str, path: Path) -> None:
    """A stack as one file, row group by row group. Raises InputError where pyarrow is missing or `path` exists."""
    parquet = _pyarrow_parquet()
    import pyarrow as pa

    parts: Iterator[Any] = trace.load_parts(stack) if trace.kind == "loads" else trace.parts(stack)
    first = next(parts)
    shapes = {name: column.shape[1:] for name, column in first.arrays().items()}
    texts = sorted(set(trace.request_texts))
    about = {
        "kind": trace.kind,
        "stack": stack,
        "spec": trace.spec.to_dict(),
        "shapes": shapes,
        "texts": texts,
        "request_text": [texts.index(text) for text in trace.request_texts],
        "provenance": trace.provenance,
    }
    schema = _batch(pa, first.take(slice(0))).schema.with_metadata({KEY: json.dumps(about).encode()})
    with replacing(path) as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in chain([first], parts):
            for begin in range(0, len(part), PART_TOKENS):
                batch = _batch(pa, part.take(slice(begin, begin + PART_TOKENS)))
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def _batch(pa: Any, table: TokenTable | LoadTable) -> Any:
    columns = {}
    for name, column in table.arrays().items():
        flat = pa.array(np.ascontiguousarray(column).ravel())
        width = math.prod(column.shape[1:])
        columns[name] = flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.RecordBatch.from_pydict(columns)


def _parts(path: Path, file: Any, kind: str, shapes: dict[str, tuple[int, ...]], spec: ModelSpec) -> Iterator[Any]:
    for group in range(file.num_row_groups):
        if file.metadata.row_group(group).num_rows > MOST_ROWS:
            raise InputError(f"{path}: a row group has more than {MOST_ROWS:,} rows; write it with moesim trace export")
        try:
            table = file.read_row_group(group).combine_chunks()
            dtypes = LOAD_DTYPES if kind == "loads" else DTYPES
            columns = {name: _column(table, name, shapes[name], dtypes[name]) for name in table.column_names}
            made: TokenTable | LoadTable = LoadTable(**columns) if kind == "loads" else TokenTable(**columns)
            width, expected = (
                (made.load.shape[2], spec.num_experts)
                if isinstance(made, LoadTable)
                else (made.topk_ids.shape[2], spec.top_k)
            )
            if width != expected:
                raise TypeError(f"{width} numbers a layer, the model has {expected}")
        except _damage() as error:
            raise InputError(f"{path}: damaged ({str(error)[:80]})") from None
        yield made


def _column(table: Any, name: str, shape: tuple[int, ...], dtypes: tuple[type[np.generic], ...]) -> NDArray[Any]:
    column = table.column(name)
    chunks = [column.chunk(i) for i in range(column.num_chunks)]
    if column.null_count:
        raise TypeError(f"{name} has gaps")
    flat = [chunk.flatten() if shape else chunk for chunk in chunks]
    values = np.concatenate([part.to_numpy(zero_copy_only=False) for part in flat])
    if values.dtype.type not in dtypes:
        raise TypeError(f"{name} has type {values.dtype}")
    return values.reshape(table.num_rows, *shape)


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError('Parquet needs pyarrow: pip install "moesim[parquet]"') from None
    return parquet


def _damage() -> tuple[type[Exception], ...]:
    """What a damaged file makes pyarrow and the checks raise."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, TraceError, KeyError, TypeError, ValueError, IndexError, OverflowError)


FORMAT = Format(
    name="parquet",
    summary="Parquet as moesim trace export writes it (extra parquet)",
    recognise=recognise,
    read=read,
    write=write,
)
