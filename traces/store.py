"""Traces on disk, read: a folder with a manifest and safetensors shards, of tokens or of loads without tokens.

What the manifest does not list does not exist. Nothing is ever unpickled. Everything can be read shard by shard, so
that a recording larger than memory is a stream. Writing is in writer.py; knows nothing about models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from moesim.traces.errors import TraceError
from moesim.traces.gates import Gates, gates_of_bytes
from moesim.traces.spec import ModelSpec
from moesim.traces.tokens import LoadTable, Phase, TokenTable, concat, concat_loads, id_dtype

FORMAT, SCHEMA_VERSION = "moetrace", 3
READABLE = (2, 3)
"""Schemas that are understood; 3 is 2 with router inputs and gates, where they were recorded."""
MANIFEST = "manifest.json"
Kind = Literal["tokens", "loads"]
"""Whether a trace says what every token chose, or only how many tokens each expert got."""
OPTIONAL = ("topk_weights", "token_id", "lookahead_ids", "router_input")
PLAIN_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
DTYPES: dict[str, tuple[type[np.generic], ...]] = {
    "topk_ids": (np.uint8, np.uint16),
    "topk_weights": (np.float16,),
    "dropped": (np.bool_,),
    "token_id": (np.int32,),
    "request": (np.int32,),
    "position": (np.int32,),
    "step": (np.int32,),
    "phase": (np.uint8,),
    "lookahead_ids": (np.uint8, np.uint16),
    "router_input": (np.float16,),
}
LOAD_DTYPES: dict[str, tuple[type[np.generic], ...]] = {"load": (np.int64,), "step": (np.int32,), "phase": (np.uint8,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of the trace, as the manifest lists it."""

    name: str
    stack: str
    rows: int
    """Tokens, or rows of loads."""
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFile:
    """The file that holds the gates of all stacks, as the manifest lists it."""

    name: str
    bytes: int
    sha256: str


class Trace:
    """A trace on disk. `open` reads the manifest; shards are read when a table is asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        try:
            self.spec = ModelSpec.from_dict(manifest["spec"])
            self.kind: Kind = manifest["kind"]
            if self.kind not in get_args(Kind):
                raise TraceError(f"'kind' must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
            self.shards = tuple(_shard(entry, self.spec) for entry in _list(manifest, "shards"))
            if len({shard.name for shard in self.shards}) != len(self.shards):
                raise TraceError("a shard is listed twice")
            self.request_texts = _request_texts(_list(manifest, "texts"), _list(manifest, "request_text"))
            """Name of the text that each request comes from; empty where the recording did not say."""
            self.provenance: dict[str, Any] = dict(manifest["provenance"])
            self.gate_file = _gate_file(manifest.get("gates"))
        except TraceError as error:
            raise TraceError(f"{path / MANIFEST}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path / MANIFEST}: damaged ({error!r}); record the trace again") from None
        self._tables: dict[str, TokenTable] = {}

    @classmethod
    def open(cls, path: Path | str) -> Trace:
        """Read the manifest of the trace at `path`. Raises TraceError: missing, not a trace, damaged, newer version."""
        path = Path(path)
        file = path / MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise TraceError(f"{path}: no trace there ({MANIFEST} is missing); make one with moesim record") from None
        except (OSError, ValueError, RecursionError) as error:
            raise TraceError(f"{file}: cannot be read as JSON ({error}); record the trace again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise TraceError(f"{file}: not the manifest of a moesim trace")
        version = manifest.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            raise TraceError(
                f"{file}: written by a newer moesim (schema {version}, this one reads {SCHEMA_VERSION}); upgrade moesim"
            )
        if version not in READABLE:
            raise TraceError(
                f"{file}: schema_version is {version!r}, expected {SCHEMA_VERSION}; record or import the trace again"
            )
        return cls(path, manifest)

    @property
    def model_digest(self) -> str:
        """One for the model's configuration and weights; empty where the recording does not say."""
        return files_digest(self.provenance.get("model_sha256") or {})

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks that have recorded tokens."""
        return tuple(s.name for s in self.spec.stacks if any(shard.stack == s.name for shard in self.shards))

    def parts(self, stack: str) -> Iterator[TokenTable]:
        """The tokens of `stack` shard by shard, in the order in which they were computed.

        Raises TraceError for a damaged shard, a stack that was not recorded, or a trace of loads without tokens.
        """
        if self.kind == "loads":
            raise TraceError(
                f"{self.path}: holds loads per expert and no tokens, and this needs to know what every token chose"
            )
        for shard in self._shards_of(stack):
            yield self._tokens(shard)

    def table(self, stack: str) -> TokenTable:
        """All tokens of `stack` at once. Raises TraceError as `parts` does."""
        if stack not in self._tables:
            self._tables[stack] = concat(list(self.parts(stack)))
        return self._tables[stack]

    def load_parts(self, stack: str) -> Iterator[LoadTable]:
        """The rows of a trace of loads, shard by shard. Raises TraceError where the trace holds tokens instead."""
        if self.kind != "loads":
            raise TraceError(f"{self.path}: holds tokens; their loads are counted from `parts`")
        for shard in self._shards_of(stack):
            yield self._loads(shard)

    def loads(self, stack: str) -> LoadTable:
        """All rows of a trace of loads at once. Raises TraceError as `load_parts` does."""
        return concat_loads(list(self.load_parts(stack)))

    def rows(self, stack: str) -> TokenTable | LoadTable:
        """All rows of `stack`, whatever the kind of the trace. Raises TraceError as `parts` does."""
        return self.loads(stack) if self.kind == "loads" else self.table(stack)

    def gates(self, stack: str) -> Gates | None:
        """The frozen gates of `stack`; None where they were not recorded. Raises TraceError where they are damaged."""
        if self.gate_file is None:
            return None
        try:
            return gates_of_bytes((self.path / self.gate_file.name).read_bytes(), self.spec).get(stack)
        except OSError as error:
            raise self._damaged(self.gate_file, f"cannot be read ({error.strerror})") from None
        except TraceError as error:
            raise self._damaged(self.gate_file, str(error)) from None

    def counts(self) -> dict[str, dict[str, int]]:
        """Stack to phase to rows (tokens; in a trace of loads its rows)."""
        out: dict[str, dict[str, int]] = {}
        for stack in self.stacks:
            parts: Iterator[TokenTable | LoadTable] = (
                self.load_parts(stack) if self.kind == "loads" else self.parts(stack)
            )
            found = sum((np.bincount(part.phase, minlength=len(Phase)) for part in parts), np.zeros(len(Phase), int))
            out[stack] = {phase.name.lower(): int(found[phase]) for phase in Phase if found[phase]}
        return out

    def leftovers(self) -> list[str]:
        """Files in the folder that the manifest does not list: what an interrupted recording left behind."""
        known = {MANIFEST, *(shard.name for shard in self.shards), *([self.gate_file.name] if self.gate_file else [])}
        return sorted(entry.name for entry in self.path.iterdir() if entry.name not in known)

    def verify(self) -> Iterator[Shard]:
        """Check the gates, then every shard (size, digest, columns, ranges), and yield it when it is sound.

        Raises TraceError at the first problem, naming the file, what is wrong and what to do.
        """
        if self.gate_file:
            self._check_digest(self.gate_file)
            for stack in self.stacks:
                self.gates(stack)
        for shard in self.shards:
            self._check_digest(shard)
            table = self._loads(shard) if self.kind == "loads" else self._tokens(shard)
            if problem := first_problem(table, self.spec, len(self.request_texts)):
                raise self._damaged(shard, problem)
            yield shard

    def _check_digest(self, listed: Shard | GateFile) -> None:
        try:
            with (self.path / listed.name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._damaged(listed, f"cannot be read ({error.strerror})") from None
        if (size := (self.path / listed.name).stat().st_size) != listed.bytes:
            raise self._damaged(listed, f"has {size} bytes, the manifest says {listed.bytes}")
        if digest != listed.sha256:
            raise self._damaged(listed, "its content has changed since it was written (SHA-256 differs)")

    def _shards_of(self, stack: str) -> list[Shard]:
        found = [shard for shard in self.shards if shard.stack == stack]
        if not found:
            there = ", ".join(self.stacks) or "none"
            raise TraceError(f"{self.path}: nothing was recorded of stack {stack!r}; it has: {there}")
        return found

    def _read(self, shard: Shard, dtypes: dict[str, tuple[type[np.generic], ...]]) -> dict[str, NDArray[Any]]:
        columns: dict[str, NDArray[Any]] = {}
        try:
            with safe_open(self.path / shard.name, framework="np") as file:
                names = set(file.keys())
                wanted = set(dtypes) - (set(OPTIONAL) - names)
                if names != wanted:
                    raise self._damaged(shard, f"its columns are wrong: {', '.join(sorted(names ^ wanted))}")
                for name in sorted(names):
                    columns[name] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard, f"cannot be read ({error})") from None
        for name, column in columns.items():
            if column.dtype.type not in dtypes[name]:
                raise self._damaged(shard, f"{name} has dtype {column.dtype}")
        return columns

    def _tokens(self, shard: Shard) -> TokenTable:
        try:
            table = TokenTable(**self._read(shard, DTYPES))
        except TraceError as error:
            raise self._damaged(shard, str(error)) from None
        self._check_shape(shard, table.topk_ids.shape, self.spec.top_k)
        return table

    def _loads(self, shard: Shard) -> LoadTable:
        try:
            table = LoadTable(**self._read(shard, LOAD_DTYPES))
        except TraceError as error:
            raise self._damaged(shard, str(error)) from None
        self._check_shape(shard, table.load.shape, self.spec.num_experts)
        return table

    def _check_shape(self, shard: Shard, found: tuple[int, ...], width: int) -> None:
        expected = (shard.rows, len(self.spec.stack(shard.stack).moe_layers), width)
        if found != expected:
            raise self._damaged(shard, f"its shape is {list(found)}, the manifest says {list(expected)}")

    def _damaged(self, shard: Shard | GateFile, what: str) -> TraceError:
        return TraceError(f"{self.path / shard.name}: {what}; restore the file or record the trace again")


def files_digest(sha256: dict[str, str]) -> str:
    """SHA-256 over the names and digests of a model's files; empty where there are none."""
    listed = json.dumps(sha256, sort_keys=True).encode()
    return hashlib.sha256(listed).hexdigest() if sha256 else ""


def first_problem(table: TokenTable | LoadTable, spec: ModelSpec, requests: int) -> str | None:
    """What breaks a rule of traces in these rows, in words; None where nothing does. `requests` is the number of
    requests whose text is named, 0 where none is."""
    rules: dict[str, Any] = {f"a phase is not one of 0..{len(Phase) - 1}": (table.phase >= len(Phase)).any()}
    if isinstance(table, LoadTable):
        rules["a load or step is negative"] = (table.load < 0).any() or (table.step < 0).any()
    else:
        E, V, R = spec.num_experts, spec.vocab_size or 1 << 31, requests or 1 << 31
        weights, tokens, ahead = table.topk_weights, table.token_id, table.lookahead_ids
        given = table.router_input
        negative = any((column < 0).any() for column in (table.request, table.position, table.step))
        rules |= {
            f"an expert id is not below {E}": (table.topk_ids >= E).any() or table.topk_ids.dtype != id_dtype(E),
            "a gate weight is not a finite number": weights is not None and not np.isfinite(weights).all(),
            f"a token id is outside 0..{V - 1}": tokens is not None and ((tokens < 0) | (tokens >= V)).any(),
            "a request, position or step is negative": negative,
            f"a request is not below {R}": (table.request >= R).any(),
            f"a lookahead id is not below {E}": ahead is not None and (ahead >= E).any(),
            "a router input is not a finite number": given is not None and not np.isfinite(given).all(),
        }
    return next((problem for problem, found in rules.items() if found), None)


def _list(manifest: dict[str, Any], key: str) -> list[Any]:
    value = manifest[key]
    if not isinstance(value, list):
        raise TraceError(f"{key!r} must be a list")
    return value


def _shard(entry: Any, spec: ModelSpec) -> Shard:
    shard = Shard(**entry)
    if not isinstance(shard.name, str) or not PLAIN_NAME.fullmatch(shard.name):
        raise TraceError(f"shard name {shard.name!r} is not a plain file name")
    if type(shard.rows) is not int or type(shard.bytes) is not int or min(shard.rows, shard.bytes) < 0:
        raise TraceError(f"shard {shard.name}: rows and bytes must be whole numbers")
    spec.stack(shard.stack)
    return shard


def _gate_file(entry: Any) -> GateFile | None:
    if entry is None:
        return None
    file = GateFile(**entry)
    if not isinstance(file.name, str) or not PLAIN_NAME.fullmatch(file.name):
        raise TraceError(f"gate file name {file.name!r} is not a plain file name")
    return file


def _request_texts(texts: list[Any], request_text: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(text, str) for text in texts):
        raise TraceError("'texts' must be names")
    if not all(type(i) is int and 0 <= i < len(texts) for i in request_text):
        raise TraceError("'request_text' must number the 'texts'")
    return tuple(texts[i] for i in request_text)
