"""moe-balance: an `.npz` a request with routed_experts [tokens, layers, k] and the request's token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.numpy_files import Array, npz_files, npz_has, open_npz
from moesim.traces.formats.routed import Known, Piece, phases, recording_of

NEEDED = {"prompt_token_ids", "output_token_ids", "routed_experts"}


def recognise(path: Path) -> bool:
    """An `.npz` (or the first of a folder) with these arrays."""
    return npz_has(path, NEEDED)


def read(path: Path, options: ImportOptions) -> Recording:
    """Requests in order of their file's name."""
    files = npz_files(path)
    return recording_of(path, lambda: _pieces(files), options, Known())


def _pieces(files: list[Path]) -> Iterator[Piece]:
    for request, file in enumerate(files):
        arrays = open_npz(file)
        if missing := sorted(NEEDED - arrays.keys()):
            raise InputError(f"{file}: lacks the array {missing[0]!r}")
        ids = arrays["routed_experts"]
        prompt, told = _tokens(arrays, "prompt_token_ids", file), _tokens(arrays, "output_token_ids", file)
        known = np.concatenate([prompt, told])
        # The last token that was generated is not routed.
        if ids.ndim != 3 or not len(known) - 1 <= len(ids) <= len(known):
            raise InputError(f"{file}: routed_experts has shape {list(ids.shape)} for {len(known)} tokens")
        yield Piece(
            where=str(file),
            ids=ids,
            request=request,
            step=request,
            token_id=known[: len(ids)],
            phase=phases(len(ids), len(prompt)),
        )


def _tokens(arrays: dict[str, Array], name: str, file: Path) -> Array:
    found = arrays[name]
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise InputError(f"{file}: {name} must be token ids [T]")
    return found.astype(np.int64)


FORMAT = Format(
    name="moe-balance",
    summary="moe-balance: an .npz a request with routed_experts and token ids, or a folder of them",
    recognise=recognise,
    read=read,
)
