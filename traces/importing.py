"""A foreign recording becomes a trace: recognised, read as a stream, cleaned, written, and all of that noted.

What the formats are is in formats/, what is no traffic in cleaning.py; this knows how a recording's shape and what the
user says of the model become one model spec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.cleaning import Cleaner
from moesim.traces.errors import InputError
from moesim.traces.formats import FORMATS, Format, ImportOptions, Recording, recognise
from moesim.traces.spec import ModelSpec, StackSpec
from moesim.traces.store import Trace, first_problem
from moesim.traces.tokens import LoadTable, TokenTable
from moesim.traces.versions import version
from moesim.traces.writer import TraceWriter

Progress = Callable[[int, int | None], None]
"""Takes (rows done, rows in all where that is known)."""


def import_recording(
    path: Path,
    out: Path,
    *,
    format: str | None = None,  # noqa: A002 # the word of the command line
    options: ImportOptions | None = None,
    keep_warmup: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Write the recording at `path` (a file or folder) as the trace `out`, and open that.

    `format` is recognised by content where it is None. Memory stays bounded by a shard, whatever the recording's size,
    but for formats whose files can only be read whole (`.pt` of SGLang, `.npz`): those need as much as they hold.
    Raises InputError where the recording is not readable or empty, contradicts `options`, or nothing is left of it;
    then `out` is as it was before, or holds the rows up to the damaged place.
    """
    options = options or ImportOptions()
    known = _named(format) if format else recognise(path)
    assert known.read is not None, "looked up among the formats that can be read"
    recording = known.read(path, options)
    _drop_dense_layers(recording)
    spec, stack = _spec(path, known, recording, options)
    cleaner = Cleaner(recording.top_k, keep=keep_warmup)
    about: dict[str, Any] = {"format": known.name, **_digest(path), "complete": False}
    provenance = {
        "import": about,
        "versions": {name: version(name) for name in ("moesim", "numpy")},
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with TraceWriter(out, spec, provenance, kind=recording.kind, overwrite=overwrite) as writer:
        for part in cleaner.clean(recording.parts):
            # What a reader missed ends here: nothing that breaks a rule of traces is written.
            if problem := first_problem(part, spec, len(recording.requests)):
                raise InputError(f"{path}: {problem}")
            writer.append(stack, part)
            if progress:
                progress(cleaner.found.rows, None)
        if not cleaner.found.left:
            raise InputError(f"{path}: {_nothing_left(cleaner)}")
        about.update(notes=recording.notes, cleaning=cleaner.found.to_dict(), complete=True)
        writer.add_requests(recording.requests)
    return Trace.open(out)


def _named(name: str) -> Format:
    known = FORMATS.get(name)
    if known is None or known.read is None:
        readable = ", ".join(f.name for f in FORMATS.values() if f.read)
        raise InputError(f"--format {name}: not a format that can be imported; known: {readable}")
    return known


def _nothing_left(cleaner: Cleaner) -> str:
    found = cleaner.found
    if not found.warmup + found.padding:
        return "the recording is empty"
    return (
        f"all {found.rows} rows look like warm-up or padding (every token chooses the same experts); import them "
        "anyway with --keep-warmup"
    )


def _spec(path: Path, known: Format, recording: Recording, options: ImportOptions) -> tuple[ModelSpec, str]:
    """(what the trace says of the model, name of the stack that was recorded)."""
    stack = options.stack or recording.stack
    given = options.spec or recording.spec
    if given is None:
        layers = StackSpec(name=stack, num_layers=recording.num_layers, moe_layers=recording.layers)
        return ModelSpec.of_routing(f"imported:{known.name}", recording.num_experts, recording.top_k, layers), stack
    found = {
        "experts": recording.num_experts,
        "experts per token": recording.top_k,
        "MoE layers": len(recording.layers),
    }
    said = {
        "experts": given.num_experts,
        "experts per token": given.top_k,
        "MoE layers": len(given.stack(stack).moe_layers),
    }
    for what, number in found.items():
        if number != said[what]:
            raise InputError(f"{path}: the recording has {number} {what}, the model of --model has {said[what]}")
    return given, stack


def _drop_dense_layers(recording: Recording) -> None:
    """Take the layers without experts out of a recording that fills them with zeros.

    SGLang and vLLM return one row for every layer of the model. A layer in which every token of the first part has
    the same expert K times is no MoE layer. Top-1 recordings do not show it.
    """
    parts: Iterator[Any] = recording.parts
    first = next(parts, None)
    if first is None:
        return
    parts = chain([first], parts)
    recording.parts = parts
    if isinstance(first, LoadTable) or recording.top_k == 1:
        return
    routed_L = (first.topk_ids != first.topk_ids[:, :, :1]).any(axis=(0, 2))
    if routed_L.all() or not routed_L.any():
        return  # nothing but padding is for the cleaner to say
    recording.notes["dense_layers"] = [recording.layers[i] for i in np.flatnonzero(~routed_L)]
    recording.layers = tuple(recording.layers[i] for i in np.flatnonzero(routed_L))
    recording.parts = (_layers(part, routed_L) for part in parts)


def _layers(part: TokenTable, keep_L: NDArray[np.bool_]) -> TokenTable:
    weights = None if part.topk_weights is None else part.topk_weights[:, keep_L]
    return replace(part, topk_ids=part.topk_ids[:, keep_L], topk_weights=weights, dropped=part.dropped[:, keep_L])


def _digest(path: Path) -> dict[str, Any]:
    """Number, bytes and SHA-256 of the recording's files (names and contents, in order of name)."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    size = 0
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        with file.open("rb") as content:
            digest.update(f"{name}\0".encode() + hashlib.file_digest(content, "sha256").digest())
        size += file.stat().st_size
    return {"source": path.name, "files": len(files), "bytes": size, "sha256": digest.hexdigest()}
