"""JSON, JSON lines and CSV that nobody vouches for, read with bounds; and files written complete or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError

MOST_LINE = 1 << 26
MOST_FILE = 1 << 30


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank, as a stream. Raises InputError naming the line."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MOST_LINE + 1):
                number += 1
                if len(line) > MOST_LINE:
                    raise InputError(f"{path}, line {number}: longer than {MOST_LINE >> 20} MiB")
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def json_file(path: Path, most: int = MOST_FILE) -> Any:
    """The content of a JSON file of at most `most` bytes. Raises InputError: unreadable, too large, not JSON."""
    try:
        if path.stat().st_size > most:
            raise InputError(f"{path}: larger than {most >> 20} MiB; give it as JSON lines")
        return _parsed(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of JSON lines, or of one JSON document: an object, or a list of objects."""
    if first_line_is_json(path):
        for number, record in json_lines(path):
            yield f"{path}, line {number}", record
        return
    content = json_file(path)
    for i, record in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(record, dict):
            raise InputError(f"{path}, entry {i}: not a JSON object")
        yield f"{path}, entry {i}", record


def first_record(path: Path) -> dict[str, Any]:
    """The first object of a JSON or JSON-lines file, for recognition; empty where there is none. Never raises."""
    try:
        with path.open("rb") as file:
            line = file.readline(MOST_LINE)
        if not line.lstrip().startswith((b"{", b"[")):
            return {}
        found = _parsed(line, "") if first_line_is_json(path) else json_file(path)
    except (InputError, OSError):
        return {}
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else {}


def first_line_is_json(path: Path) -> bool:
    """Whether the first line is an object by itself, as in JSON lines."""
    try:
        with path.open("rb") as file:
            line = file.readline(MOST_LINE)
        return line.lstrip().startswith(b"{") and isinstance(_parsed(line, ""), dict)
    except (InputError, OSError):
        return False


def csv_header(path: Path) -> tuple[str, ...]:
    """The names in the first line, lower case; empty where it is not text. Never raises."""
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 12).decode("ascii")
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(name.strip().lower() for name in line.split(","))


def csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(line number from 1, integers of `columns`) of every row below the header, as a stream. Raises InputError naming
    the line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip().lower() for name in next(rows, [])]
            if missing := [name for name in columns if name not in header]:
                raise InputError(f"{path}: the header lacks {missing[0]!r}; it must name {','.join(columns)}")
            at = [header.index(name) for name in columns]
            for row in rows:
                if row:
                    yield rows.line_num, tuple(_integer(row[i]) for i in at)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(f"{path}, line {rows.line_num}: not a row of whole numbers ({error})") from None


def int_array(value: Any, what: str, ndim: int) -> NDArray[np.int64]:
    """A nested list of integers as an array. Raises InputError naming `what`: ragged, not integers, out of range."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        raise InputError(f"{what}: ragged, its rows differ in length") from None
    if array.size == 0 and array.ndim == ndim:
        return array.astype(np.int64)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise InputError(f"{what}: must be whole numbers in {ndim} dimensions, got {array.dtype} in {array.ndim}")
    if array.dtype == np.uint64:
        raise InputError(f"{what}: a number is larger than 64 bits hold")
    return array.astype(np.int64)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well. Raises InputError where there is one already."""
    if path.exists():
        raise InputError(f"{path} exists already; choose another name")
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _object(line: bytes, what: str) -> dict[str, Any]:
    found = _parsed(line, what)
    if not isinstance(found, dict):
        raise InputError(f"{what}: not a JSON object")
    return found


def _parsed(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: not JSON ({str(error)[:80]})") from None


def _integer(text: str) -> int:
    number = int(text)
    if abs(number) >= 1 << 53:
        raise ValueError(f"{text[:20]} is too large")
    return number
