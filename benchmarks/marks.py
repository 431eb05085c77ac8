"""Pages of which a program writes a part, which stands between two marks; the rest is written by hand."""

from __future__ import annotations

from pathlib import Path


def write_part(path: Path, part: str) -> None:
    """Replace the part of the page that is measured; a page that is not there becomes nothing but that."""
    old = path.read_text(encoding="utf-8") if path.exists() else "\n".join(marks("measured")) + "\n"
    path.write_text(with_part(old, part, "measured", path), encoding="utf-8")


def with_part(text: str, part: str, name: str, page: object) -> str:
    """`text` with `part` between the marks of that name. Raises SystemExit, naming the page, where there are none."""
    first, last = marks(name)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"{page}: needs the lines {first} and {last}; nothing was written")
    return f"{before}{begin}\n{part}{end}{after}"


def marks(name: str) -> tuple[str, str]:
    """The lines before and after."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
