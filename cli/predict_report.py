"""Table and picture of a study of predictors. Knows nothing about how the numbers came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesim.cli.picture import save_figure

WIDTH = 120
"""Columns that the widest table needs; used where the output is not a terminal."""


def print_study(report: dict[str, Any], console: Console | None = None) -> None:
    """Two tables for every distance, one of costs, and the footnotes."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    mean = report["mean"]
    for horizon in mean["multinomial_floor"]:
        for table in _tables(report, horizon):
            console.print(table)
    console.print(_costs(mean))
    for line in footnotes(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def token_columns(report: dict[str, Any]) -> dict[str, str]:
    """What is said of single tokens: key of a number to its heading, in the order of the table."""
    k = report["config"]["top_k"]
    return {
        "first_recall": "top-1",
        f"recall_at_{k}": f"recall@{k}",
        f"recall_at_{2 * k}": f"recall@{2 * k}",
        f"recall_at_{4 * k}": f"recall@{4 * k}",
        f"precision_at_{2 * k}": f"precision@{2 * k}",
        "calibration_error": "calibration",
    }


def load_columns(report: dict[str, Any]) -> dict[str, str]:
    """What is said of loads, and what it is worth, as `token_columns`."""
    extras = report["config"]["extra_slots"]
    return {
        "load_error_tokens": "error, tokens",
        "load_error": "error",
        "overloaded_precision": "hot precision",
        "overloaded_recall": "hot recall",
        "loads_within_2sd": "in 2 sd",
        **{f"balancedness_{n}": f"balanced +{n}" for n in extras},
        **{f"gap_closed_{n}": f"gap +{n}" for n in extras},
    }


def cells_of(numbers: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """One row's numbers as text, '-' where there is none."""
    return ["-" if numbers.get(key) is None else f"{numbers[key]:.3f}" for key in columns]


def _tables(report: dict[str, Any], horizon: str) -> list[Table]:
    told = report["mean"]["predictors"]
    ahead = f"{horizon} layer{'s' if horizon != '1' else ''} ahead, mean over layers"
    rows = {name: numbers["horizons"][horizon] for name, numbers in told.items()}
    tables = []
    for title, known in (("Tokens", token_columns(report)), ("Loads", load_columns(report))):
        columns = {key: name for key, name in known.items() if any(key in row for row in rows.values())}
        table = Table(title=f"{title}, {ahead}", title_justify="left")
        table.add_column("predictor", no_wrap=True)
        for name in columns.values():
            table.add_column(name, justify="right")
        for name, row in rows.items():
            if any(row.get(key) is not None for key in columns):
                table.add_row(name, *cells_of(row, columns))
        tables.append(table)
    return tables


def _costs(mean: dict[str, Any]) -> Table:
    table = Table(title="What they take", title_justify="left")
    table.add_column("predictor", no_wrap=True)
    for column in ("us/token and layer", "FLOPs/token and layer", "parameters", "fitting s"):
        table.add_column(column, justify="right")
    for predictor, told in mean["predictors"].items():
        first = next(iter(told["horizons"].values()))
        table.add_row(
            predictor,
            f"{first['us_per_token']:.2f}",
            f"{told['flops_per_token']:,.0f}",
            f"{told['parameters']:,.0f}",
            f"{told['fit_seconds']:.1f}",
        )
    return table


def footnotes(report: dict[str, Any]) -> list[str]:
    """What was run, and what the numbers are to be held against."""
    c, mean = report["config"], report["mean"]
    ends = [
        f"+{n}: {mean['balancedness']['no replicas'][str(n)]:.3f} without replicas, "
        f"{mean['balancedness']['true loads'][str(n)]:.3f} planned on the true loads"
        for n in c["extra_slots"]
    ]
    floors = ", ".join(f"{h} ahead {value:.3f}" for h, value in mean["multinomial_floor"].items())
    fitted = f"on {', '.join(c['fit_on'])}" if c["fit_on"] else "on the other part of the requests"
    return [
        f"{c['trace']}: {c['phase']} of {c['family']}, {c['layers']} layers x {c['experts']} experts, top-{c['top_k']}"
        f"; {c['batch']} a step in order of {c['order']}, {mean['steps']:.0f} steps, {mean['tokens']:.0f} tokens; "
        f"fitted {fitted} ({mean['fitted_tokens']:.0f} tokens), split by {c['split']}.",
        f"load error: share of the choices forecast for the wrong expert; who knows the long run and not the tokens "
        f"cannot be below (multinomial floor): {floors}.",
        f"balanced: mean / max of {c['gpus']} GPU loads, mean over steps and layers, replicas planned on the forecast "
        f"and copied at no cost. {'; '.join(ends)}. gap: share of the way between them.",
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: recall by layer at the first distance, and the balance that every predictor reached."""
    from matplotlib.figure import Figure

    k, extras = report["config"]["top_k"], report["config"]["extra_slots"]
    told = report["mean"]["predictors"]
    horizon = next(iter(report["mean"]["multinomial_floor"]))
    figure = Figure(figsize=(11, 5 + 0.12 * len(told)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, numbers in told.items():
        layers = numbers["horizons"][horizon]["layers"]
        values = {int(layer): row.get(f"recall_at_{k}") for layer, row in layers.items()}
        drawn = {layer: value for layer, value in values.items() if value is not None}
        if drawn:
            left.plot(list(drawn), list(drawn.values()), marker="o", markersize=3, linewidth=1, label=name)
    left.set_xlabel("layer that is forecast")
    left.set_ylabel(f"recall at {k}, {horizon} ahead")
    left.grid(alpha=0.25)
    left.legend(fontsize=7, ncols=2)
    ends = report["mean"]["balancedness"]
    key = f"balancedness_{extras[0]}"
    right.barh(list(told), [numbers["horizons"][horizon][key] for numbers in told.values()], color="tab:blue")
    for end, style in (("no replicas", ":"), ("true loads", "--")):
        right.axvline(ends[end][str(extras[0])], color="black", linestyle=style, linewidth=1, label=end)
    right.set_xlim(left=max(0.0, ends["no replicas"][str(extras[0])] - 0.05), right=1.0)
    right.invert_yaxis()
    right.set_xlabel(f"balancedness, {extras[0]} extra slot{'s' if extras[0] > 1 else ''} a GPU")
    right.legend(fontsize=7)
    save_figure(figure, path, f"Predictors on {report['config']['trace']}, {report['config']['phase']}")
