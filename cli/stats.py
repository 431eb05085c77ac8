"""`moesim trace stats`: what a router does, layer by layer, beside the noise that no router escapes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from moesim.cli.picture import load_heat_map
from moesim.cli.record import progress_bar
from moesim.traces import InputError, TokenTable
from moesim.traces.overlap import Overlap, OverlapSummary
from moesim.traces.statistics import COLUMNS, LayerStats, LoadSummary, Window
from moesim.traces.store import Trace

WINDOW = 512
WIDTH = 150
NO_TOKENS = "needs tokens, and this recording has loads only"
NOT_ADJACENT = "no two tokens of a request are adjacent"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackStats:
    """Everything about one stack."""

    loads: LoadSummary
    layers: list[LayerStats]
    overlaps: list[Overlap]
    no_overlaps: str
    """Why there are no overlaps, in words; empty where there are."""


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--stack", type=click.Choice(["encoder", "decoder"]), help="Only this stack.  [default: all recorded]")
@click.option(
    "--window-tokens",
    type=int,
    help=f"Tokens of a window, 0 for the whole recording.  [default: {WINDOW}; loads: the rows as recorded]",
)
@click.option("--gpus", default="2,4,8", show_default=True, help="GPU counts to give the balancedness for.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Most loaded experts to name.")
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw layers x experts and load over time."
)
@click.option(
    "--per-window", type=click.Path(path_type=Path, dir_okay=False), help="Write every layer and window as CSV."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def stats(
    path: Path,
    stack: str | None,
    window_tokens: int | None,
    gpus: str,
    top: int,
    picture: Path | None,
    per_window: Path | None,
    as_json: bool,
) -> None:
    """Print skew, balancedness, activity, drift and overlap of every layer of a recording.

    The recording is read as a stream: its size does not matter to memory. Skew depends on the window.

    \b
    moesim trace stats mini.moetrace
    moesim trace stats mini.moetrace --window-tokens 4096 --gpus 8,32 --stack encoder --picture load.png
    moesim trace stats mini.moetrace --window-tokens 0 --per-window windows.csv --json
    """
    opened = Trace.open(path)
    counts = gpu_counts(gpus, opened.spec.num_experts)
    told: dict[str, Any] = {}
    for name in (stack,) if stack else opened.stacks:
        several = stack is None and len(opened.stacks) > 1
        with _windows_csv(_of_stack(per_window, name, several), opened, name, counts, top) as sink:
            found = summarise(opened, name, window_tokens, counts, top, sink)
        told[name] = _as_dict(found, opened, window_tokens)
        title = f"{name}: {_rows(opened, found.loads)}, {found.loads.windows} {_windows(opened, window_tokens)}"
        if not as_json:
            console = Console()
            if not console.is_terminal:
                console.width = max(console.width, WIDTH)
            console.print(_table(title, found, opened.spec.stack(name).moe_layers, counts))
            _print_below(found)
        if picture:
            loads_WLE, per_column = found.loads.over_time()
            load_heat_map(loads_WLE, _of_stack(picture, name, several) or picture, f"{path.name}, {title}", per_column)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        click.echo(
            "noise: max/mean of a router that chooses by chance. balanced: of contiguous GPU loads, mean of the "
            "windows' mean / max (SGLang), then sum of means / sum of maxima (vLLM). drift: share of the load that "
            "moves between windows. adjacent: the token before chose it too. next: guessed from this layer's expert, "
            "counted on one half of the requests and scored on the other. In brackets: by chance."
        )


def summarise(
    opened: Trace,
    stack: str,
    window_tokens: int | None = None,
    gpus: tuple[int, ...] = (),
    top: int = 3,
    sink: Any = None,
    *,
    overlap: bool = True,
) -> StackStats:
    """Read a stack once, whatever its kind, with a progress bar. Raises InputError where nothing was recorded."""
    spec, layers = opened.spec, len(opened.spec.stack(stack).moe_layers)
    if window_tokens is not None and window_tokens < 0:
        raise InputError(f"--window-tokens must be at least 1, or 0 for the whole recording, got {window_tokens}")
    of_loads = opened.kind == "loads"
    window = (None if of_loads else WINDOW) if window_tokens is None else window_tokens or None
    loads = LoadSummary(
        layers,
        spec.num_experts,
        spec.top_k,
        window=window,
        row_windows=of_loads and window_tokens is None,
        gpus=gpus,
        sink=sink,
    )
    between = OverlapSummary(layers, spec.num_experts) if overlap and not of_loads else None
    done, total = 0, sum(shard.rows for shard in opened.shards if shard.stack == stack)
    with progress_bar(f"reading the {stack}") as progress:
        for part in opened.load_parts(stack) if of_loads else opened.parts(stack):
            loads.add(part)
            if between is not None and isinstance(part, TokenTable):
                between.add(part)
            done += len(part)
            progress(done, total)
    found = loads.finish(top)
    if between is None:
        return StackStats(loads=loads, layers=found, overlaps=[], no_overlaps=NO_TOKENS)
    try:
        return StackStats(loads=loads, layers=found, overlaps=between.finish(loads.total_LE), no_overlaps="")
    except InputError:
        return StackStats(loads=loads, layers=found, overlaps=[], no_overlaps=NOT_ADJACENT)


def gpu_counts(text: str, experts: int) -> tuple[int, ...]:
    """GPU counts of a list with commas, without those beyond E (unless nothing would be left)."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--gpus {text!r}: give whole numbers with commas, like 2,4,8") from None
    return tuple(count for count in counts if count <= experts) or counts


def _of_stack(path: Path | None, stack: str, several: bool) -> Path | None:
    """The file of one stack, where there is one for each."""
    return path.with_stem(f"{path.stem}-{stack}") if path and several else path


def _windows(opened: Trace, window_tokens: int | None) -> str:
    if window_tokens == 0:
        return "window of everything"
    if window_tokens is None and opened.kind == "loads":
        return "windows, the rows as recorded"
    return f"windows of {window_tokens or WINDOW} tokens"


def _rows(opened: Trace, loads: LoadSummary) -> str:
    return f"{loads.tokens:,} tokens in windows" + (", loads only" if opened.kind == "loads" else "")


def _as_dict(found: StackStats, opened: Trace, window_tokens: int | None) -> dict[str, Any]:
    return {
        "kind": opened.kind,
        "tokens": found.loads.tokens,
        "window_tokens": window_tokens
        if opened.kind == "loads"
        else (WINDOW if window_tokens is None else window_tokens),
        "windows": found.loads.windows,
        "vllm_balancedness": found.loads.vllm_balancedness(),
        "layers": [asdict(layer) for layer in found.layers],
        "overlaps": [asdict(overlap) for overlap in found.overlaps],
        "no_overlaps": found.no_overlaps or None,
    }


@contextmanager
def _windows_csv(path: Path | None, opened: Trace, stack: str, gpus: tuple[int, ...], top: int) -> Iterator[Any]:
    """A sink that writes a line for each layer and window; None where no file is wanted."""
    if path is None:
        yield None
        return
    numbers = opened.spec.stack(stack).moe_layers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            balanced = [f"balancedness_{count}" for count in gpus]
            writer.writerow(["window", "layer", "tokens", "noise_max_over_mean", *COLUMNS, *balanced, "top_experts"])

            def sink(window: Window) -> None:
                best = np.argsort(-window.load_LE, axis=1, kind="stable")[:, :top]
                for number, values, experts in zip(numbers, window.values_LC, best, strict=True):
                    picked = [*values[: len(COLUMNS)], *values[len(COLUMNS) :: 3]]
                    numbers_of = ["" if np.isnan(value) else f"{value:.6g}" for value in picked]
                    named = " ".join(map(str, experts))
                    writer.writerow([window.index, number, window.tokens, f"{window.noise:.6g}", *numbers_of, named])

            yield sink
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def _table(title: str, found: StackStats, numbers: tuple[int, ...], gpus: tuple[int, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    balanced = [f"balanced {count}" for count in gpus]
    columns = ("layer", "max/mean", "noise", "active", "gini", "bits", "drift", *balanced, "adjacent", "next", "top")
    for column in columns:
        table.add_column(column, justify="right")
    for i, (number, s) in enumerate(zip(numbers, found.layers, strict=True)):
        o = found.overlaps[i] if found.overlaps else None
        table.add_row(
            str(number),
            f"{s.max_over_mean:.2f}",
            f"{s.noise_max_over_mean:.2f}",
            f"{s.active_fraction:.0%}",
            f"{s.gini:.2f}",
            f"{s.entropy_bits:.2f}",
            "-" if s.drift is None else f"{s.drift:.2f}",
            *(f"{s.balancedness[count]['sglang']:.2f} {s.balancedness[count]['vllm']:.2f}" for count in gpus),
            _pair(o.adjacent_tokens, o.adjacent_chance) if o else "-",
            _pair(o.next_layer, o.next_layer_chance) if o else "-",
            " ".join(map(str, s.top_experts)),
        )
    return table


def _print_below(found: StackStats) -> None:
    mean = [np.mean([getattr(s, name) for s in found.layers]) for name in ("max_over_mean", "noise_max_over_mean")]
    over_layers = ", ".join(f"{share:.2f} on {gpus}" for gpus, share in found.loads.vllm_balancedness().items())
    click.echo(f"mean of the layers: max/mean {mean[0]:.2f}, noise {mean[1]:.2f}. balanced over all layers (vLLM): "
               f"{over_layers} GPUs.")  # fmt: skip
    if found.no_overlaps:
        click.echo(f"adjacent, next: {found.no_overlaps}.")


def _pair(share: float | None, chance: float | None) -> str:
    return "-" if share is None or chance is None else f"{share:.0%} ({chance:.0%})"
