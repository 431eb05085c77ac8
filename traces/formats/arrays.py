"""Bare arrays of loads: DeepSeek EPLB's input [L, E] (torch or `.npy`) and MoE-Infinity's counts [N, L, E] (`.npy`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.loads import Counts, counts, recording_of, step_loads, total_load
from moesim.traces.formats.numpy_files import is_npy, looks_like_loads, open_npy
from moesim.traces.formats.text_files import replacing
from moesim.traces.formats.torch_files import array_of, is_torch, load_torch
from moesim.traces.store import Trace

PART_ROWS = 256


def recognise_deepseek(path: Path) -> bool:
    """A torch tensor or `.npy` of counts [L, E]."""
    try:
        if is_npy(path):
            array = open_npy(path)
            return array.ndim == 2 and looks_like_loads(array)
        return is_torch(path) and getattr(load_torch(path), "ndim", 0) == 2
    except InputError:
        return False


def read_deepseek(path: Path, options: ImportOptions) -> Recording:
    """One row of loads."""
    array = open_npy(path) if is_npy(path) else array_of(load_torch(path), str(path), 2)
    return recording_of(path, iter([counts(array, str(path), 2)[None]]), options)


def write_deepseek(trace: Trace, stack: str, path: Path) -> None:
    """The load of the whole recording, `.npy` [L, E]."""
    _save(path, total_load(trace, stack))


def recognise_moe_infinity(path: Path) -> bool:
    """A `.npy` of counts [N, L, E]."""
    try:
        array = open_npy(path) if path.is_file() and is_npy(path) else None
    except InputError:
        return False
    return array is not None and array.ndim == 3 and looks_like_loads(array)


def read_moe_infinity(path: Path, options: ImportOptions) -> Recording:
    """A row of loads a sequence."""
    array = open_npy(path)
    if array.ndim != 3:
        raise InputError(f"{path}: must be counts [N, L, E], got shape {list(array.shape)}")

    def parts() -> Iterator[Counts]:
        for begin in range(0, len(array), PART_ROWS):
            yield counts(np.asarray(array[begin : begin + PART_ROWS]), f"{path}, from row {begin}")

    return recording_of(path, parts(), options)


def write_moe_infinity(trace: Trace, stack: str, path: Path) -> None:
    """The load of every recorded step, `.npy` [N, L, E]."""
    _save(path, np.concatenate(list(step_loads(trace, stack))))


def _save(path: Path, array: NDArray[Any]) -> None:
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


DEEPSEEK = Format(
    name="deepseek",
    summary="DeepSeek EPLB: a tensor of loads [L, E], .pt or .npy",
    recognise=recognise_deepseek,
    read=read_deepseek,
    write=write_deepseek,
)
MOE_INFINITY = Format(
    name="moe-infinity",
    summary="MoE-Infinity: .npy of counts [N, L, E]",
    recognise=recognise_moe_infinity,
    read=read_moe_infinity,
    write=write_moe_infinity,
)
