"""Traces on disk, written so that a kill at any moment leaves a trace.

A shard is written under a temporary name, flushed to disk and renamed; then the manifest is rewritten the same way.
What the manifest does not list does not exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors.numpy import save

from moesim.traces.errors import InputError
from moesim.traces.gates import Gates, gates_to_bytes
from moesim.traces.spec import ModelSpec
from moesim.traces.store import FORMAT, MANIFEST, SCHEMA_VERSION, GateFile, Kind, Shard
from moesim.traces.tokens import LoadTable, TokenTable, concat, concat_loads

SHARD_TOKENS, SHARD_BYTES = 1 << 16, 1 << 28
OWN_SHARD = re.compile(r"(?:encoder|decoder|gates)-\d+\.safetensors(?:\.partial)?", re.ASCII)
"""Names that a TraceWriter gives; nothing else is ever deleted."""


class TraceWriter:
    """Appends tokens (or loads) to a new trace, shard by shard; as a context manager it completes the last shard.

    A shard is full at `shard_tokens` rows, or earlier where rows are wide. `provenance` may grow until the end. `gates`
    are those of every stack, where predictors may use them.

    Raises InputError where `path` exists and `overwrite` is not set, or is something else than a trace.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        provenance: dict[str, Any],
        *,
        kind: Kind = "tokens",
        shard_tokens: int = SHARD_TOKENS,
        overwrite: bool = False,
        gates: Mapping[str, Gates] | None = None,
    ) -> None:
        self.path, self.spec, self.provenance, self.kind = path, spec, dict(provenance), kind
        self.shard_tokens = shard_tokens
        self._gates = gates
        self._gate_file: GateFile | None = None
        self._old = _old_files(path, overwrite)
        # Numbers go on after the replaced trace's, so that it stays whole until the new manifest is there.
        self._first_number = max((int("".join(filter(str.isdigit, name))) + 1 for name in self._old), default=0)
        self._shards: list[Shard] = []
        self._request_texts: list[str] = []
        self._waiting: dict[str, list[TokenTable] | list[LoadTable]] = {stack.name: [] for stack in spec.stacks}

    def __enter__(self) -> TraceWriter:
        with _writing(self.path):  # a wrong place is found out now, not after the first hour of recording
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # With nothing recorded, a failure must not put an empty trace in the place of an older one.
        if kind is None or self._shards or any(self._waiting.values()):
            self.close()

    def add_requests(self, texts: list[str]) -> None:
        """Name the text that each of the next requests comes from; requests are numbered from 0."""
        self._request_texts += texts

    def append(self, stack: str, table: TokenTable | LoadTable) -> None:
        """Add rows of `stack`, of the trace's kind. A full shard is written at once."""
        waiting: list[Any] = self._waiting[stack]
        waiting.append(table)
        wide = sum(column.nbytes for part in waiting for column in part.arrays().values()) >= SHARD_BYTES
        if wide or sum(len(part) for part in waiting) >= self.shard_tokens:
            self._write_shard(stack)

    def close(self) -> None:
        """Write what is left, and the manifest with what is known by now. A trace without a token is still a trace."""
        for stack in self._waiting:
            self._write_shard(stack)
        self._write_manifest()

    def _write_shard(self, stack: str) -> None:
        waiting: list[Any] = self._waiting[stack]
        if not waiting:
            return
        table: TokenTable | LoadTable = concat_loads(waiting) if self.kind == "loads" else concat(waiting)
        number = self._first_number + sum(shard.stack == stack for shard in self._shards)
        data = save({name: np.ascontiguousarray(column) for name, column in table.arrays().items()})
        shard = Shard(
            name=f"{stack}-{number:05d}.safetensors",
            stack=stack,
            rows=len(table),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        if not (self.path / MANIFEST).exists():
            self._write_manifest()  # killed before the first shard is listed, this is an empty trace
        _write(self.path / shard.name, data)
        waiting.clear()
        self._shards.append(shard)
        self._write_manifest()

    def _write_gates(self, gates: Mapping[str, Gates]) -> None:
        data = gates_to_bytes(gates)
        name = f"gates-{self._first_number:05d}.safetensors"
        _write(self.path / name, data)
        self._gate_file = GateFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _write_manifest(self) -> None:
        if self._gates is not None and self._gate_file is None:
            self._write_gates(self._gates)
        texts = sorted(set(self._request_texts))
        manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "spec": self.spec.to_dict(),
            "texts": texts,
            "request_text": [texts.index(text) for text in self._request_texts],
            "provenance": self.provenance,
            "gates": asdict(self._gate_file) if self._gate_file else None,
            "shards": [asdict(shard) for shard in self._shards],
        }
        text = json.dumps(manifest, indent=2) + "\n"
        _write(self.path / MANIFEST, text.encode())
        while self._old:
            (self.path / self._old.pop()).unlink(missing_ok=True)


def _old_files(path: Path, overwrite: bool) -> list[str]:
    """Files of the trace that will be replaced. Raises InputError where nothing may be replaced."""
    if not path.exists():
        return []
    if not overwrite:
        raise InputError(f"{path} exists already; choose another name, or replace it with --force")
    if not path.is_dir() or not _is_trace(path):
        raise InputError(f"{path} is not a trace, so it will not be replaced; choose another name")
    return [entry.name for entry in path.iterdir() if OWN_SHARD.fullmatch(entry.name)]


def _is_trace(path: Path) -> bool:
    """Whether the folder is a trace or empty. Other programs have a manifest.json, too, so its content decides."""
    if not [entry for entry in path.iterdir() if entry.name != MANIFEST + ".partial"]:
        return True
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _write(final: Path, data: bytes) -> None:
    """Write `data` beside `final`, push it to the disk and rename it: `final` is there whole or not at all."""
    temporary = final.with_name(final.name + ".partial")
    with _writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or choose another place") from None
