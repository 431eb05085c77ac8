"""Megatron-core's routing trace (--moe-routing-trace-path): JSON lines, one file a rank.

A record is one layer of one step on one rank. Ranks of data parallelism hold different tokens; ranks of tensor
parallelism repeat the same ones, which are kept once. No record says where a sequence begins, so the tokens of a step
on a rank count as one request.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.routed import Ints, Known, Piece, recording_of
from moesim.traces.formats.text_files import first_record, int_array, json_lines

FIELDS = {"step", "layer", "rank", "num_tokens", "topk", "top_indices"}
MOST_LAYERS = 4096

Step = tuple[str, dict[int, Ints]]
"""(where, layer to ids [T, K]) of one step on one rank."""


def recognise(path: Path) -> bool:
    """A file, or the first of a folder, whose first line has the fields of a routing record."""
    files = _files(path)
    return bool(files) and first_record(files[0]).keys() >= FIELDS


def read(path: Path, options: ImportOptions) -> Recording:
    """Steps in order, in each the ranks in order of their file; pipeline stages are put together."""
    files = _files(path)
    if not files:
        raise InputError(f"{path}: the folder has no .jsonl file")
    firsts = [next(_steps(file), None) for file in files]
    layers = sorted({layer for found in firsts if found for layer in found[1]})
    known = Known(layers=tuple(layers) or None)
    known.notes["phase"] = f"{options.phase.name.lower()}, as the records do not say"
    known.notes["requests"] = "the tokens of a step on a rank count as one request"
    return recording_of(path, lambda: _pieces(files, options, known.notes), options, known)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


def _pieces(files: list[Path], options: ImportOptions, notes: dict[str, Any]) -> Iterator[Piece]:
    request = repeated = 0
    for number, of_ranks in enumerate(zip_longest(*(_steps(file) for file in files))):
        seen: list[Ints] = []
        for where, layers in _whole_models([found for found in of_ranks if found]):
            ids = _stacked(layers, where)
            if any(np.array_equal(ids, other) for other in seen):
                repeated += 1
                continue
            seen.append(ids)
            yield Piece(where=where, ids=ids, request=request, step=number, phase=options.phase)
            request += 1
    if repeated:
        notes["ranks"] = f"{repeated} records of ranks that repeat another rank's tokens were left out"


def _whole_models(of_ranks: list[Step]) -> Iterator[Step]:
    """Ranks of different pipeline stages have different layers of the same tokens: the first rank of every stage goes
    with the first of the others, and so on."""
    stages: dict[tuple[int, ...], list[Step]] = {}
    for step in of_ranks:
        stages.setdefault(tuple(sorted(step[1])), []).append(step)
    if len({len(ranks) for ranks in stages.values()}) > 1:
        raise InputError(f"{of_ranks[0][0]}: pipeline stages have different numbers of ranks; is a file missing?")
    for parts in zip(*stages.values(), strict=True):
        layers = {layer: ids for _, found in parts for layer, ids in found.items()}
        yield parts[0][0], layers


def _steps(file: Path) -> Iterator[Step]:
    """(where, layer to ids [T, K]) of each step (and stage and block) in a file; its records stand together."""
    key: tuple[Any, ...] | None = None
    layers: dict[int, Ints] = {}
    for number, record in json_lines(file):
        where = f"{file}, line {number}"
        if missing := sorted(FIELDS - record.keys()):
            raise InputError(f"{where}: lacks the field {missing[0]!r}")
        layer = record["layer"]
        if type(layer) is not int or not 0 <= layer < MOST_LAYERS:
            raise InputError(f"{where}: 'layer' must be a layer number, got {str(layer)[:40]!r}")
        now = (record["step"], record.get("block"))
        if layers and (now != key or layer in layers):
            yield f"{file}, step {key[0] if key else '?'}", layers
            layers = {}
        key = now
        layers[layer] = _ids(record, where)
    if layers:
        yield f"{file}, step {key[0] if key else '?'}", layers


def _ids(record: dict[str, Any], where: str) -> Ints:
    ids = int_array(record["top_indices"], f"{where}, top_indices", 2)
    if ids.shape != (record["num_tokens"], record["topk"]):
        raise InputError(
            f"{where}: top_indices has shape {list(ids.shape)}, num_tokens and topk say "
            f"{str([record['num_tokens'], record['topk']])[:60]}"
        )
    return ids


def _stacked(layers: dict[int, Ints], where: str) -> Ints:
    found = [layers[layer] for layer in sorted(layers)]
    if len({ids.shape for ids in found}) > 1:
        raise InputError(f"{where}: its layers have different numbers of tokens or experts per token")
    return np.stack(found, axis=1)


FORMAT = Format(
    name="megatron",
    summary="Megatron-core: JSON lines of --moe-routing-trace-path, a file or a folder with one a rank",
    recognise=recognise,
    read=read,
)
