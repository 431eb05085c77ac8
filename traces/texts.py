"""Where the text of a recording comes from: files, standard input, or a data set of the `datasets` library.

A `Text` has the name by which requests and splits call it and one or many documents, read one at a time, so that a
limit on tokens also limits what is fetched. Knows nothing about tokens.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moesim.traces.errors import InputError

STDIN = Path("-")
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""File suffix to the reader of the `datasets` library."""


class Text:
    """A named text: its documents, and a digest of what was read of them so far."""

    def __init__(self, name: str, documents: Iterable[str], origin: dict[str, Any] | None = None) -> None:
        self.name = name
        self._documents = documents
        self._origin = origin
        self._start_count()

    def documents(self) -> Iterator[str]:
        """The documents, one at a time; counting starts anew."""
        self._start_count()
        for document in self._documents:
            data = document.encode("utf-8", "surrogatepass")
            self._count += 1
            self._bytes += len(data)
            self._digest.update(data)
            yield document

    def about(self) -> dict[str, Any]:
        """Bytes and SHA-256 of all that was read, for the provenance of a recording."""
        read = {"bytes": self._bytes, "sha256": self._digest.hexdigest()}
        return read if self._origin is None else {**self._origin, "documents": self._count, **read}

    def _start_count(self) -> None:
        self._count, self._bytes, self._digest = 0, 0, hashlib.sha256()


def read_texts(paths: list[Path]) -> list[Text]:
    """One text a file; a folder stands for its .txt files, `-` for standard input.

    Raises InputError: missing, empty, not UTF-8, two of a name.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: the folder has no .txt file")
        files += found
    texts = [_read_file(file) for file in files]
    check_names(texts)
    return texts


def check_names(texts: list[Text]) -> None:
    """Raise InputError where two texts have one name: requests could not be told apart."""
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two texts are called {name}; rename one")


def _read_file(file: Path) -> Text:
    name = "standard input" if file == STDIN else str(file)
    try:  # as bytes: line ends stay as they are, and so does the digest
        data = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
        content = data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}); convert it first") from None
    if not content.strip():
        raise InputError(f"{name}: the text is empty")
    return Text("stdin" if file == STDIN else file.name, [content])


def read_dataset(dataset: str, *, split: str, column: str, revision: str | None = None, limit: int) -> Text:
    """The first `limit` documents of a data set, streamed: a hub name `NAME` or `NAME:CONFIG`, a file or a folder.

    The text is called like the data set, a file or folder by its name alone. Raises InputError where the `datasets`
    library is missing, the data set cannot be read, or `column` is not a column of strings; the last two at the first
    document that shows it.
    """
    if limit < 1:
        raise InputError(f"a data set needs at least 1 document, got {limit}")
    load = _library()
    path = Path(dataset)
    options: dict[str, Any] = {"split": split, "streaming": True, "revision": revision}
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"{dataset}: a data set in a file must be one of {', '.join(READERS)}")
        source, config, options["data_files"] = READERS[path.suffix], None, str(path)
    elif path.is_dir():
        source, config = str(path), None
    else:
        source, _, config = dataset.partition(":")
    name = path.resolve().name if path.exists() else dataset
    origin = {"dataset": name, "split": split, "column": column, "revision": revision}
    rows = _rows(dataset, lambda: load(source, config or None, **options))
    return Text(name, islice(_documents(dataset, rows, column), limit), origin)


def _library() -> Callable[..., Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError('--dataset needs the datasets library: pip install "moesim[datasets]"') from None
    return load_dataset  # type: ignore[no-any-return] # untyped library


def _rows(dataset: str, load: Callable[[], Any]) -> Iterator[Any]:
    try:
        yield from load()
    except Exception as error:  # the library raises what its readers and the network raise, of many packages
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{dataset}: the data set cannot be read: {reason}") from None


def _documents(dataset: str, rows: Iterator[Any], column: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get(column), str):
            known = ", ".join(name for name, value in row.items() if isinstance(value, str)) or "none"
            raise InputError(f"{dataset}: {column!r} is not a column of text; columns of text: {known}")
        if row[column].strip():
            yield row[column]
