"""The folder of a sweep: a manifest, one Parquet file for each finished run, and their table.

    sweep.json               what is asked for, and digests of what it depends on
    runs/KEY.parquet         one row, written to a temporary name and renamed: a run is there whole or not at all
    table.parquet            all rows with their speedup, written when the sweep ends or is interrupted
    traces/                  made-up traces, where the sweep asked for some

The file's name is the run's key, so no run can be there twice. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from moesim.sim.policies import recipe, recipe_digest
from moesim.sim.profile import load_profile
from moesim.sim.sweep import NUMBERS, TYPES, Row, Settings
from moesim.traces import InputError
from moesim.traces.store import MANIFEST as TRACE_MANIFEST
from moesim.traces.store import Trace
from moesim.traces.versions import version

FORMAT, VERSION = "moesim-sweep", 1
MANIFEST, RUNS, TABLE, TRACES = "sweep.json", "runs", "table.parquet", "traces"
PARTIAL = ".partial"


def extra(module: str, name: str, what: str) -> Any:
    """The module of an optional package. Raises InputError saying how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"{what} needs {module.split('.', maxsplit=1)[0]}: pip install 'moesim[{name}]'") from None


class Store:
    """The rows of one sweep on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrow = extra("pyarrow", "sweep", "a sweep's table")
        self._parquet = extra("pyarrow.parquet", "sweep", "a sweep's table")
        kinds = {str: self._arrow.string(), int: self._arrow.int64(), float: self._arrow.float64()}
        kinds[bool] = self._arrow.bool_()
        columns = {"key": str, **{name: kind[0] for name, kind in TYPES.items()}, **NUMBERS}
        self._schema = self._arrow.schema([(name, kinds[kind]) for name, kind in columns.items()])

    def open(self, manifest: dict[str, Any]) -> None:
        """Begin a sweep in the folder, or go on with it. Raises InputError where something else is there, or the same
        sweep of other settings or inputs."""
        file = self.folder / MANIFEST
        if file.exists():
            self._check(json_of(file), manifest)
        elif self.folder.exists() and any(entry.name != TRACES for entry in self.folder.iterdir()):
            raise InputError(f"{self.folder}: is no sweep and not empty; give --out a new folder")
        try:
            (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
            for left_over in (self.folder / RUNS).glob("*" + PARTIAL):
                left_over.unlink()
            if not file.exists():
                _write(file, (json.dumps(manifest, indent=1) + "\n").encode())
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror})") from None

    def _check(self, found: dict[str, Any], manifest: dict[str, Any]) -> None:
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise InputError(f"{self.folder / MANIFEST}: not a sweep that this moesim reads; give --out a new folder")
        wanted = json.loads(json.dumps(manifest))
        changed = [
            f"{part} {name}" if isinstance(wanted[part], dict) else part
            for part in wanted
            for name in (_differing(found.get(part), wanted[part]))
        ]
        if changed:
            raise InputError(
                f"{self.folder}: holds a sweep of something else, changed since: {', '.join(changed)}; give --out "
                "another folder, or delete this one"
            )

    def save(self, row: Row) -> None:
        """Keep the row of a finished run, whole or not at all."""
        table = self._arrow.Table.from_pylist([row], schema=self._schema)
        sink = self._arrow.BufferOutputStream()
        self._parquet.write_table(table, sink, write_page_checksum=True, compression="none")
        _write(self.folder / RUNS / f"{row['key']}.parquet", sink.getvalue())

    def row(self, key: str) -> Row | None:
        """The row of a run; None where it has not finished. A damaged file counts as none, and is removed."""
        path = self.folder / RUNS / f"{key}.parquet"
        try:
            with self._parquet.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read()
            if table.schema.equals(self._schema):
                (row,) = table.to_pylist()
                if row["key"] == key:
                    return dict(row)
        except FileNotFoundError:
            return None
        except (self._arrow.ArrowException, OSError, ValueError):
            pass
        path.unlink()
        return None

    def write_table(self, rows: Sequence[Row]) -> Path:
        """All rows as one Parquet file. Raises InputError where it cannot be written."""
        path = self.folder / TABLE
        schema = self._schema.append(self._arrow.field("speedup", self._arrow.float64()))
        sink = self._arrow.BufferOutputStream()
        self._parquet.write_table(self._arrow.Table.from_pylist(list(rows), schema=schema), sink)
        try:
            _write(path, sink.getvalue())
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        return path


def with_speedup(found: Mapping[Settings, Row | None], baseline: str | None) -> list[Row]:
    """The rows that there are, each with its `speedup`: time of the baseline's run over its own; None where either has
    no time, and where what is computed is not what the model computes: a sweep measures no quality."""
    rows = []
    for one, row in found.items():
        if row is not None:
            base = (found.get(one.baseline(baseline)) or {}).get("total_s")
            fair = base and row["total_s"] and not row["lossy"]
            rows.append({**row, "speedup": base / row["total_s"] if fair else None})
    return rows


def manifest_of(axes: Mapping[str, Sequence[Any]], baseline: str | None, search: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep depends on: what is asked for, and digests of traces, profiles and policies. A trace's digest is
    that of its manifest, which lists those of its shards. Raises InputError for what cannot be read."""
    policies = dict.fromkeys([*axes["policy"], *([baseline] if baseline else [])])
    return {
        "format": FORMAT,
        "version": VERSION,
        "moesim": version("moesim"),
        "baseline": baseline,
        "axes": {name: list(values) for name, values in axes.items()},
        "search": dict(search),
        "traces": {path: trace_digest(Path(path)) for path in axes["trace"]},
        "profiles": {name: _digest(json.dumps(asdict(load_profile(name)))) for name in axes["profile"]},
        "policies": {name: recipe_digest(recipe(name)) or name for name in policies},
    }


def trace_digest(path: Path) -> str:
    """SHA-256 of the manifest of the trace at `path`. Raises TraceError where there is none."""
    Trace.open(path)
    return hashlib.sha256((path / TRACE_MANIFEST).read_bytes()).hexdigest()


def json_of(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); give --out a new folder") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: not the manifest of a sweep; give --out a new folder")
    return found


def _differing(found: Any, wanted: Any) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [name for name in {**wanted, **found} if found.get(name) != wanted.get(name) or name not in found]
    return [] if found == wanted else [""]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, data: Any) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    temporary.write_bytes(data)
    temporary.replace(path)
