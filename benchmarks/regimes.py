"""Table and picture of when expert replicas cost and when they pay; what is swept and the formulas: regime_sweep.py.

python benchmarks/regimes.py --out docs/regimes        # writes docs/regimes.md and docs/regimes.png, 1 to 2 minutes
python benchmarks/regimes.py --quick --out quick  # few points, seconds
"""

from __future__ import annotations

import argparse
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from regime_sweep import (
    DTYPE,
    FULL,
    GPUS,
    LABELS,
    PANELS,
    PROFILE,
    QUICK,
    REQUEST_TOKENS,
    WIDTHS,
    Case,
    Row,
    Size,
    examine_all,
    ridge_rows,
)
from rich.console import Console

from moesim.sim.profile import load_profile

TEXT = """# When replicas of experts cost, and when they pay

Simulated on the shipped profile {profile} ({kind}, {profile_date}: not measured), {gpus} GPUs, widths of {widths},
{dtype}, one expert a token, {layers} MoE layers of made-up routing whose log popularity is normal with spread sigma.
Speedup is the time of `balanced` (experts packed by load, one copy of each) over that of `oracle` (the same packing and
perfect replicas whose copies are free), so nothing but the replicas differs. Base: HBM x1, sigma 1.5, E = 64, one extra
slot a GPU. The layers' popularities are one draw; with others the numbers move as the hottest expert does.
Written on {today} by moesim {moesim}, numpy {numpy}, simpy {simpy}:

    python benchmarks/regimes.py --out docs/regimes

![Speedup over tokens a step]({picture})

| case | hottest expert | ridge | crossover | mean field | closed form | whole step | pays below | lowest | at {most} |
|---|---|---|---|---|---|---|---|---|---|
{table}

Tokens a step are those of all GPUs together.

- hottest expert: its share of the tokens, mean over the layers.
- ridge: rows whose FLOPs take as long as reading an expert's weights once. A tile is {tile} rows.
- crossover: tokens a step from which on the expert phase is faster with replicas (the last time that the simulated
  speedup passes 1, interpolated in the logarithm of the tokens).
- mean field: the same from the cost model's formula with the mean loads, and its error. Closed form: that of one hot
  expert, `T = ((h + r) u - (h - 1/2) tile) / p` with h = E / G experts and r extra slots a GPU, u = max(ridge, tile), p
  the share of the hottest expert. Both are derived in `benchmarks/regime_sweep.py`.
- whole step: the crossover of the whole step; pays below: replicas also pay at fewer tokens than this.
- lowest: the worst speedup of the expert phase, and where; at {most}: the speedup of the expert phase there.
"""
FINDINGS = """
## What it shows

1. **Few tokens: replicas cost.** A layer lasts as long as the slowest GPU reads weights. Once every expert is read,
   that is h reads without replicas and h + r with them, beside a launch that is paid either way: the more experts, the
   less is lost.
2. **Many tokens: replicas pay.** The FLOPs of the hottest GPU pass its reading, and replicas spread them.
3. **HBM bandwidth** moves the crossover: {hbm}.
   It falls as long as reading an expert takes longer than one tile of FLOPs. Once the ridge is below a tile, HBM no
   longer matters to it: a replica then costs a tile of FLOPs, not a read, however fast the memory is.
4. **Skew** moves it down: {sigma}.
   Where packing alone is almost level (sigma 0.5) there is little to gain: beyond the range in which replicas cost, the
   speedup stays within about 1% of 1. Where it passes 1 is decided there by the spread of the loads and by replicas
   that fill less than a tile, both left out by the mean field; that crossover is not to be relied on.
5. **Number of experts** moves it up: {experts}.
   Each GPU has more weights to read, and at the same sigma the hottest expert has a smaller share.
6. **Against expectation, replicas also pay at very few tokens** (column pays below; roughly half a token to one token
   an expert, and not at sigma 2). Such a step uses only some experts, and a replica takes over *all* tokens of an
   expert from the GPU that would have read most: it levels the reads instead of adding one. In the base case at 16
   tokens the slowest GPU reads 2.0 experts on average instead of 2.5; at 64 tokens 5.3 instead of 4.9.
7. **The whole step** crosses earlier than its expert phase: replicas also level what a GPU receives in the all-to-all.

The mean field is {errors},
and best where reading binds; with the ridge below a tile both sides are rounded rows, which it takes as averages.
The closed form gives direction and size only. At slow HBM it is too high for the sum over the layers, since it takes
the mean of p: layers with a hotter expert cross earlier and soon gain more than the others lose (for a single layer it
is within 2% of the mean field there, as long as its hottest expert has more than 1 / G of the tokens). At fast HBM and
at high skew it is too low: at so few tokens some of the cold experts that share the hottest GPU have none, and it
counts a tile for each.

Not in these numbers: copies that take time (those of `oracle` are free); long contexts (requests have {request} tokens;
with longer ones the expert phase is a smaller part of the step); a planner that weighs the reading of weights. `oracle`
levels tokens, so it replicates also where that costs; one that weighed both would leave its replicas unused there.
"""


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def error(row: Row, value: float | None) -> float | None:
    return None if value is None or row.experts is None else value / row.experts - 1


def with_error(row: Row, value: float | None) -> str:
    off = error(row, value)
    return number(value) + ("" if off is None else f" ({off:+.0%})")


def line(row: Row) -> str:
    lowest, at = row.lowest()
    cells = (
        row.case.name(),
        f"{row.hottest:.0%}",
        f"{ridge_rows(row.case)[0]:.0f}",
        number(row.experts),
        with_error(row, row.mean_field),
        with_error(row, row.closed),
        number(row.step),
        number(row.falling),
        f"{lowest:.3f} at {at}",
        f"{row.points[max(row.points)][0]:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def in_order(rows: dict[Case, Row], panel: str) -> str:
    """The crossovers of a panel in words."""
    return ", ".join(f"{number(rows[case].experts)} at {LABELS[panel](case)}" for case in PANELS[panel])


def errors_of(rows: dict[Case, Row]) -> str:
    found = [(error(row, row.mean_field), row.case) for row in rows.values() if row.case.sigma >= 1]
    off = [abs(value) for value, _ in found if value is not None]
    return f"within {max(off):.0%} of the simulation for sigma of 1 and more" if off else "not compared here"


def write_text(rows: dict[Case, Row], size: Size, path: Path, picture: Path) -> None:
    profile = load_profile(PROFILE)
    hbm, sigma, experts = (in_order(rows, panel) for panel in PANELS)
    values: dict[str, Any] = {
        "profile": PROFILE,
        "kind": profile.provenance.kind,
        "profile_date": profile.provenance.date,
        "gpus": GPUS,
        "widths": WIDTHS,
        "dtype": DTYPE,
        "layers": size.layers,
        "today": date.today().isoformat(),
        **{name: version(name) for name in ("moesim", "numpy", "simpy")},
        "picture": picture.name,
        "most": max(size.sweep),
        "request": REQUEST_TOKENS,
        "tile": profile.gpu.tile_rows,
        "table": "\n".join(line(row) for row in rows.values()),
        "hbm": hbm,
        "sigma": sigma,
        "experts": experts,
        "errors": errors_of(rows),
    }
    template = TEXT + (FINDINGS if size == FULL else "\nA quick run: too few points to conclude anything.\n")
    path.write_text(template.format(**values), encoding="utf-8")


def tokens_axis(axis: Any, ticks: tuple[int, ...]) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())


def draw_panel(axis: Any, rows: dict[Case, Row], panel: str, size: Size) -> None:
    """Speedup of the expert phase over tokens a step, one line a value."""
    for i, case in enumerate(PANELS[panel]):  # thinner and thinner, as lines may coincide
        row, color = rows[case], f"C{i}"
        speedups = [speedup for speedup, _ in row.points.values()]
        crosses = "" if row.experts is None else f" ({row.experts:.0f})"
        axis.plot(list(row.points), speedups, color=color, linewidth=2.6 - 0.5 * i, label=LABELS[panel](case) + crosses)
        if row.experts is not None:
            axis.plot([row.experts], [1], "o", color=color, markersize=5)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    tokens_axis(axis.xaxis, size.sweep[::2])
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(panel, loc="left", fontsize=10)
    axis.set_xlabel("tokens a step")
    axis.set_ylabel("balanced / oracle, experts")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, title="crossover in brackets", title_fontsize=7)


def draw_formulas(axis: Any, rows: dict[Case, Row]) -> None:
    """Simulated crossovers against those of the formulas."""
    known = [row for row in rows.values() if row.experts is not None]
    for label, marker, values in (
        ("mean field", "o", [row.mean_field or np.nan for row in known]),
        ("closed form", "x", [row.closed for row in known]),
    ):
        axis.plot([row.experts for row in known], values, marker, markersize=5, label=label)
    ticks = tuple(2**i for i in range(9, 17))
    axis.plot(ticks, ticks, color="black", linewidth=0.8)
    for one, scale in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
        scale("log", base=2)
        tokens_axis(one, ticks[::2])
    axis.set_title("crossover, tokens a step", loc="left", fontsize=10)
    axis.set_xlabel("simulated")
    axis.set_ylabel("from the cost model")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)


def write_picture(rows: dict[Case, Row], size: Size, path: Path) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for axis, panel in zip(axes, PANELS, strict=False):
        draw_panel(axis, rows, panel, size)
    draw_formulas(axes[-1], rows)
    kind = load_profile(PROFILE).provenance.kind
    figure.suptitle(f"When expert replicas pay: {PROFILE} ({kind}), {WIDTHS} widths, made-up routing", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/regimes"), help="path without ending")
    parser.add_argument("--quick", action="store_true", help="few points, to see that it runs")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    text, picture = (options.out.with_name(options.out.name + ending) for ending in (".md", ".png"))
    text.parent.mkdir(parents=True, exist_ok=True)
    rows = examine_all(size)
    write_text(rows, size, text, picture)
    write_picture(rows, size, picture)
    Console().print(f"{text} and {picture}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
