"""ESFT's expert scores: a folder of `expert_weights_{layer}.txt`, one line a sequence (deepseek-ai/ESFT).

A line is T x K ids, an empty field, and T x K gate weights, separated by tabs. K stands nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.routed import Known, Piece, recording_of

NAME = re.compile(r"expert_weights_(\d{1,4})\.txt", re.ASCII)
MOST_LINE = 1 << 28
MOST_K = 32


def recognise(path: Path) -> bool:
    """A folder with such files."""
    return path.is_dir() and bool(_files(path))


def read(path: Path, options: ImportOptions) -> Recording:
    """Sequences are requests; the files' numbers are the layers'. Raises InputError where K is neither given nor clear
    from the first sequence (no expert twice in a token fits one K only)."""
    files = _files(path)
    if not files:
        raise InputError(f"{path}: has no expert_weights_LAYER.txt")
    layers = tuple(sorted(files))
    known = Known(layers=layers, num_layers=layers[-1] + 1)
    top_k = options.spec.top_k if options.spec else options.top_k
    if top_k is None:
        top_k = _only_k(path, files)
        known.notes["top_k"] = f"{top_k}, the largest group in which no expert stands twice; --top-k would say it"
    return recording_of(path, lambda: _pieces([files[i] for i in layers], top_k, options), options, known)


def _files(path: Path) -> dict[int, Path]:
    named = ((NAME.fullmatch(file.name), file) for file in path.iterdir()) if path.is_dir() else ()
    return {int(match[1]): file for match, file in named if match}


def _only_k(path: Path, files: dict[int, Path]) -> int:
    first = [next(_sequences(file), None) for file in files.values()]
    lines = [found[0] for found in first if found]
    possible = [k for k in range(2, MOST_K + 1) if lines and all(_fits(ids, k) for ids in lines)]
    # Divisors of K fit as well; the largest that fits is K, as in longer groups some expert stands twice.
    if not possible:
        raise InputError(f"{path}: the number of experts per token is not clear; give --top-k")
    return max(possible)


def _fits(ids: NDArray[np.int64], k: int) -> bool:
    if len(ids) % k or len(ids) < 64 * k:
        return False
    ordered = np.sort(ids.reshape(-1, k), axis=1)
    return bool((ordered[:, 1:] != ordered[:, :-1]).all())


def _pieces(files: list[Path], top_k: int, options: ImportOptions) -> Iterator[Piece]:
    sequences = [_sequences(file) for file in files]
    request = 0
    while True:
        found = [next(sequence, None) for sequence in sequences]
        if all(one is None for one in found):
            return
        where = f"{files[0].parent}, sequence {request}"
        lines = [one for one in found if one is not None]
        if len(lines) != len(found) or len({len(ids) for ids, _ in lines}) > 1:
            raise InputError(f"{where}: the layers' files differ in their number of sequences or tokens")
        if len(lines[0][0]) % top_k:
            raise InputError(f"{where}: {len(lines[0][0])} ids are not tokens x {top_k}; is --top-k right?")
        ids, weights = (np.stack([line[i].reshape(-1, top_k) for line in lines], axis=1) for i in (0, 1))
        yield Piece(
            where=where, ids=ids.astype(np.int64), weights=weights, request=request, step=request, phase=options.phase
        )
        request += 1


def _sequences(file: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """(ids, weights) of every line of a layer's file."""
    try:
        with file.open("rb") as content:
            number = 0
            while line := content.readline(MOST_LINE + 1):
                number += 1
                if line.strip():
                    yield _line(line, f"{file}, line {number}")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def _line(line: bytes, where: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if len(line) > MOST_LINE:
        raise InputError(f"{where}: longer than {MOST_LINE >> 20} MiB")
    left, blank, right = line.partition(b"\t\t")
    try:
        ids = np.array([int(field) for field in left.split()], np.int64)
        weights = np.array([float(field) for field in right.split()], np.float64)
    except (ValueError, OverflowError):
        raise InputError(f"{where}: must be ids, an empty field, and gate weights, separated by tabs") from None
    if not blank or len(ids) != len(weights):
        raise InputError(f"{where}: has {len(ids)} ids and {len(weights)} gate weights")
    return ids, weights


FORMAT = Format(
    name="esft",
    summary="ESFT: a folder of expert_weights_LAYER.txt",
    recognise=recognise,
    read=read,
)
