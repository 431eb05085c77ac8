"""What all formats with routed tokens share: pieces of a recording are checked and become token tables.

A piece is what a file says of one request (or of one step): ids, and whatever else it knows. Nothing here knows a
format. Shape letters: T tokens, L MoE layers, E experts, P physical experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.base import PART_TOKENS, ImportOptions, Recording
from moesim.traces.formats.numpy_files import is_npy, open_npy
from moesim.traces.formats.text_files import int_array, json_file
from moesim.traces.formats.torch_files import array_of, is_torch, load_torch
from moesim.traces.tokens import Phase, TokenTable, id_dtype

Ints = NDArray[np.integer]
MAP_NAMES = ("physical_to_logical_map", "last_physical_to_logical_map", "phy2log")


@dataclass(slots=True, kw_only=True)
class Piece:
    """Neighbouring tokens of a recording."""

    where: str
    """File (and line) for messages."""
    ids: Ints
    """[T, L, K], possibly memory-mapped."""
    request: int | Ints
    """One for all tokens, or [T]."""
    step: int
    """The forward pass, or the number of the request where a file knows none."""
    weights: NDArray[Any] | None = None
    """[T, L, K]."""
    token_id: Ints | None = None
    """[T]."""
    position: Ints | None = None
    """[T]; None: 0, 1, 2, ..."""
    phase: Phase | Ints = Phase.PREFILL
    """One for all tokens, or [T]."""


Pieces = Callable[[], Iterator[Piece]]
"""Starts at the beginning of the recording every time it is called."""


@dataclass(slots=True, kw_only=True)
class Known:
    """What a format knows before the first piece."""

    layers: tuple[int, ...] | None = None
    """Numbers of the MoE layers in the model."""
    num_layers: int | None = None
    requests: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def recording_of(path: Path, pieces: Pieces, options: ImportOptions, known: Known | None = None) -> Recording:
    """A recording of tokens from pieces of equal L and K.

    E comes from the options, or is taken to be the largest id + 1, for which all pieces are read once more. Raises
    InputError where there is no piece or the options contradict the first one; later pieces raise as they are read.
    """
    known = known or Known()
    first = next(pieces(), None)
    if first is None:
        raise InputError(f"{path}: the recording is empty")
    _check_shape(first, None)
    _, L, K = first.ids.shape
    if options.top_k not in (None, K):
        raise InputError(f"{path}: every token has {K} experts, --top-k says {options.top_k}")
    physical_LP = _physical_map(options, L, known.notes)
    experts = _experts(path, pieces, options, physical_LP, known.notes)
    layers = known.layers or tuple(range(L))
    if len(layers) != L:
        raise InputError(f"{path}: names {len(layers)} layers and routes through {L}")
    return Recording(
        kind="tokens",
        layers=layers,
        num_layers=known.num_layers or layers[-1] + 1,
        num_experts=experts,
        top_k=K,
        parts=_parts(pieces, (L, K), experts, physical_LP),
        requests=known.requests,
        notes=known.notes,
    )


def phases(tokens: int, prompt: int) -> NDArray[np.uint8]:
    """[T] prefill for the prompt's tokens, decode for those after it."""
    return np.where(np.arange(tokens) < prompt, np.uint8(Phase.PREFILL), np.uint8(Phase.DECODE))


def _parts(pieces: Pieces, shape: tuple[int, int], experts: int, physical_LP: Ints | None) -> Iterator[TokenTable]:
    for piece in pieces():
        _check_shape(piece, shape)
        for begin in range(0, len(piece.ids), PART_TOKENS):
            yield _table(piece, slice(begin, min(begin + PART_TOKENS, len(piece.ids))), experts, physical_LP)


def _table(piece: Piece, rows: slice, experts: int, physical_LP: Ints | None) -> TokenTable:
    ids = np.asarray(piece.ids[rows])
    if physical_LP is not None:
        ids = apply_map(ids, physical_LP, piece.where)
    _check_ids(ids, experts, piece.where)
    T, L = ids.shape[:2]
    position = np.arange(rows.start, rows.stop) if piece.position is None else piece.position[rows]
    return TokenTable(
        topk_ids=ids.astype(id_dtype(experts)),
        topk_weights=None if piece.weights is None else _weights(np.asarray(piece.weights[rows]), piece.where),
        dropped=np.zeros((T, L), np.bool_),
        token_id=None if piece.token_id is None else _int32(piece.token_id[rows], "token id", piece.where),
        request=_column(piece.request, rows, np.int32),
        position=_int32(position, "position", piece.where),
        step=np.full(T, piece.step, np.int32),
        phase=_column(piece.phase, rows, np.uint8),
    )


def apply_map(ids_TLK: Ints, physical_LP: Ints, where: str) -> Ints:
    """Physical ids as logical ones, layer by layer. Raises InputError where an id is beyond the map."""
    L, P = physical_LP.shape
    _check_ids(ids_TLK, P, where)
    return physical_LP[np.arange(L)[None, :, None], ids_TLK]


def read_map(path: Path) -> NDArray[np.int64]:
    """A physical-to-logical map [L, P] from a `.npy`, `.pt` or JSON file, bare or as a plan of SGLang has it. Raises
    InputError naming the file."""
    value = open_npy(path) if is_npy(path) else load_torch(path) if is_torch(path) else json_file(path)
    if isinstance(value, dict):
        value = next((value[name] for name in MAP_NAMES if name in value), None)
    if is_torch(path):
        value = array_of(value, f"{path}: the physical-to-logical map", 2)
    found = int_array(value, f"{path}: the physical-to-logical map", 2)
    if not found.size or found.min() < 0:
        raise InputError(f"{path}: the physical-to-logical map must be [L, P] of experts from 0")
    return found


def _physical_map(options: ImportOptions, layers: int, notes: dict[str, Any]) -> Ints | None:
    if options.physical_to_logical is None:
        return None
    found = read_map(options.physical_to_logical)
    if len(found) != layers:
        raise InputError(
            f"{options.physical_to_logical}: maps {len(found)} layers, the recording has {layers}: --physical-map must "
            "be the recording's own"
        )
    notes["physical_ids"] = f"made logical by {options.physical_to_logical.name}"
    return found


def _experts(
    path: Path, pieces: Pieces, options: ImportOptions, physical_LP: Ints | None, notes: dict[str, Any]
) -> int:
    said = options.spec.num_experts if options.spec else options.experts
    if said is not None:
        return said
    if physical_LP is not None:
        largest = int(physical_LP.max())
    else:
        largest = max((_largest(piece.ids) for piece in pieces()), default=0)
    if largest > 65_534:
        raise InputError(f"{path}: an expert id is {largest}, which no model has; is this a recording of routing?")
    notes["experts"] = f"{largest + 1}, the largest id + 1; --experts or --model would say it"
    return largest + 1


def _largest(ids: Ints) -> int:
    return int(ids.max()) if ids.size else 0


def _check_shape(piece: Piece, shape: tuple[int, int] | None) -> None:
    if piece.ids.ndim != 3 or piece.ids.dtype.kind not in "iu":
        raise InputError(f"{piece.where}: experts must be whole numbers [T, L, K], got {piece.ids.dtype} in "
                         f"{piece.ids.ndim} dimensions")  # fmt: skip
    if min(piece.ids.shape[1:]) < 1:
        raise InputError(f"{piece.where}: no layers or no experts per token")
    if shape is not None and piece.ids.shape[1:] != shape:
        raise InputError(
            f"{piece.where}: has [L, K] = {list(piece.ids.shape[1:])}, the recording began with {list(shape)}"
        )
    T = len(piece.ids)
    for name in ("token_id", "position"):
        column = getattr(piece, name)
        if column is not None and column.shape != (T,):
            raise InputError(f"{piece.where}: {len(column)} values of {name} for {T} routed tokens")
    if piece.weights is not None and piece.weights.shape != piece.ids.shape:
        raise InputError(
            f"{piece.where}: gate weights have shape {list(piece.weights.shape)}, ids {list(piece.ids.shape)}"
        )


def _check_ids(ids: Ints, experts: int, where: str) -> None:
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= experts:
        raise InputError(f"{where}: expert id {low if low < 0 else high} is outside 0..{experts - 1}")


def _weights(weights: NDArray[Any], where: str) -> NDArray[np.float16]:
    if weights.dtype.kind not in "fiu" or not np.isfinite(weights).all() or np.abs(weights).max(initial=0) > 65_504:
        raise InputError(f"{where}: a gate weight is not a finite number that float16 holds")
    return weights.astype(np.float16)


def _int32(column: NDArray[Any], what: str, where: str) -> NDArray[np.int32]:
    if column.dtype.kind not in "iu" or (column.size and not 0 <= column.min() <= column.max() < 1 << 31):
        raise InputError(f"{where}: a {what} is outside 0..{(1 << 31) - 1}")
    return column.astype(np.int32)


def _column(value: int | Ints, rows: slice, dtype: Any) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value[rows].astype(dtype)
    return np.full(rows.stop - rows.start, value, dtype)
