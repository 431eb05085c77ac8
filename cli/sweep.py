"""`moesim sweep`: many settings, a row for each. Starts without torch."""

from __future__ import annotations

import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moesim.cli.options import DEFAULT_TOKENS, execution_options
from moesim.cli.regime import draw_regimes
from moesim.cli.report import WIDTH
from moesim.cli.simulate import default_phase
from moesim.cli.sweep_traces import made_up_traces
from moesim.sim.execution import Execution
from moesim.sim.policies import POLICIES, recipe
from moesim.sim.profile import load_profile, shipped_profiles
from moesim.sim.sweep import AXES, TYPES, Row, check_axes, every_policy
from moesim.sim.sweep_search import OBJECTIVES, Search, Sweep, run_sweep, total_runs
from moesim.sim.sweep_store import RUNS, TABLE
from moesim.traces import InputError, Phase
from moesim.traces.spec import PUBLISHED
from moesim.traces.store import Trace

BEST = 10
"""Rows that the summary shows."""
LISTS = ("policy", "profile", "gpus", "batch_tokens", "extra_slots", "resident", "shapes", "phase")
"""Options that take several values, separated by commas."""
SYNTHETIC = "synthetic"

folder_option = click.Path(path_type=Path, file_okay=False)
file_option = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("traces", nargs=-1, type=click.Path(path_type=Path), metavar="[TRACE]...")
@click.option("--policy", help=f"Comma-separated, or all: {', '.join(POLICIES)}.")
@click.option("--baseline", help="What speedups refer to.  [default: contiguous; with --resident: on-demand]")
@click.option("--profile", help=f"Comma-separated files of moesim calibrate, or: {', '.join(shipped_profiles())}.")
@click.option("--gpus", help="Comma-separated.  [default: all of the profile]")
@click.option("--batch-tokens", help=f"Comma-separated tokens a step.  [default: {DEFAULT_TOKENS}]")
@click.option("--extra-slots", help="Comma-separated replica slots per GPU and layer.  [default: 1]")
@click.option("--resident", help="Comma-separated slots per GPU and layer where the host has the rest.  [default: all]")
@click.option("--skew", help="Also made-up traces of these skews, comma-separated, as of moesim trace synth.")
@click.option("--shapes", help=f"Cost the routing in models of these widths: {', '.join(PUBLISHED)}.  [default: own]")
@click.option("--phase", help="encoder, prefill, decode.  [default: encoder, else prefill]")
@click.option("--chunked", is_flag=True, help="Cut requests so that steps are exactly full (chunked prefill).")
@click.option("--shuffle", type=int, metavar="SEED", help="Seeded random order.  [default: order of arrival]")
@click.option("--split", help="What to fit on and what to run.  [default: request]")
@click.option("--max-steps", type=click.IntRange(min=1), help="Run only the first steps.")
@execution_options
@click.option("--grid", type=file_option, help="TOML with any of these as lists; options go before it.")
@click.option("--out", required=True, type=folder_option, help="Folder of the sweep; goes on where it was stopped.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes here.")
@click.option("--ray", metavar="ADDRESS", help="Run on this Ray cluster instead (auto, local, ray://HOST:PORT).")
@click.option("--optuna", "trials", type=click.IntRange(min=1), metavar="TRIALS", help="Search instead of a grid.")
@click.option("--objective", type=click.Choice(list(OBJECTIVES)), default="speedup", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the search.")
@click.option("--map", "picture", type=file_option, help="Draw which policy is best where, PNG.")
@click.option("--where", multiple=True, metavar="NAME=VALUE", help="Only these rows on the map; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print all rows as JSON, and nothing else on stdout.")
@click.pass_context
def sweep(
    ctx: click.Context,
    /,
    traces: tuple[Path, ...],
    baseline: str | None,
    skew: str | None,
    execution: Execution,
    grid: Path | None,
    out: Path,
    workers: int,
    ray: str | None,
    trials: int | None,
    objective: str,
    seed: int,
    picture: Path | None,
    where: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Simulate every combination of settings on the requests of TRACEs; one row each in OUT/table.parquet.

    Stopped at any moment, even killed, the same command goes on and repeats no finished run. What cannot run
    (too little memory, a policy that needs tokens) is a row with its reason.

    \b
    moesim sweep mini.moetrace --policy eplb,predictive-layer --profile 8xH100-NVLink --gpus 4,8 \\
        --batch-tokens 64,1024 --extra-slots 0,1,2 --workers 2 --out runs/sweep
    moesim sweep --skew 2,4,8 --policy all --profile 8xH100-NVLink --shapes switch-base --dtype bfloat16 \\
        --batch-tokens 128,512,2048 --extra-slots 1,2 --out runs/regimes --map regimes.png
    moesim sweep mini.moetrace --grid sweep.toml --optuna 40 --objective throughput --out runs/search
    """
    axes, made_up = _file(grid)
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    options |= asdict(execution)
    axes |= {name: _values(name, value) for name, value in options.items() if name in given}
    if skew:
        made_up["skew"] = _list("skew", skew, float)
    axes["trace"] = [str(path) for path in traces] or axes.get("trace", [])
    if made_up:
        axes["trace"] = [*axes["trace"], *map(str, made_up_traces(made_up, out))]
    _complete(axes)
    search = Search(trials=trials, objective=objective, seed=seed) if trials else None
    asked = Sweep(axes=axes, baseline=baseline, search=search)
    conditions = dict(_condition(text) for text in where)
    if conditions and not picture:
        raise InputError("--where chooses rows for a map: give --map FILE, too")
    if baseline:
        recipe(baseline)
    with _progress(total_runs(asked)) as done:
        rows, there = run_sweep(asked, out, workers=workers, ray=ray, done=done)
    if picture:
        draw_regimes(rows, picture, conditions)
    if as_json:
        click.echo(json.dumps({"table": str(out / TABLE), "found": there, "rows": rows}))
    else:
        _print(rows, there, out)


def _file(grid: Path | None) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """(settings to their values, what is asked of made-up traces) of a TOML file."""
    if grid is None:
        return {}, {}
    try:
        told = tomllib.loads(grid.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{grid}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{grid}: no TOML: {error}") from None
    made_up = told.pop(SYNTHETIC, {})
    if not isinstance(made_up, dict):
        raise InputError(f"{grid}: {SYNTHETIC} must be a table, [{SYNTHETIC}]")
    for name in told:
        if name not in AXES:
            raise InputError(f"{grid}: {name} is no setting of a run; known: {', '.join(AXES)}, [{SYNTHETIC}]")
    return {name: value if isinstance(value, list) else [value] for name, value in told.items()}, made_up


def _values(name: str, value: Any) -> list[Any]:
    """The values of an option, which come as text where there may be several."""
    if name not in LISTS:
        return [value]
    return _list(name, str(value), int if int in TYPES[name] else str)


def _list(name: str, text: str, kind: type) -> list[Any]:
    try:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        numbers = "" if kind is str else "numbers "
        raise InputError(f"--{name.replace('_', '-')} {text!r}: give {numbers}separated by commas")
    return found


def _complete(axes: dict[str, list[Any]]) -> None:
    """What was left out, from traces and profiles. Raises InputError for unknown names, and where they differ."""
    for name in ("trace", "policy", "profile"):
        if not axes.get(name):
            wanted = "a TRACE or --skew" if name == "trace" else f"--{name}"
            raise InputError(f"nothing to run: give {wanted}")
    check_axes(axes)
    if axes["policy"] == ["all"]:
        offload = set(axes.get("resident", [None])) != {None}
        axes["policy"] = every_policy(offload=offload)
    for name in axes["policy"]:
        recipe(name)
    profiles = {name: load_profile(name).gpus for name in axes["profile"]}
    phases = {path: default_phase(Trace.open(Path(path)).spec) for path in axes["trace"]}
    axes.setdefault("gpus", [_only(profiles, "--gpus", "profiles have different numbers of GPUs")])
    if "phase" not in axes:
        axes["phase"] = [_only(phases, "--phase", "traces are of different kinds of models").name.lower()]
    for phase in axes["phase"]:
        if str(phase).upper() not in Phase.__members__:
            known = ", ".join(one.name.lower() for one in Phase)
            raise InputError(f"unknown phase {phase!r}; known: {known}")
    for widths in axes.get("shapes", []):
        if widths not in PUBLISHED:
            raise InputError(f"unknown shapes {widths!r}; known: {', '.join(PUBLISHED)}")


def _only(found: dict[str, Any], option: str, why: str) -> Any:
    if len(set(found.values())) > 1:
        raise InputError(f"the {why}: give {option}")
    return next(iter(found.values()))


def _condition(text: str) -> tuple[str, str]:
    name, is_there, value = text.partition("=")
    if not is_there or name not in AXES:
        raise InputError(f"--where {text!r}: give NAME=VALUE, with a NAME of: {', '.join(AXES)}")
    return name, value


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Runs done, of all, and the time that the rest will take, where stderr is a terminal."""
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("runs", total=total)
        yield lambda done: progress.advance(task, done)


def _print(rows: list[Row], there: int, out: Path) -> None:
    """The fastest of the sweep, what could not run and why, and where everything is."""
    ran = [row for row in rows if row["reason"] is None and not row["lossy"]]
    # A policy that is always 1 is what speedups refer to.
    changed = {row["policy"] for row in ran if row["speedup"] != 1}
    ran = [row for row in ran if row["policy"] in changed] or ran
    varied = [name for name in AXES if len({row[name] for row in ran}) > 1]
    table = Table(title=f"The {min(BEST, len(ran))} largest speedups of {len(ran)}, simulated", title_justify="left")
    for name in varied:
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=name == "policy")
    for name in ("speedup", "p95 ms", "tokens/s", "balance", "MiB/GPU", "moved MiB"):
        table.add_column(name, justify="right")
    for row in sorted(ran, key=lambda row: -(row["speedup"] or 0))[:BEST]:
        table.add_row(
            *(Path(row[name]).stem if name in ("trace", "profile") else str(row[name]) for name in varied),
            "-" if row["speedup"] is None else f"{row['speedup']:.3f}x",
            f"{1e3 * row['latency_p95_s']:.3f}",
            f"{row['throughput_tokens_per_s']:,.0f}",
            f"{row['balancedness_mean_of_ratios']:.3f}",
            f"{row['expert_bytes_per_gpu'] / 2**20:,.0f}",
            f"{row['moved_bytes'] / 2**20:,.1f}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    if ran:
        console.print(table)
    for reason, count in Counter(row["reason"] for row in rows if row["reason"]).most_common():
        click.echo(f"could not run: {count} of {len(rows)}: {reason}")
    if lossy := sorted({row["policy"] for row in rows if row["lossy"]}):
        click.echo(f"not shown, as they are not exact and their quality was not measured: {', '.join(lossy)}")
    click.echo(
        f"{len(rows)} runs, {there} of them found in {out / RUNS}; all in {out / TABLE}. MiB/GPU: of the expert slots. "
        "oracles know the future."
    )
