"""The regime map of a sweep: which policy is best at which batch size, skew and memory. Knows nothing about how the
rows came about."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.picture import save_figure
from moesim.sim.policies import recipe
from moesim.sim.sweep import AXES, Row
from moesim.traces import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ON_THE_MAP = ("policy", "batch_tokens", "trace", "extra_slots")
"""The settings that may differ: what is compared, columns, rows, panels."""
TIE = 0.005
"""Speedups this close count as equal, and the policy that moves fewer bytes is shown."""
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#999933", "#88CCEE", "#AA4499")
"""Of Okabe and Ito (2008) and Tol (2021): told apart by people who see few colours; every cell has its name, too."""
GREY = "#D9D9D9"
"""Of the baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The best policy of one field."""

    policy: str
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Regimes:
    """The map as numbers."""

    batch_tokens: list[int]
    traces: list[tuple[str, float]]
    """(trace, skew), the smallest skew first."""
    memory: list[tuple[int, int]]
    """(extra slots, MiB of expert slots a GPU)."""
    cells: dict[tuple[int, str, int], Cell]
    """(batch tokens, trace, extra slots) to the best; missing where nothing ran."""
    fixed: list[str]
    """What is the same everywhere, in words."""
    left_out: list[str]
    """Policies that know the future, or whose results are not the model's."""


def regimes(rows: list[Row], where: Mapping[str, str]) -> Regimes:
    """Choose the best policy of every field. Raises InputError where other settings differ, too, or nothing ran."""
    rows = [row for row in rows if all(str(row[name]) == value for name, value in where.items())]
    ran = [row for row in rows if row["speedup"] is not None]
    if not ran:
        raise InputError("nothing to draw: no run of the sweep has a speedup" + (" under --where" if where else ""))
    for name in AXES:
        values = sorted({str(row[name]) for row in ran})
        if name not in ON_THE_MAP and len(values) > 1:
            raise InputError(
                f"a map holds {name} fixed, the sweep has {', '.join(values)}: choose one, --where {name}={values[0]}"
            )
    fields: dict[tuple[int, str, int], list[Row]] = {}
    fair = [row for row in ran if not recipe(row["policy"]).clairvoyant and not row["lossy"]]
    for row in fair:
        fields.setdefault((row["batch_tokens"], row["trace"], row["extra_slots"]), []).append(row)
    skews = {row["trace"]: _median([r["skew"] for r in ran if r["trace"] == row["trace"]]) for row in ran}
    return Regimes(
        batch_tokens=sorted({row["batch_tokens"] for row in ran}),
        traces=sorted(skews.items(), key=lambda item: (item[1], item[0])),
        memory=[(extra, _memory(ran, extra)) for extra in sorted({row["extra_slots"] for row in ran})],
        cells={field: best(some) for field, some in fields.items()},
        fixed=_fixed(ran[0]),
        left_out=sorted({row["policy"] for row in ran} - {row["policy"] for row in fair}),
    )


def best(rows: list[Row]) -> Cell:
    """The fastest; of those within TIE of it the one that moves fewest bytes, then the one with the least memory, then
    the first (the baseline comes before all others)."""
    most = max(row["speedup"] for row in rows)
    ties = [row for row in rows if row["speedup"] >= most * (1 - TIE)]
    chosen = min(ties, key=lambda row: (row["moved_bytes"], row["expert_bytes_per_gpu"]))
    return Cell(policy=chosen["policy"], speedup=chosen["speedup"])


def _memory(ran: list[Row], extra: int) -> int:
    return max(int(row["expert_bytes_per_gpu"]) for row in ran if row["extra_slots"] == extra) >> 20


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _fixed(row: Row) -> list[str]:
    words = [
        f"{row['profile']} ({row['profile_kind']})",
        f"{row['gpus']} GPUs",
        row["phase"],
        f"widths of {row['shapes']}" if row["shapes"] else "the model's own widths",
        row["dtype"] or "dtype as recorded",
        f"{row['resident']} resident slots" if row["resident"] is not None else "all experts resident",
    ]
    plain = {"contention": "none", "tensor_parallel": 1, "micro_batches": 1, "overlap": True, "send": "per-expert"}
    words += [f"{name.replace('_', ' ')} {row[name]}" for name, usual in plain.items() if row[name] != usual]
    words += [f"{name.replace('_', ' ')} {row[name]}" for name in ("copy_dtype", "max_steps", "shuffle") if row[name]]
    return [*words, f"fitted on one part of the requests and run on the other (split: {row['split']})"]


def draw_regimes(rows: list[Row], path: Path, where: Mapping[str, str]) -> Regimes:
    """Write the map as PNG and return it as numbers. Raises InputError as `regimes`, or where it cannot be written."""
    from matplotlib.figure import Figure

    found = regimes(rows, where)
    across = min(2, len(found.memory))
    down = math.ceil(len(found.memory) / across)
    wide, high = 1.15 * len(found.batch_tokens) + 1.2, 0.62 * len(found.traces) + 1.1
    figure = Figure(figsize=(max(across * wide, 7.5), down * high + 1.7), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    baseline = _baseline(rows)
    names = sorted({cell.policy for cell in found.cells.values()} - {baseline})
    colours = {baseline: GREY, **{name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}}
    for number, (extra, mib) in enumerate(found.memory):
        _panel(panels[number // across][number % across], found, extra, mib, colours)
    for empty in panels.flat[len(found.memory) :]:
        empty.set_visible(False)
    told = [
        f"Held fixed: {'; '.join(found.fixed)}.",
        f"Number: speedup over {baseline} in the same field, simulated. Within {TIE:.1%} of the fastest, the policy "
        f"that moves the fewest bytes is shown; {baseline}: no other gains more than that.",
        f"Traces, from below: {', '.join(Path(trace).stem for trace, _ in found.traces)}.",
    ]
    if found.left_out:
        told.append(f"Left out, as they know the future or are not exact: {', '.join(found.left_out)}.")
    letters = int(figure.get_figwidth() * 16)
    figure.supxlabel("\n".join(textwrap.fill(line, letters) for line in told), fontsize=8, x=0.02, ha="left")
    save_figure(figure, path, "The best policy, by batch, skew and memory")
    return found


def _baseline(rows: list[Row]) -> str:
    """The policy whose speedup is 1 by definition."""
    ones = [str(row["policy"]) for row in rows if row["speedup"] == 1]
    return max(set(ones), key=ones.count)


def _panel(axis: Axes, found: Regimes, extra: int, mib: int, colours: dict[str, str]) -> None:
    from matplotlib.patches import Rectangle

    for y, (trace, _) in enumerate(found.traces):
        for x, tokens in enumerate(found.batch_tokens):
            cell = found.cells.get((tokens, trace, extra))
            look: dict[str, Any] = {"facecolor": "white", "hatch": "///", "edgecolor": "#BBBBBB"}
            if cell:
                look = {"facecolor": colours[cell.policy], "edgecolor": "white", "linewidth": 2}
                name = "\n".join(textwrap.wrap(Path(cell.policy).stem, 13))
                axis.text(x, y, f"{name}\n{cell.speedup:.2f}x", ha="center", va="center", fontsize=8)
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **look))
    axis.set_xlim(-0.5, len(found.batch_tokens) - 0.5)
    axis.set_ylim(-0.5, len(found.traces) - 0.5)
    axis.set_xticks(range(len(found.batch_tokens)), [f"{tokens:,}" for tokens in found.batch_tokens])
    axis.set_yticks(range(len(found.traces)), [f"{skew:.1f}" for _, skew in found.traces])
    axis.set_xlabel("tokens a step", fontsize=9)
    axis.set_ylabel("skew: busiest expert / mean", fontsize=9)
    axis.set_title(f"{extra} extra slot{'s' * (extra != 1)}: {mib:,} MiB of experts a GPU", loc="left", fontsize=9)
    axis.tick_params(length=0, labelsize=8)
    for side in axis.spines.values():
        side.set_visible(False)
