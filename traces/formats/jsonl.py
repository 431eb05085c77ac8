"""JSON lines of per-token loggers (for vLLM): a `meta` row, then one row for each request, token and layer.

Rows of several requests may be interleaved. Rows of one token are kept until all its layers have come, so memory is
bounded by the tokens that are open at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.traces.errors import InputError
from moesim.traces.formats.base import PART_TOKENS, Format, ImportOptions, Recording
from moesim.traces.formats.routed import Known, Piece, recording_of
from moesim.traces.formats.text_files import first_record, int_array, json_lines, replacing
from moesim.traces.store import Trace

FIELDS = {"req_id", "token_idx", "layer", "topk_ids"}
MOST_OPEN = 1 << 16
"""Tokens that may lack layers at once."""

Token = tuple[int, int]
"""(request, position)."""
Rows = dict[int, tuple[list[int], list[float] | None]]
"""Layer to ids and weights."""


def recognise(path: Path) -> bool:
    """A first line that says meta, or a row."""
    first = first_record(path) if path.is_file() else {}
    return _is_meta(first) or first.keys() >= FIELDS


def read(path: Path, options: ImportOptions) -> Recording:
    """Tokens in the order in which they are complete; requests are numbered as they first appear."""
    known = Known(layers=_layers(path))
    known.notes["phase"] = f"{options.phase.name.lower()}, as the rows do not say"
    layers = known.layers or ()
    return recording_of(path, lambda: _pieces(path, layers, options), options, known)


def write(trace: Trace, stack: str, path: Path) -> None:
    """Requests, positions, ids and weights; the rest is left out. Raises InputError where `path` exists or the trace
    has no tokens."""
    spec = trace.spec
    layers = spec.stack(stack).moe_layers
    parts = trace.parts(stack)
    with replacing(path) as file:
        meta = {"meta": True, "layers": list(layers), "num_experts": spec.num_experts, "top_k": spec.top_k}
        file.write(json.dumps(meta).encode() + b"\n")
        for part in parts:
            for t in range(len(part)):
                for i, layer in enumerate(layers):
                    row: dict[str, Any] = {
                        "req_id": str(part.request[t]),
                        "token_idx": int(part.position[t]),
                        "layer": layer,
                        "topk_ids": part.topk_ids[t, i].tolist(),
                    }
                    if part.topk_weights is not None:
                        row["topk_weights"] = part.topk_weights[t, i].tolist()
                    file.write(json.dumps(row).encode() + b"\n")


def _is_meta(record: dict[str, Any]) -> bool:
    return "meta" in record or record.get("type") == "meta"


def _layers(path: Path) -> tuple[int, ...]:
    """The layers of the meta row, else those of the first token (all its rows, wherever they stand)."""
    found: set[int] = set()
    first: Any = None
    for number, record in json_lines(path):
        if _is_meta(record):
            layers = record.get("layers")
            if isinstance(layers, list):
                return tuple(sorted(int_array(layers, f"{path}, line {number}, layers", 1).tolist()))
            continue
        key = (record.get("req_id"), record.get("token_idx"))
        first = key if first is None else first
        if key == first:
            found.add(_layer(record, f"{path}, line {number}"))
        elif number > 1 << 20:
            break
    if not found:
        raise InputError(f"{path}: has no rows")
    return tuple(sorted(found))


def _pieces(path: Path, layers: tuple[int, ...], options: ImportOptions) -> Iterator[Piece]:
    requests: dict[str, int] = {}
    open_tokens: dict[Token, Rows] = {}
    done: list[tuple[Token, Rows]] = []
    for number, record in json_lines(path):
        where = f"{path}, line {number}"
        if _is_meta(record):
            continue
        if missing := sorted(FIELDS - record.keys()):
            raise InputError(f"{where}: lacks the field {missing[0]!r}")
        position = record["token_idx"]
        if type(position) is not int:
            raise InputError(f"{where}: 'token_idx' must be a whole number")
        token = requests.setdefault(str(record["req_id"]), len(requests)), position
        rows = open_tokens.setdefault(token, {})
        layer = _layer(record, where)
        if layer in rows or layer not in layers:
            problem = "comes twice" if layer in rows else f"is not one of {list(layers)[:40]}"
            raise InputError(
                f"{where}: layer {layer} of request {str(record['req_id'])[:40]!r}, token {position} {problem}"
            )
        rows[layer] = record["topk_ids"], record.get("topk_weights")
        if len(rows) == len(layers):
            done.append((token, open_tokens.pop(token)))
        if len(open_tokens) > MOST_OPEN:
            raise InputError(f"{where}: {MOST_OPEN:,} tokens lack layers; are the rows of a token close together?")
        if len(done) == PART_TOKENS:
            yield _piece(path, done, options)
            done = []
    if done:
        yield _piece(path, done, options)
    if open_tokens:
        (request, position), rows = next(iter(open_tokens.items()))
        name = list(requests)[request][:40]
        raise InputError(f"{path}: request {name!r}, token {position} has {len(rows)} of {len(layers)} layers")


def _piece(path: Path, done: list[tuple[Token, Rows]], options: ImportOptions) -> Piece:
    (request, position), _ = done[0]
    where = f"{path}, tokens from number {position} of request {request}"
    per_token = [[rows[layer] for layer in sorted(rows)] for _, rows in done]
    ids = int_array([[ids for ids, _ in token] for token in per_token], where, 3)
    weights = None
    if all(w is not None for token in per_token for _, w in token):
        try:
            weights = np.array([[w for _, w in token] for token in per_token], np.float64)
        except (ValueError, TypeError):
            raise InputError(f"{where}: gate weights must be numbers, as many as ids") from None
    tokens = np.array([token for token, _ in done], np.float64)
    if not (np.abs(tokens) < 1 << 31).all():
        raise InputError(f"{where}: a token_idx is outside 0..{(1 << 31) - 1}")
    return Piece(
        where=where,
        ids=ids,
        weights=weights,
        request=tokens[:, 0].astype(np.int64),
        position=tokens[:, 1].astype(np.int64),
        step=0,
        phase=options.phase,
    )


def _layer(record: dict[str, Any], where: str) -> int:
    layer = record.get("layer")
    if type(layer) is not int or not 0 <= layer < 4096:
        raise InputError(f"{where}: 'layer' must be a layer number, got {str(layer)[:40]!r}")
    return layer


FORMAT = Format(
    name="jsonl",
    summary="loggers: JSON lines of req_id, token_idx, layer, topk_ids, topk_weights after a meta row",
    recognise=recognise,
    read=read,
    write=write,
)
