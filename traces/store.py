"""Traces on disk: safetensors shards and a manifest in a folder, written so that a kill at any moment leaves a trace.

A shard is written under a temporary name, flushed to disk and renamed; then the manifest is rewritten the same way.
What the manifest does not list does not exist. Nothing is ever unpickled; shards are memory-mapped. Knows nothing about
models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moesim.traces.errors import InputError, TraceError
from moesim.traces.spec import ModelSpec
from moesim.traces.tokens import Phase, TokenTable, concat, id_dtype

FORMAT, SCHEMA_VERSION = "moetrace", 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 16
OPTIONAL = ("lookahead_ids",)
OWN_SHARD = re.compile(r"(?:encoder|decoder)-\d+\.safetensors(?:\.partial)?", re.ASCII)
"""Names that a TraceWriter gives; nothing else is ever deleted."""
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
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of the trace, as the manifest lists it."""

    name: str
    stack: str
    tokens: int
    bytes: int
    sha256: str


class TraceWriter:
    """Appends routed tokens to a new trace, shard by shard; as a context manager it completes the last shard.

    Raises InputError where `path` exists and `overwrite` is not set, or is something else than a trace.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        provenance: dict[str, Any],
        *,
        shard_tokens: int = SHARD_TOKENS,
        overwrite: bool = False,
    ) -> None:
        self.path, self.spec, self.provenance = path, spec, dict(provenance)
        self.shard_tokens = shard_tokens
        self._old = _old_files(path, overwrite)
        # Numbers go on after the replaced trace's, so that it stays whole until the new manifest is there.
        self._first_number = max((int("".join(filter(str.isdigit, name))) + 1 for name in self._old), default=0)
        self._shards: list[Shard] = []
        self._request_texts: list[str] = []
        self._waiting: dict[str, list[TokenTable]] = {stack.name: [] for stack in spec.stacks}

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

    def append(self, stack: str, table: TokenTable) -> None:
        """Add tokens of `stack`. A full shard is written at once."""
        waiting = self._waiting[stack]
        waiting.append(table)
        if sum(len(part) for part in waiting) >= self.shard_tokens:
            self._write_shard(stack)

    def close(self) -> None:
        """Write what is left. A trace without a single token is still a trace."""
        for stack in self._waiting:
            self._write_shard(stack)
        if not self._shards:
            self._write_manifest()

    def _write_shard(self, stack: str) -> None:
        waiting = self._waiting[stack]
        if not waiting:
            return
        table = concat(waiting)
        number = self._first_number + sum(shard.stack == stack for shard in self._shards)
        data = save({name: np.ascontiguousarray(column) for name, column in table.arrays().items()})
        shard = Shard(
            name=f"{stack}-{number:05d}.safetensors",
            stack=stack,
            tokens=len(table),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        if not (self.path / MANIFEST).exists():
            self._write_manifest()  # killed before the first shard is listed, this is an empty trace
        _write(self.path / shard.name, data)
        waiting.clear()
        self._shards.append(shard)
        self._write_manifest()

    def _write_manifest(self) -> None:
        texts = sorted(set(self._request_texts))
        manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "spec": self.spec.to_dict(),
            "texts": texts,
            "request_text": [texts.index(text) for text in self._request_texts],
            "provenance": self.provenance,
            "shards": [asdict(shard) for shard in self._shards],
        }
        text = json.dumps(manifest, indent=2) + "\n"
        _write(self.path / MANIFEST, text.encode())
        while self._old:
            (self.path / self._old.pop()).unlink(missing_ok=True)


class Trace:
    """A trace on disk. `open` reads the manifest; shards are read when a table is asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        try:
            self.spec = ModelSpec.from_dict(manifest["spec"])
            self.shards = tuple(_shard(entry, self.spec) for entry in _list(manifest, "shards"))
            if len({shard.name for shard in self.shards}) != len(self.shards):
                raise TraceError("a shard is listed twice")
            self.request_texts = _request_texts(_list(manifest, "texts"), _list(manifest, "request_text"))
            """Name of the text that each request comes from; empty where the recording did not say."""
            self.provenance: dict[str, Any] = dict(manifest["provenance"])
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
        if version != SCHEMA_VERSION:
            raise TraceError(f"{file}: schema_version is {version!r}, expected {SCHEMA_VERSION}")
        return cls(path, manifest)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks that have recorded tokens."""
        return tuple(s.name for s in self.spec.stacks if any(shard.stack == s.name for shard in self.shards))

    def table(self, stack: str) -> TokenTable:
        """All tokens of `stack` in the order in which they were computed. Raises TraceError for a damaged shard."""
        if stack not in self._tables:
            parts = [self._read(shard) for shard in self.shards if shard.stack == stack]
            if not parts:
                there = ", ".join(self.stacks) or "none"
                raise TraceError(f"{self.path}: no {stack} tokens were recorded; it has: {there}")
            self._tables[stack] = concat(parts)
        return self._tables[stack]

    def counts(self) -> dict[str, dict[str, int]]:
        """Stack to phase to tokens."""
        out: dict[str, dict[str, int]] = {}
        for stack in self.stacks:
            found = np.bincount(self.table(stack).phase, minlength=len(Phase))
            out[stack] = {phase.name.lower(): int(found[phase]) for phase in Phase if found[phase]}
        return out

    def leftovers(self) -> list[str]:
        """Files in the folder that the manifest does not list: what an interrupted recording left behind."""
        known = {MANIFEST, *(shard.name for shard in self.shards)}
        return sorted(entry.name for entry in self.path.iterdir() if entry.name not in known)

    def verify(self) -> Iterator[Shard]:
        """Check every shard (size, digest, columns, ranges) and yield it when it is sound.

        Raises TraceError at the first problem, naming the file, what is wrong and what to do.
        """
        for shard in self.shards:
            try:
                with (self.path / shard.name).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise self._damaged(shard, f"cannot be read ({error.strerror})") from None
            if (size := (self.path / shard.name).stat().st_size) != shard.bytes:
                raise self._damaged(shard, f"has {size} bytes, the manifest says {shard.bytes}")
            if digest != shard.sha256:
                raise self._damaged(shard, "its content has changed since it was written (SHA-256 differs)")
            self._check_ranges(shard, self._read(shard))
            yield shard

    def _read(self, shard: Shard) -> TokenTable:
        columns: dict[str, NDArray[Any]] = {}
        try:
            with safe_open(self.path / shard.name, framework="np") as file:
                names = set(file.keys())
                wanted = set(DTYPES) - (set(OPTIONAL) - names)
                if names != wanted:
                    raise self._damaged(shard, f"its columns are wrong: {', '.join(sorted(names ^ wanted))}")
                for name in sorted(names):
                    columns[name] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard, f"cannot be read ({error})") from None
        for name, column in columns.items():
            if column.dtype.type not in DTYPES[name]:
                raise self._damaged(shard, f"{name} has dtype {column.dtype}")
        try:
            table = TokenTable(**columns)
        except TraceError as error:
            raise self._damaged(shard, str(error)) from None
        L, K = len(self.spec.stack(shard.stack).moe_layers), self.spec.top_k
        if table.topk_ids.shape != (shard.tokens, L, K):
            found = list(table.topk_ids.shape)
            raise self._damaged(shard, f"holds {found} ids, the manifest says {[shard.tokens, L, K]}")
        return table

    def _check_ranges(self, shard: Shard, table: TokenTable) -> None:
        E, V = self.spec.num_experts, self.spec.vocab_size
        negative = any((column < 0).any() for column in (table.request, table.position, table.step))
        R = len(self.request_texts) or 1 << 31  # where the recording did not name texts, any request goes
        rules = {
            f"an expert id is not below {E}": (table.topk_ids >= E).any() or table.topk_ids.dtype != id_dtype(E),
            "a gate weight is not a finite number": not np.isfinite(table.topk_weights).all(),
            f"a token id is outside 0..{V - 1}": ((table.token_id < 0) | (table.token_id >= V)).any(),
            "a request, position or step is negative": negative,
            f"a request is not below {R}": (table.request >= R).any(),
            f"a phase is not one of 0..{len(Phase) - 1}": (table.phase >= len(Phase)).any(),
            f"a lookahead id is not below {E}": table.lookahead_ids is not None and (table.lookahead_ids >= E).any(),
        }
        for problem, found in rules.items():
            if found:
                raise self._damaged(shard, problem)

    def _damaged(self, shard: Shard, what: str) -> TraceError:
        return TraceError(f"{self.path / shard.name}: {what}; restore the file or record the trace again")


def _list(manifest: dict[str, Any], key: str) -> list[Any]:
    value = manifest[key]
    if not isinstance(value, list):
        raise TraceError(f"{key!r} must be a list")
    return value


def _shard(entry: Any, spec: ModelSpec) -> Shard:
    shard = Shard(**entry)
    if not isinstance(shard.name, str) or not PLAIN_NAME.fullmatch(shard.name):
        raise TraceError(f"shard name {shard.name!r} is not a plain file name")
    if type(shard.tokens) is not int or type(shard.bytes) is not int or min(shard.tokens, shard.bytes) < 0:
        raise TraceError(f"shard {shard.name}: tokens and bytes must be whole numbers")
    spec.stack(shard.stack)
    return shard


def _request_texts(texts: list[Any], request_text: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(text, str) for text in texts):
        raise TraceError("'texts' must be names")
    if not all(type(i) is int and 0 <= i < len(texts) for i in request_text):
        raise TraceError("'request_text' must number the 'texts'")
    return tuple(texts[i] for i in request_text)


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
