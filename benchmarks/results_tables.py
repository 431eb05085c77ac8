"""The full tables of docs/results.md: every entry of a run, section by section.

Entries whose names begin alike (up to a slash, else with the same word) share a table. Its columns are the numbers
that at least one of them has; what is the same in all rows stands above the table once. Hardware profiles stay in the
JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Numbers = Mapping[str, Any]
TITLES = {
    "layers": "MoE layers",
    "models": "Whole models",
    "partitions": "Virtual GPUs",
    "offload": "Offloading",
    "quality": "Quality",
}
UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
LEFT_OUT = ("profile",)
"""Groups that only programs read."""
LONG = 90
"""Most characters of text in a cell."""


def tables(report: Numbers) -> str:
    """All sections, in order."""
    return "\n".join(section(report, name, title) for name, title in TITLES.items())


def section(report: Numbers, name: str, title: str) -> str:
    """A heading, how it ended, and a table for each group of entries."""
    found = report["sections"].get(name)
    if found is None:
        return f"## {title}\n\nNot run.\n"
    about = found["environment"].get("device_name") or "an unknown device"
    ended = "" if found["status"] == "ok" else f" The section did not end well: {found['status']}."
    parts = [f"## {title}\n\nOn {about}.{ended}\n"]
    groups: dict[str, dict[str, Numbers]] = {}
    for entry, numbers in found["entries"].items():
        group = entry.split("/" if "/" in entry else " ")[0]
        if group not in LEFT_OUT:
            groups.setdefault(group, {})[entry] = numbers
    parts += [f"### {group}\n\n{group_text(rows)}" for group, rows in groups.items()]
    return "\n".join(parts)


def group_text(entries: Mapping[str, Numbers]) -> str:
    """What all rows share, then the rows."""
    rows = {name: dict(flat(numbers)) for name, numbers in entries.items()}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    shared = {key for key in columns if len(rows) > 1 and len({repr(row.get(key)) for row in rows.values()}) == 1}
    first = next(iter(rows.values()))
    told = ", ".join(f"{key} {cell(key, first[key])}" for key in columns if key in shared)
    head = [key for key in columns if key not in shared]
    body = [[name, *(cell(key, row[key]) if key in row else "" for key in head)] for name, row in rows.items()]
    return (f"In all rows: {told}.\n\n" if told else "") + table(["", *head], body)


def flat(numbers: Numbers, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Columns and values; a timing is one value, other nested numbers have a column each."""
    for key, value in numbers.items():
        if isinstance(value, Mapping) and "median_s" not in value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def cell(key: str, value: Any) -> str:
    """For people, in units that read well; the key's ending says which unit a number has."""
    if isinstance(value, Mapping):
        return f"{seconds(value['median_s'])} ({seconds(value['min_s'])} .. {seconds(value['max_s'])})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, list):
        pair = len(value) == 2 and all(isinstance(one, int | float) for one in value)
        return f"{cell(key, value[0])} .. {cell(key, value[1])}" if pair else f"{len(value)} values"
    if isinstance(value, int | float):
        return quantity(key, value)
    return str(value) if len(str(value)) <= LONG else f"{str(value)[: LONG - 3]}..."


def quantity(key: str, value: float) -> str:
    """A number by what its key says it is: seconds, bytes, bytes/s, else as it is."""
    if key.endswith("bytes_per_s"):
        return f"{size(value)}/s"
    if key.endswith("bytes"):
        return size(value)
    if key.endswith("_s") and not key.endswith("per_s"):
        return seconds(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def seconds(value: float) -> str:
    """In the largest unit of which there is one."""
    factor, unit = next(((f, u) for f, u in UNITS if abs(value) * f >= 1), UNITS[-1])
    return f"{value * factor:.3g} {unit}" if value else "0 s"


def size(value: float) -> str:
    """Bytes in the largest unit of which there is one."""
    factor, unit = next(((f, u) for f, u in BYTES if abs(value) >= f), (1.0, "B"))
    return f"{value / factor:.3g} {unit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, ending with a line break."""
    lines = [head, ["---"] * len(head), *([text.replace("|", "\\|") for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
