"""`moesim explain`: what an event log says of a run, and a step's critical path by name."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from moesim.cli.report import WIDTH, print_results, results_json
from moesim.sim.events import Event, result_of
from moesim.sim.log import Link, critical_path, read_log
from moesim.sim.results import Result
from moesim.sim.timeline import timeline as make_timeline
from moesim.traces import InputError

ROWS = 12
"""Rows of the table of a critical path."""


@click.command()
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--policy", help="Whose step is explained.  [default: every policy's]")
@click.option("--step", type=click.IntRange(min=0), help="Which step.  [default: the slowest]")
@click.option("--timeline", type=click.Path(path_type=Path, dir_okay=False), help="Also write a timeline, JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print results and whole critical paths as JSON.")
def explain(log: Path, policy: str | None, step: int | None, timeline: Path | None, as_json: bool) -> None:
    """Compute the results of a simulation from its event log LOG alone, and say what its slowest step waited for.

    \b
    moesim simulate mini.moetrace --policy all --profile 8xH100-NVLink --event-log events.jsonl
    moesim explain events.jsonl
    moesim explain events.jsonl --policy predictive-layer --step 3
    moesim explain events.jsonl --json --timeline timeline.json
    """
    events = read_log(log)
    if policy is not None and policy not in events:
        raise InputError(f"{log}: holds no policy {policy!r}; it has: {', '.join(events)}")
    results = [_result(log, name, found) for name, found in events.items()]
    asked = [result for result in results if policy in (None, result.policy)]
    numbers = {result.policy: _slowest(result) if step is None else step for result in asked}
    paths = {name: critical_path(events[name], number) for name, number in numbers.items()}
    if timeline:
        try:
            timeline.write_text(json.dumps(make_timeline(events)), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{timeline}: cannot be written ({error.strerror})") from None
    if as_json:
        click.echo(json.dumps(_json(results, numbers, paths), indent=1))
        return
    print_results(results, results[0].policy)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for name, path in paths.items():
        console.print(_table(name, numbers[name], path))
    console.print(
        "critical path: back from the end of the step, what ended then, what ended when that began, and so on."
    )


def _result(log: Path, policy: str, events: list[Event]) -> Result:
    try:
        return result_of(events)
    except InputError as error:
        raise InputError(f"{log}, policy {policy}: {error}") from None


def _slowest(result: Result) -> int:
    durations = [step.duration_s for step in result.steps]
    return durations.index(max(durations))


def _json(results: list[Result], numbers: dict[str, int], paths: dict[str, list[Link]]) -> dict[str, Any]:
    found = results_json(results, results[0].policy)
    critical = {
        name: {
            "step": numbers[name],
            "path": [
                {"what": link.text(), "part": link.part, "begin_s": link.begin_s, "duration_s": link.seconds}
                for link in path
            ],
        }
        for name, path in paths.items()
    }
    return {**found, "critical_path": critical}


def _table(policy: str, step: int, path: list[Link]) -> Table:
    """The links of a path, equal ones of all layers together, the longest first."""
    total = sum(link.seconds for link in path)
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for link in path:
        spent[link.what, link.who].append(link.seconds)
    table = Table(title=f"{policy}: critical path of step {step}, {1e3 * total:.3f} ms", title_justify="left")
    for name in ("what", "who", "times", "ms", "share"):
        table.add_column(name, justify="left" if name in ("what", "who") else "right")
    ranked = sorted(spent.items(), key=lambda item: -sum(item[1]))
    for (what, who), seconds in ranked[:ROWS]:
        table.add_row(what, who or "all", str(len(seconds)), f"{1e3 * sum(seconds):.3f}", f"{sum(seconds) / total:.0%}")
    if len(ranked) > ROWS:
        rest = sum(sum(seconds) for _, seconds in ranked[ROWS:])
        table.add_row(f"{len(ranked) - ROWS} more", "", "", f"{1e3 * rest:.3f}", f"{rest / total:.0%}")
    return table
