"""`moesim trace`: what a recording holds, and whether it is sound."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from moesim.cli.record import progress_bar
from moesim.cli.stats import stats
from moesim.cli.trace_export import export
from moesim.cli.trace_import import concat, formats, import_command
from moesim.cli.trace_synth import synth
from moesim.traces.statistics import LayerStats, layer_stats, window_loads
from moesim.traces.store import Trace

WINDOW = 512


@click.group()
def trace() -> None:
    """Look at recordings, check them, and exchange them with other systems.

    \b
    moesim trace info mini.moetrace
    moesim trace stats mini.moetrace --gpus 8
    moesim trace verify mini.moetrace
    moesim trace import recording.pt --out theirs.moetrace
    moesim trace export theirs.moetrace --format sglang-plan --policy eplb --gpus 8 --out plan.json
    """


@trace.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(path: Path, as_json: bool) -> None:
    """Print the model, what was recorded, where it comes from, and how skewed each layer is.

    \b
    moesim trace info mini.moetrace
    moesim trace info mini.moetrace --json
    """
    opened = Trace.open(path)
    stats = {
        stack: layer_stats(window_loads(opened.table(stack), opened.spec.num_experts, WINDOW), top=3)
        for stack in opened.stacks
    }
    if as_json:
        click.echo(json.dumps(_as_dict(opened, stats), indent=1))
    else:
        _print(opened, stats)


@trace.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(path: Path, as_json: bool) -> None:
    """Check every shard: size, digest, columns, shapes and ranges. Exit code 2 at the first problem.

    \b
    moesim trace verify mini.moetrace
    """
    opened = Trace.open(path)
    sound = 0
    with progress_bar("checking shards") as progress:
        for shard in opened.verify():
            sound += shard.rows
            progress(sound, sum(s.rows for s in opened.shards))
    leftovers = opened.leftovers()
    if as_json:
        report = {"trace": str(path), "shards": len(opened.shards), "tokens": sound, "leftovers": leftovers}
        click.echo(json.dumps(report))
        return
    click.echo(f"{path}: sound, {len(opened.shards)} shards, {sound:,} tokens")
    if leftovers:
        click.echo(f"not part of the trace, left behind by an interrupted recording: {', '.join(leftovers)}")


trace.add_command(stats)
trace.add_command(import_command)
trace.add_command(export)
trace.add_command(concat)
trace.add_command(formats)
trace.add_command(synth)


def _as_dict(opened: Trace, stats: dict[str, list[LayerStats]]) -> dict[str, Any]:
    return {
        "trace": str(opened.path),
        "spec": opened.spec.to_dict(),
        "requests": dict(Counter(opened.request_texts)),
        "counts": opened.counts(),
        "dropped": {stack: float(opened.table(stack).dropped.mean()) for stack in opened.stacks},
        "window_tokens": WINDOW,
        "skew": {
            stack: [{"max_over_mean": s.max_over_mean, "noise": s.noise_max_over_mean} for s in layers]
            for stack, layers in stats.items()
        },
        "provenance": opened.provenance,
        "leftovers": opened.leftovers(),
    }


def _print(opened: Trace, stats: dict[str, list[LayerStats]]) -> None:
    spec, about = opened.spec, opened.provenance
    console = Console()
    say = partial(console.print, highlight=False, markup=False)  # names in a manifest are not markup
    say(f"{opened.path}: {spec.family}, {spec.num_experts} experts, top-{spec.top_k}, {spec.dtype}")
    say(f"model {about.get('model')}, recorded {about.get('recorded')} on {about.get('device')}")
    for text, count in sorted(Counter(opened.request_texts).items()):
        say(f"  {count} requests from {text}")
    for stack, phases in opened.counts().items():
        dropped = opened.table(stack).dropped.mean()
        tokens = ", ".join(f"{count:,} {phase}" for phase, count in phases.items())
        say(f"{stack}: {tokens} tokens; {dropped:.2%} of the choices over capacity")
        console.print(_skew_table(stats[stack], spec.stack(stack).moe_layers))
    if leftovers := opened.leftovers():
        say(f"not part of the trace, left behind by an interrupted recording: {', '.join(leftovers)}")


def _skew_table(layers: list[LayerStats], numbers: tuple[int, ...]) -> Table:
    table = Table(title=f"Load per layer, windows of {WINDOW} tokens", title_justify="left")
    for column in ("layer", "max/mean", "uniform router", "active experts", "top experts"):
        table.add_column(column, justify="right")
    for number, s in zip(numbers, layers, strict=True):
        top = " ".join(str(e) for e in s.top_experts)
        table.add_row(
            str(number), f"{s.max_over_mean:.2f}", f"{s.noise_max_over_mean:.2f}", f"{s.active_fraction:.0%}", top
        )
    means = [np.mean([getattr(s, name) for s in layers]) for name in ("max_over_mean", "noise_max_over_mean")]
    table.add_row("mean", *(f"{mean:.2f}" for mean in means), "", "")
    return table
