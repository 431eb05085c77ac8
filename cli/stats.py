"""`moesim trace stats`: what a router does, layer by layer, beside the noise that no router escapes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from moesim.cli.picture import load_heat_map
from moesim.traces import InputError, TokenTable
from moesim.traces.statistics import LayerStats, Overlap, layer_stats, overlaps, window_loads
from moesim.traces.store import Trace


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--stack", type=click.Choice(["encoder", "decoder"]), help="Only this stack.  [default: all recorded]")
@click.option("--window-tokens", default=512, show_default=True, help="Tokens of a window; skew depends on it.")
@click.option("--gpus", default="2,4,8", show_default=True, help="GPU counts to give the balancedness for.")
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw layers x experts and load over time."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def stats(path: Path, stack: str | None, window_tokens: int, gpus: str, picture: Path | None, as_json: bool) -> None:
    """Print skew, balancedness, activity, drift and overlap of every layer of a recording.

    \b
    moesim trace stats mini.moetrace
    moesim trace stats mini.moetrace --window-tokens 4096 --gpus 8,32 --stack encoder --picture load.png
    """
    opened = Trace.open(path)
    counts = _gpu_counts(gpus, opened.spec.num_experts)
    told: dict[str, Any] = {}
    for name in (stack,) if stack else opened.stacks:
        table = opened.table(name)
        loads_WLE = window_loads(table, opened.spec.num_experts, window_tokens)
        layers = layer_stats(loads_WLE, counts)
        between = _overlaps(table, opened.spec.num_experts)
        told[name] = {
            "tokens": len(table),
            "window_tokens": window_tokens,
            "windows": len(loads_WLE),
            "layers": [asdict(layer) for layer in layers],
            "overlaps": [asdict(overlap) for overlap in between],
        }
        if not as_json:
            title = f"{name}: {len(table):,} tokens, {len(loads_WLE)} windows of {window_tokens}"
            Console().print(_table(title, layers, between, opened.spec.stack(name).moe_layers, counts))
        if picture:
            where = picture if stack or len(opened.stacks) == 1 else picture.with_stem(f"{picture.stem}-{name}")
            load_heat_map(loads_WLE, where, f"{path.name}, {name}: load in windows of {window_tokens} tokens")
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo(
            "noise: max/mean of a router that chooses by chance. balanced: mean / max of contiguous GPU loads, mean of "
            "the windows. drift: share of the load that moves between windows. adjacent: the token before chose it "
            "too. next: guessed from this layer's expert, counted on one half of the requests and scored on the other. "
            "In brackets: by chance."
        )


def _gpu_counts(text: str, experts: int) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--gpus {text!r}: give whole numbers with commas, like 2,4,8") from None
    return tuple(count for count in counts if count <= experts) or counts


def _overlaps(table: TokenTable, experts: int) -> list[Overlap]:
    try:
        return overlaps(table, experts)
    except InputError:
        return []  # nothing adjacent was recorded: the other columns still hold


def _table(
    title: str, layers: list[LayerStats], between: list[Overlap], numbers: tuple[int, ...], gpus: tuple[int, ...]
) -> Table:
    table = Table(title=title, title_justify="left")
    balanced = [f"balanced {count}" for count in gpus]
    for column in ("layer", "max/mean", "noise", "active", "gini", "bits", "drift", *balanced, "adjacent", "next"):
        table.add_column(column, justify="right")
    for i, (number, s) in enumerate(zip(numbers, layers, strict=True)):
        o = between[i] if between else None
        table.add_row(
            str(number),
            f"{s.max_over_mean:.2f}",
            f"{s.noise_max_over_mean:.2f}",
            f"{s.active_fraction:.0%}",
            f"{s.gini:.2f}",
            f"{s.entropy_bits:.2f}",
            "-" if s.drift is None else f"{s.drift:.2f}",
            *(f"{s.balancedness[count][0]:.2f}" for count in gpus),
            _pair(o.adjacent_tokens, o.adjacent_chance) if o else "-",
            _pair(o.next_layer, o.next_layer_chance) if o else "-",
        )
    return table


def _pair(share: float | None, chance: float | None) -> str:
    return "-" if share is None or chance is None else f"{share:.0%} ({chance:.0%})"
