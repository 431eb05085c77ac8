"""`moesim compare`: simulated beside measured speedup."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from moesim.cli.options import OutFile, writing
from moesim.cli.report import window
from moesim.sim.comparison import Comparison, Row
from moesim.sim.comparison import compare as compare_results
from moesim.sim.quality import how_to_measure, is_lossy, load_qualities, quality_of
from moesim.sim.results import PHASES, Result, load_results
from moesim.sim.timeline import span_timeline
from moesim.traces import InputError


@click.command()
@click.argument("simulated", type=click.Path(path_type=Path))
@click.argument("measured", type=click.Path(path_type=Path))
@click.option("--baseline", help="What speedups refer to.  [default: contiguous; where a side lacks it: on-demand]")
@click.option("--quality", type=click.Path(path_type=Path), help="A file of moesim quality, for lossy policies.")
@click.option(
    "--timeline",
    type=OutFile(),
    help="Write simulated and measured runs for Perfetto, side by side; needs both made with --timeline.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.option("--out", type=OutFile(), help="Also write the comparison as JSON to this file.")
def compare(
    simulated: Path,
    measured: Path,
    baseline: str | None,
    quality: Path | None,
    timeline: Path | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Print simulated and measured speedup over the same baseline, phase by phase, with the error.

    SIMULATED and MEASURED are files that `moesim simulate --out` and `moesim run-gpu --out` wrote. Policies whose
    results are not the model's are left out unless --quality says what they cost.

    \b
    moesim simulate mini.moetrace --policy predictive-batch --profile here.json --gpus 2 --out simulated.json
    moesim run-gpu models/switch-mini --trace mini.moetrace --policy predictive-batch --ranks 2 --out measured.json
    moesim compare simulated.json measured.json
    """
    qualities = load_qualities(quality) if quality else []
    results, real = load_results(simulated), load_results(measured)
    unknown = [result for result in results if is_lossy(result) and quality_of(result, qualities) is None]
    if message := how_to_measure(unknown, qualities):
        click.echo(f"left out: {', '.join(result.policy for result in unknown)}. {message}", err=True)
    results = [result for result in results if result not in unknown]
    comparison = compare_results(results, real, baseline or _baseline(results, real))
    if timeline:
        _draw(comparison, results, real, timeline)
    text = json.dumps(comparison.to_dict(), indent=1)
    if out:
        with writing(out):
            out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        print_comparison(comparison)
        for result in results:
            if is_lossy(result) and (found := quality_of(result, qualities)):
                click.echo(f"{result.policy}: {found.text()}")


def _baseline(simulated: list[Result], measured: list[Result]) -> str:
    """What both sides have of the two that runs refer to by themselves."""
    both = {result.policy for result in simulated} & {result.policy for result in measured}
    return "on-demand" if "on-demand" in both and "contiguous" not in both else "contiguous"


def _draw(comparison: Comparison, simulated: list[Result], measured: list[Result], path: Path) -> None:
    """Two processes a policy, one under the other. Raises InputError naming the file's kind that holds no spans."""
    by_policy = [{result.policy: result for result in results} for results in (simulated, measured)]
    processes = {}
    for row in comparison.rows:
        for kind, results in zip(("simulated", "measured"), by_policy, strict=True):
            if not (spans := results[row.policy].spans):
                command = "simulate" if kind == "simulated" else "run-gpu"
                raise InputError(f"the {kind} {row.policy} has no timeline: run {command} with --timeline, too")
            processes[f"{row.policy}: {kind}"] = spans
    with writing(path):
        path.write_text(json.dumps(span_timeline(processes)), encoding="utf-8")


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Two tables: speedups with their error, then milliseconds a step by phase."""
    console = console or Console()
    measured, simulated = comparison.measured_config, comparison.simulated_config
    speedups = Table(title=f"Speedup over {comparison.baseline}: simulated beside measured", title_justify="left")
    for column in ("policy", "simulated", "measured", "min .. max of repeats", "error"):
        speedups.add_column(column, justify="left" if column == "policy" else "right")
    for row in comparison.rows:
        spread = f"{row.measured_low:.3f} .. {row.measured_high:.3f}"
        speedups.add_row(row.policy, f"{row.simulated:.3f}x", f"{row.measured:.3f}x", spread, f"{row.error:+.1%}")
    console.print(speedups)
    console.print(_phase_table(comparison.rows, int(measured["steps"])))
    console.print(
        f"{measured['device_name']}: {window(measured)}.\n"
        f"Simulated with profile {simulated['profile']} ({simulated['profile_kind']}). "
        f"error = simulated / measured - 1.",
        highlight=False,
    )


def _phase_table(rows: list[Row], steps: int) -> Table:
    """Policies one under the other, their phases as rows, so that it fits a narrow terminal."""
    table = Table(title="Where the time goes, milliseconds a step on the critical path", title_justify="left")
    for column in ("policy", "phase", "simulated", "measured"):
        table.add_column(column, justify="left" if column in ("policy", "phase") else "right")
    for row in rows:
        pairs = [(phase, row.simulated_phase_s[phase], row.measured_phase_s[phase]) for phase in PHASES]
        pairs.append(("all", sum(row.simulated_phase_s.values()), sum(row.measured_phase_s.values())))
        for phase, simulated, measured in pairs:
            name = row.policy if phase == PHASES[0] else ""
            last = phase == "all"
            table.add_row(
                name, phase, f"{1e3 * simulated / steps:.2f}", f"{1e3 * measured / steps:.2f}", end_section=last
            )
    return table
