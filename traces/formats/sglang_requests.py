"""SGLang's routed experts of a request: responses with `meta_info.routed_experts`, base64 of raw int32.

The array is flat, (tokens - 1) x layers x top_k numbers, so layers and K must be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.routed import Known, Piece, phases, recording_of
from moesim.traces.formats.text_files import first_record, json_records
from moesim.traces.formats.vllm import decoded


def recognise(path: Path) -> bool:
    """Responses whose meta_info has routed experts."""
    about = first_record(path).get("meta_info") if path.is_file() else None
    return isinstance(about, dict) and "routed_experts" in about


def read(path: Path, options: ImportOptions) -> Recording:
    """One request a response. Raises InputError where layers or K are not given."""
    L, K = options.layers, options.top_k
    if options.spec is not None:
        # SGLang returns a row for every layer of the model, dense ones as zeros.
        stack = options.spec.stack(options.stack or "decoder")
        L, K = L or stack.num_layers, K or options.spec.top_k
    if L is None or K is None:
        raise InputError(f"{path}: the arrays are flat; give --model, or --layers and --top-k")
    shape = (L, K)
    return recording_of(path, lambda: _pieces(path, shape), options, Known())


def _pieces(path: Path, shape: tuple[int, int]) -> Iterator[Piece]:
    for request, (where, response) in enumerate(json_records(path)):
        about = response.get("meta_info")
        if not isinstance(about, dict):
            raise InputError(f"{where}: a response of SGLang has 'meta_info'")
        data = decoded(about.get("routed_experts"), where)
        row = 4 * shape[0] * shape[1]
        if len(data) % row:
            raise InputError(
                f"{where}: {len(data)} bytes are not int32 tokens x {shape[0]} layers x {shape[1]}: are --layers (all "
                "layers of the model) and --top-k right?"
            )
        ids = np.frombuffer(data, "<i4").reshape(-1, *shape)
        prompt = about.get("prompt_tokens")
        tokens = prompt if type(prompt) is int and prompt >= 0 else len(ids)
        yield Piece(where=where, ids=ids, request=request, step=request, phase=phases(len(ids), tokens))


FORMAT = Format(
    name="sglang-requests",
    summary="SGLang: responses with meta_info.routed_experts, base64 of int32",
    recognise=recognise,
    read=read,
)
