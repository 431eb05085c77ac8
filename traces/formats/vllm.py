"""vLLM's routed experts (--enable-return-routed-experts): `.npy` of one request, a folder of them, or responses.

A response has `choices[i].routed_experts`, base64 of `.npy` bytes, shape (tokens - 1, layers, top_k): the last token is
never fed back, so it is not routed. Knows no loads; those are vllm_loads.py.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.numpy_files import is_npy, looks_like_ids, npy_from_bytes, open_npy
from moesim.traces.formats.routed import Known, Piece, phases, recording_of
from moesim.traces.formats.text_files import first_record, int_array, json_records
from moesim.traces.store import Trace
from moesim.traces.tokens import Phase


def recognise(path: Path) -> bool:
    """A `.npy` of ids (or a folder of them), or responses with routed experts in their choices."""
    files = _npy_files(path)
    if files:
        try:
            return looks_like_ids(open_npy(files[0]))
        except InputError:
            return False
    if path.is_dir():
        return False
    choices = first_record(path).get("choices")
    return isinstance(choices, list) and bool(choices) and "routed_experts" in choices[0]


def read(path: Path, options: ImportOptions) -> Recording:
    """Requests in order of file name, or as the responses come."""
    files = _npy_files(path)
    known = Known()
    if files:
        if path.is_dir():
            known.requests = [file.stem for file in files]
        known.notes["phase"] = f"{options.phase.name.lower()}, as the arrays do not say"
        return recording_of(path, lambda: _from_files(files, options), options, known)
    return recording_of(path, lambda: _from_responses(path, options), options, known)


def write(trace: Trace, stack: str, path: Path) -> None:
    """All tokens as one request, [T, L, K] in the trace's own dtype; what one array cannot carry is left out.

    Raises InputError where `path` exists or the trace has no tokens.
    """
    if path.exists():
        raise InputError(f"{path} exists already; choose another name")
    spec = trace.spec
    parts = trace.parts(stack)
    first = next(parts)
    tokens = sum(shard.rows for shard in trace.shards if shard.stack == stack)
    temporary = path.with_name(path.name + ".partial")
    shape = (tokens, len(spec.stack(stack).moe_layers), spec.top_k)
    try:
        array = open_memmap(temporary, mode="w+", dtype=first.topk_ids.dtype, shape=shape)
        at = 0
        for part in (first, *parts):
            array[at : at + len(part)] = part.topk_ids
            at += len(part)
        array.flush()
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _npy_files(path: Path) -> list[Path]:
    """The `.npy` at `path`, or all of a folder that holds nothing else of interest, in order of name."""
    if path.is_dir():
        return sorted(file for file in path.glob("*.npy") if file.is_file())
    return [path] if is_npy(path) else []


def _from_files(files: list[Path], options: ImportOptions) -> Iterator[Piece]:
    for request, file in enumerate(files):
        yield Piece(where=str(file), ids=open_npy(file), request=request, step=request, phase=options.phase)


def _from_responses(path: Path, options: ImportOptions) -> Iterator[Piece]:
    request = 0
    for where, response in json_records(path):
        choices = response.get("choices")
        if not isinstance(choices, list):
            raise InputError(f"{where}: a response of vLLM has 'choices'")
        prompt = response.get("prompt_token_ids")
        for choice in choices:
            if isinstance(choice, dict):
                yield _choice(f"{where}, choice {choice.get('index', 0)}", choice, prompt, request, options)
                request += 1


def _choice(where: str, choice: dict[str, Any], prompt: Any, request: int, options: ImportOptions) -> Piece:
    ids = npy_from_bytes(decoded(choice.get("routed_experts"), where), where)
    prompt = choice.get("prompt_token_ids", prompt)
    if prompt is None:
        return Piece(where=where, ids=ids, request=request, step=request, phase=options.phase)
    prompt_ids = int_array(prompt, f"{where}, prompt_token_ids", 1)
    told = int_array(choice.get("token_ids") or [], f"{where}, token_ids", 1)
    token_id = np.concatenate([prompt_ids, told])[: len(ids)]
    return Piece(
        where=where,
        ids=ids,
        request=request,
        step=request,
        token_id=token_id if len(token_id) == len(ids) else None,
        phase=phases(len(ids), len(prompt_ids)) if options.phase is Phase.PREFILL else options.phase,
    )


def decoded(text: Any, where: str) -> bytes:
    """The bytes of a base64 text. Raises InputError naming `where`."""
    if not isinstance(text, str):
        raise InputError(f"{where}: has no routed_experts; was the server told to return them?")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: routed_experts is not base64") from None


FORMAT = Format(
    name="vllm",
    summary="vLLM: routed_experts as .npy, a folder of them, or responses with base64 of them",
    recognise=recognise,
    read=read,
    write=write,
)
