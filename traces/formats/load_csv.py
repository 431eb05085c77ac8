"""CSV of loads: `layer_id,expert_id,count` (SGLang's older dumps), and llama.cpp's `layer,expert`, one row a choice.

llama.cpp's rows do not say where a token ends, so they are counted: one row of loads for the whole file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.loads import MOST_COUNT, recording_of, total_load
from moesim.traces.formats.text_files import csv_header, csv_rows, replacing
from moesim.traces.store import Trace

COUNTED = ("layer_id", "expert_id", "count")
CHOSEN = ("layer", "expert")
MOST_LAYERS = 4096
MOST_PAIRS = 1 << 22
"""Layers x experts of one model; a few rows could name more than memory holds."""


def recognise(path: Path) -> bool:
    """A header with the three names."""
    return path.is_file() and set(COUNTED) <= set(csv_header(path))


def read(path: Path, options: ImportOptions) -> Recording:
    """One row of loads; pairs that are not there count 0."""
    return _recording(path, csv_rows(path, COUNTED), options)


def write(trace: Trace, stack: str, path: Path) -> None:
    """The load of the whole recording; layers have their numbers in the model."""
    layers = trace.spec.stack(stack).moe_layers
    with replacing(path) as file:
        file.write(",".join(COUNTED).encode() + b"\n")
        for layer, load_E in zip(layers, total_load(trace, stack), strict=True):
            for expert, count in enumerate(load_E):
                file.write(f"{layer},{expert},{count}\n".encode())


def recognise_llamacpp(path: Path) -> bool:
    """A header `layer,expert` and nothing more."""
    return path.is_file() and csv_header(path) == CHOSEN


def read_llamacpp(path: Path, options: ImportOptions) -> Recording:
    """One row of loads: choices counted."""
    rows = ((number, (layer, expert, 1)) for number, (layer, expert) in csv_rows(path, CHOSEN))
    found = _recording(path, rows, options)
    found.notes["tokens"] = "the rows do not say where a token ends: they were counted as one row of loads"
    return found


def _recording(path: Path, rows: Iterable[tuple[int, tuple[int, ...]]], options: ImportOptions) -> Recording:
    counted: dict[tuple[int, int], int] = {}
    for number, (layer, expert, count) in rows:
        if not (0 <= layer < MOST_LAYERS and 0 <= expert < 65_535 and count >= 0):
            raise InputError(f"{path}, line {number}: layer, expert or count is out of range")
        counted[layer, expert] = counted.get((layer, expert), 0) + count
    if not counted:
        raise InputError(f"{path}: has no rows")
    layers = tuple(sorted({layer for layer, _ in counted}))
    said = options.spec.num_experts if options.spec else options.experts
    experts = said or 1 + max(expert for _, expert in counted)
    if max(counted.values()) >= MOST_COUNT or max(expert for _, expert in counted) >= experts:
        raise InputError(f"{path}: an expert is not below {experts}, or a count beyond 2^53")
    if len(layers) * experts > MOST_PAIRS:
        raise InputError(f"{path}: {len(layers)} layers of {experts} experts, which no model has")
    load_LE = np.zeros((len(layers), experts), np.int64)
    for (layer, expert), count in counted.items():
        load_LE[layers.index(layer), expert] = count
    found = recording_of(path, iter([load_LE[None]]), options, layers=layers)
    if said is None:
        found.notes["experts"] = f"{experts}, the largest + 1; --experts or --model would say it"
    return found


FORMAT = Format(
    name="load-csv",
    summary="CSV layer_id,expert_id,count",
    recognise=recognise,
    read=read,
    write=write,
)
LLAMACPP = Format(
    name="llamacpp",
    summary="llama.cpp: CSV layer,expert, one row a choice",
    recognise=recognise_llamacpp,
    read=read_llamacpp,
)
