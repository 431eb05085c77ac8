"""What all formats with loads share: counts are checked, become load tables, and are counted from tokens for export.

Shape letters: N rows (steps, passes, windows), L MoE layers, E experts, P physical experts, T tokens, K per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.base import ImportOptions, Recording
from moesim.traces.store import Trace
from moesim.traces.tokens import LoadTable, TokenTable, load_LE

Counts = NDArray[np.int64]
MOST_COUNT = 1 << 53
MOST_EXPERTS = 65_535
PART_BYTES = 1 << 25
"""Of loads that are yielded at once, about."""


def counts(array: NDArray[Any], what: str, ndim: int | None = None) -> Counts:
    """Counts as int64. Raises InputError naming `what`: not numbers, negative, not whole, too large, wrong shape."""
    if ndim is not None and array.ndim != ndim:
        raise InputError(f"{what}: must have {ndim} dimensions, got shape {list(array.shape)}")
    if array.dtype.kind not in "iuf":
        raise InputError(f"{what}: must be counts, got {array.dtype}")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise InputError(f"{what}: a count is not a whole number")
    if array.size and not (array.min() >= 0 and array.max() < MOST_COUNT):
        raise InputError(f"{what}: a count is negative or beyond 2^53")
    return array.astype(np.int64)


def recording_of(
    path: Path,
    parts: Iterator[Counts],
    options: ImportOptions,
    *,
    layers: tuple[int, ...] | None = None,
    num_layers: int | None = None,
    top_k: int | None = None,
    notes: dict[str, Any] | None = None,
) -> Recording:
    """A recording of loads from parts [N, L, E]; later parts must have the first one's L and E.

    K comes from the model, the option, the file (`top_k`), or is taken as 1, which is noted. Raises InputError where
    there is no part, or the options contradict it.
    """
    notes = {} if notes is None else notes
    first = next(parts, None)
    if first is None:
        raise InputError(f"{path}: the recording is empty")
    _, L, E = first.shape
    if not L or not E:
        raise InputError(f"{path}: has {L} layers and {E} experts")
    if E > MOST_EXPERTS or options.experts not in (None, E):
        raise InputError(f"{path}: counts {E} experts, --experts says {options.experts or 'at most 65535'}")
    known = options.spec.top_k if options.spec else options.top_k or top_k
    if known is None:
        notes["top_k"] = "not known, taken as 1; say --top-k or --model"
    layers = layers or tuple(range(L))
    return Recording(
        kind="loads",
        layers=layers,
        num_layers=num_layers or layers[-1] + 1,
        num_experts=E,
        top_k=known or 1,
        parts=_tables(path, chain([first], parts), (L, E), options),
        notes=notes,
    )


def _tables(path: Path, parts: Iterator[Counts], shape: tuple[int, int], options: ImportOptions) -> Iterator[LoadTable]:
    step = 0
    for part in parts:
        if part.shape[1:] != shape:
            raise InputError(f"{path}: row {step} has [L, E] = {list(part.shape[1:])}, the first had {list(shape)}")
        rows = max(PART_BYTES // (8 * shape[0] * shape[1]), 1)
        for begin in range(0, len(part), rows):
            load = part[begin : begin + rows]
            yield LoadTable(
                load=load,
                step=np.arange(step, step + len(load), dtype=np.int32),
                phase=np.full(len(load), options.phase, np.uint8),
            )
            step += len(load)


def logical(count_P: Counts, physical_P: Counts, experts: int, what: str) -> Counts:
    """[E] counts of physical experts summed to logical ones. Raises InputError where the map does not fit."""
    if len(physical_P) != len(count_P):
        raise InputError(f"{what}: the map names {len(physical_P)} physical experts, there are {len(count_P)} counts")
    # Every expert has a copy; what a map names beyond that would also take memory that no file paid for.
    if experts > len(physical_P):
        raise InputError(f"{what}: the map has {len(physical_P)} physical experts for {experts} logical ones")
    if not 0 <= int(physical_P.min()) <= int(physical_P.max()) < experts:
        raise InputError(f"{what}: the map names a logical expert outside 0..{experts - 1}")
    load_E = np.zeros(experts, np.int64)
    np.add.at(load_E, physical_P, count_P)
    return load_E


def step_loads(trace: Trace, stack: str) -> Iterator[Counts]:
    """[1, L, E] the load of every recorded step: the rows of a trace of loads, or counted from tokens that follow each
    other in one step; dropped tokens do not count."""
    if trace.kind == "loads":
        for rows in trace.load_parts(stack):
            yield from np.split(rows.load, len(rows))
        return
    waiting: tuple[int, Counts] | None = None
    for part in trace.parts(stack):
        for step, load in _counted(part, trace.spec.num_experts):
            if waiting is not None and waiting[0] == step:
                waiting = step, waiting[1] + load
                continue
            if waiting is not None:
                yield waiting[1][None]
            waiting = step, load
    if waiting is not None:
        yield waiting[1][None]


def total_load(trace: Trace, stack: str) -> Counts:
    """[L, E] of the whole stack."""
    return np.asarray(sum(step[0] for step in step_loads(trace, stack)))


def _counted(part: TokenTable, experts: int) -> Iterator[tuple[int, Counts]]:
    cuts = np.flatnonzero(np.diff(part.step)) + 1
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(part)], strict=True):
        rows = part.take(slice(begin, end))
        yield int(part.step[begin]), load_LE(rows.topk_ids, experts, rows.dropped)
