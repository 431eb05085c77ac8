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
from moesim.cli.stats import WINDOW, StackStats, stats, summarise
from moesim.cli.trace_export import export
from moesim.cli.trace_import import concat, formats, import_command
from moesim.cli.trace_synth import synth
from moesim.traces.statistics import LayerStats
from moesim.traces.store import Trace


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
    found = {stack: summarise(opened, stack, overlap=False) for stack in opened.stacks}
    if as_json:
        click.echo(json.dumps(_as_dict(opened, found), indent=1))
    else:
        _print(opened, found)


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
    what = "rows of loads" if opened.kind == "loads" else "tokens"
    click.echo(f"{path}: sound, {len(opened.shards)} shards, {sound:,} {what}")
    if leftovers:
        click.echo(f"not part of the trace, left behind by an interrupted recording: {', '.join(leftovers)}")


trace.add_command(stats)
trace.add_command(import_command)
trace.add_command(export)
trace.add_command(concat)
trace.add_command(formats)
trace.add_command(synth)


def _as_dict(opened: Trace, found: dict[str, StackStats]) -> dict[str, Any]:
    return {
        "trace": str(opened.path),
        "kind": opened.kind,
        "spec": opened.spec.to_dict(),
        "requests": dict(Counter(opened.request_texts)),
        "counts": opened.counts(),
        "dropped": _dropped(opened),
        "window_tokens": None if opened.kind == "loads" else WINDOW,
        "skew": {
            stack: [{"max_over_mean": s.max_over_mean, "noise": s.noise_max_over_mean} for s in stats.layers]
            for stack, stats in found.items()
        },
        "provenance": opened.provenance,
        "leftovers": opened.leftovers(),
    }


def _dropped(opened: Trace) -> dict[str, float]:
    """Share of the choices over capacity, by stack; empty in a recording of loads."""
    shares: dict[str, float] = {}
    for stack in opened.stacks if opened.kind == "tokens" else ():
        dropped = choices = 0
        for part in opened.parts(stack):
            dropped, choices = dropped + int(part.dropped.sum()), choices + part.dropped.size
        shares[stack] = dropped / max(choices, 1)
    return shares


def _print(opened: Trace, found: dict[str, StackStats]) -> None:
    spec = opened.spec
    console = Console()
    say = partial(console.print, highlight=False, markup=False)  # names in a manifest are not markup
    say(f"{opened.path}: {spec.family}, {spec.num_experts} experts, top-{spec.top_k}, {spec.dtype}")
    for line in _origin(opened.provenance):
        say(line)
    for text, count in sorted(Counter(opened.request_texts).items()):
        say(f"  {count} requests from {text}")
    dropped = _dropped(opened)
    for stack, phases in opened.counts().items():
        what = "rows of loads, without tokens" if opened.kind == "loads" else "tokens"
        rows = ", ".join(f"{count:,} {phase}" for phase, count in phases.items())
        over = f"; {dropped[stack]:.2%} of the choices over capacity" if stack in dropped else ""
        say(f"{stack}: {rows} {what}{over}")
        console.print(_skew_table(opened, found[stack].layers, spec.stack(stack).moe_layers))
    if leftovers := opened.leftovers():
        say(f"not part of the trace, left behind by an interrupted recording: {', '.join(leftovers)}")


def _origin(about: dict[str, Any]) -> list[str]:
    """Where the trace comes from, one line each."""
    lines = []
    if about.get("synthetic"):
        lines.append("synthetic: made up, not recorded")
    if "model" in about:
        lines.append(f"model {about['model']}, recorded {about.get('recorded')} on {about.get('device')}")
    if isinstance(imported := about.get("import"), dict):
        lines.append(f"imported from {imported.get('format')}: {imported.get('source')}, {imported.get('bytes')} bytes")
        if not imported.get("complete"):
            lines.append("the import was interrupted: rows are missing")
        cleaning = imported.get("cleaning", {})
        for what, share in cleaning.get("shares", {}).items():
            if share:
                lines.append(
                    f"  {what}: {share:.1%} of the rows, {'dropped' if what in cleaning['dropped'] else 'kept'}"
                )
        lines += [f"  {name}: {note}" for name, note in imported.get("notes", {}).items() if name != "exported"]
    return lines


def _skew_table(opened: Trace, layers: list[LayerStats], numbers: tuple[int, ...]) -> Table:
    window = "rows as recorded" if opened.kind == "loads" else f"windows of {WINDOW} tokens"
    table = Table(title=f"Load per layer, {window}", title_justify="left")
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
