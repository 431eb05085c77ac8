"""Routing as arrays in an `.npz`: topk_ids, topk_weights, seq_lens, layer_ids. A folder is one data set a file.

The form in which ESFT's published scores are passed on; moesim writes it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.numpy_files import Array, npz_files, npz_has, open_npz
from moesim.traces.formats.routed import Known, Piece, recording_of
from moesim.traces.formats.text_files import replacing
from moesim.traces.store import Trace
from moesim.traces.tokens import concat

NEEDED = {"topk_ids", "seq_lens"}


def recognise(path: Path) -> bool:
    """An `.npz` (or the first of a folder) with topk_ids and seq_lens."""
    return npz_has(path, NEEDED)


def read(path: Path, options: ImportOptions) -> Recording:
    """Sequences are requests, named after their file; layer_ids number the MoE layers."""
    files = npz_files(path)
    known = Known()
    for file in files:
        arrays = _arrays(file)
        known.requests += [file.stem] * len(arrays["seq_lens"])
        layers = _layers(arrays, file)
        if known.layers not in (None, layers):
            raise InputError(f"{file}: its layer_ids are not those of {files[0]}")
        known.layers = layers
    known.notes["phase"] = f"{options.phase.name.lower()}, as the arrays do not say"
    return recording_of(path, lambda: _pieces(files, options), options, known)


def write(trace: Trace, stack: str, path: Path) -> None:
    """Requests in order of their number. Raises InputError where `path` exists or the trace has no tokens."""
    table = concat(list(trace.parts(stack)))
    table = table.take(np.lexsort((table.position, table.request)))
    _, lengths = np.unique(table.request, return_counts=True)
    arrays: dict[str, NDArray[np.generic]] = {
        "topk_ids": table.topk_ids,
        "seq_lens": lengths.astype(np.int32),
        "layer_ids": np.array(trace.spec.stack(stack).moe_layers, np.int32),
    }
    if table.topk_weights is not None:
        arrays["topk_weights"] = table.topk_weights
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type] # no array is called allow_pickle


def _arrays(file: Path) -> dict[str, Array]:
    arrays = open_npz(file)
    if missing := sorted(NEEDED - arrays.keys()):
        raise InputError(f"{file}: lacks the array {missing[0]!r}")
    lengths = arrays["seq_lens"]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 0).any():
        raise InputError(f"{file}: seq_lens must be lengths [S]")
    if int(lengths.sum(dtype=np.float64)) != len(arrays["topk_ids"]):
        raise InputError(f"{file}: seq_lens sum to {lengths.sum(dtype=np.float64):.0f}, topk_ids has "
                         f"{len(arrays['topk_ids'])} tokens")  # fmt: skip
    return arrays


def _layers(arrays: dict[str, Array], file: Path) -> tuple[int, ...] | None:
    if "layer_ids" not in arrays:
        return None
    found = arrays["layer_ids"]
    if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found) or (np.diff(found.astype(np.int64)) < 1).any():
        raise InputError(f"{file}: layer_ids must be layer numbers [L], ascending")
    if int(found[0]) < 0 or int(found[-1]) > 4095:
        raise InputError(f"{file}: a layer number is outside 0..4095")
    return tuple(int(layer) for layer in found)


def _pieces(files: list[Path], options: ImportOptions) -> Iterator[Piece]:
    request = 0
    for file in files:
        arrays = _arrays(file)
        ids, weights = arrays["topk_ids"], arrays.get("topk_weights")
        if weights is not None and weights.shape != ids.shape:
            raise InputError(f"{file}: topk_weights has shape {list(weights.shape)}, topk_ids {list(ids.shape)}")
        ends = np.cumsum(arrays["seq_lens"].astype(np.int64))
        for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            yield Piece(
                where=str(file),
                ids=ids[begin:end],
                weights=None if weights is None else weights[begin:end],
                request=request,
                step=request,
                phase=options.phase,
            )
            request += 1


FORMAT = Format(
    name="npz",
    summary="arrays topk_ids, topk_weights, seq_lens, layer_ids in an .npz, or a folder of them",
    recognise=recognise,
    read=read,
    write=write,
)
