"""`moesim predict`: predictors fitted on one part of a recording and scored on the other."""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from moesim.cli.options import workload_options
from moesim.cli.predict_report import draw, print_study
from moesim.cli.simulate import default_phase
from moesim.predictors import PREDICTORS
from moesim.sim.prediction import Fitted, Fold, Learning, able, fit, make_folds, mean_of, score
from moesim.traces import InputError, Phase, Workload
from moesim.traces.store import Trace

FORMAT, VERSION = "moesim-prediction", 1
file_option = click.Path(path_type=Path, dir_okay=False)
folder_option = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--predictor", default="all", show_default=True, help=f"Comma-separated, or all: {', '.join(PREDICTORS)}."
)
@click.option("--horizon", default="1", show_default=True, help="Layers ahead: 1, or 1,3, or 1..3.")
@workload_options
@click.option(
    "--fit-on", multiple=True, type=click.Path(path_type=Path), help="Fit on this trace instead; may be given again."
)
@click.option("--phase", type=click.Choice([p.name.lower() for p in Phase]), help="[default: encoder, else prefill]")
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="For the balance of loads.")
@click.option("--extra-slots", default="1,2", show_default=True, help="Replica slots a GPU, comma-separated.")
@click.option("--at", "widths", help="Recall at so many forecast experts.  [default: 1, K, 2K and 4K]")
@click.option("--max-steps", type=click.IntRange(min=1), help="Score only the first steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of training.")
@click.option("--epochs", type=click.IntRange(min=0), help="Of training.  [default: each predictor's own]")
@click.option("--device", default="auto", show_default=True, help="To train on: auto, cpu, cuda.")
@click.option(
    "--checkpoints", type=folder_option, help="Trainings go on from here, and finished ones are not repeated."
)
@click.option("--save", type=folder_option, help="Save trained predictors here, NAME.safetensors.")
@click.option("--load", type=folder_option, help="Load trained predictors from here instead of training.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else on stdout.")
@click.option("--out", type=file_option, help="Write the report here, JSON.")
@click.option("--picture", type=file_option, help="Draw recall by layer and the balance reached, PNG.")
def predict(
    trace: Path,
    predictor: str,
    horizon: str,
    workload: Workload,
    fit_on: tuple[Path, ...],
    phase: str | None,
    gpus: int,
    extra_slots: str,
    widths: str | None,
    max_steps: int | None,
    seed: int,
    epochs: int | None,
    device: str,
    checkpoints: Path | None,
    save: Path | None,
    load: Path | None,
    as_json: bool,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Score predictors on the held-out requests of TRACE.

    Fitted on one part of the requests, scored on the other; --split dataset holds out each text in turn. At a distance
    of h, layer l is forecast when layer l - h has routed. docs/predictors.md says what each number means.

    \b
    moesim predict mini.moetrace --predictor frequency,markov,token-table
    moesim predict mini.moetrace --horizon 1..3 --batch-tokens 1024 --picture recall.png
    moesim predict law.moetrace --fit-on intent.moetrace --predictor markov --split alternate --json
    moesim predict mini.moetrace --predictor gru --checkpoints runs/training --save runs/models
    """
    names = _names(predictor)
    opened = Trace.open(trace)
    which = Phase[phase.upper()] if phase else default_phase(opened.spec)
    folds = make_folds(
        opened,
        phase=which,
        gpus=gpus,
        workload=workload,
        split=workload.split,
        fit_on=[Trace.open(path) for path in fit_on],
        max_steps=max_steps,
    )
    names = _able(names, folds[0], every=predictor.strip() == "all")
    learning = Learning(seed=seed, epochs=epochs, device=device, checkpoints=checkpoints, load=load, save=save)
    numbers = {"horizons": _numbers(horizon, "--horizon"), "extra_slots": _numbers(extra_slots, "--extra-slots")}
    wanted = _numbers(widths, "--at") if widths else None
    reports = [_run(fold, names, learning, numbers, wanted) for fold in folds]
    report = {
        "format": FORMAT,
        "version": VERSION,
        "config": _config(trace, folds[0], workload, fit_on, learning, numbers),
        "mean": mean_of(reports),
        "folds": reports if len(reports) > 1 else [],
    }
    _tell(report, as_json, out, picture)


def _run(
    fold: Fold,
    names: list[str],
    learning: Learning,
    numbers: dict[str, tuple[int, ...]],
    widths: tuple[int, ...] | None,
) -> dict[str, Any]:
    """Fit and score one fold, with progress bars where stderr is a terminal."""
    console = Console(stderr=True)
    fitted: dict[str, Fitted] = {}
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        together = progress.add_task(f"fitting ({fold.split})", total=len(names))
        task = progress.add_task("", total=None, visible=False)

        def training(name: str, done: int, total: int, loss: float) -> None:
            progress.update(task, description=f"{name}, loss {loss:.3f}", completed=done, total=total, visible=True)

        for name in names:
            fitted[name] = fit(name, fold, learning, training)
            progress.advance(together)
        progress.update(task, visible=False)
        scoring = progress.add_task("scoring", total=None)
        return score(
            fold,
            fitted,
            horizons=numbers["horizons"],
            extra_slots=numbers["extra_slots"],
            widths=widths,
            progress=lambda done, total: progress.update(scoring, completed=done, total=total),
        )


def _names(predictor: str) -> list[str]:
    asked = list(PREDICTORS) if predictor.strip() == "all" else [n.strip() for n in predictor.split(",") if n.strip()]
    if not asked:
        raise InputError(f"--predictor names no predictor; known: {', '.join(PREDICTORS)}")
    for name in asked:
        if name not in PREDICTORS:
            raise InputError(f"unknown predictor {name!r}; known: {', '.join(PREDICTORS)}")
    return list(dict.fromkeys(asked))


def _able(names: list[str], fold: Fold, *, every: bool) -> list[str]:
    """The predictors that the recording suffices for. Raises InputError where one was named that it does not."""
    can, why = able(names, fold)
    if why and not every:
        name, reason = next(iter(why.items()))
        raise InputError(f"predictor {name!r} {reason}")
    for name, reason in why.items():
        click.echo(f"left out: {name} {reason}", err=True)
    return can


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """'1,3' or '1..3' as numbers. Raises InputError naming the option."""
    try:
        if span := re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", text):
            found = tuple(range(int(span[1]), int(span[2]) + 1))
        else:
            found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or max(found) > 1000:
        raise InputError(f"{option} {text!r}: give numbers from 1 on, as 1, or 1,3, or 1..3")
    return found


def _config(
    trace: Path,
    fold: Fold,
    workload: Workload,
    fit_on: tuple[Path, ...],
    learning: Learning,
    numbers: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    c = fold.scenario.cluster
    return {
        "trace": trace.name,
        "family": fold.scenario.spec.family,
        "phase": fold.scenario.phase.name.lower(),
        "layers": c.layers,
        "experts": c.experts,
        "top_k": c.top_k,
        "gpus": c.gpus,
        **{name: list(values) for name, values in numbers.items()},
        **workload.describe(),
        "fit_on": [path.name for path in fit_on],
        "seed": learning.seed,
        "device": learning.device,
        "processor": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("moesim", "numpy", "torch")}},
    }


def _tell(report: dict[str, Any], as_json: bool, out: Path | None, picture: Path | None) -> None:
    text = json.dumps(report, indent=1)
    if out:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    if picture:
        draw(report, picture)
    if as_json:
        click.echo(text)
    else:
        print_study(report)
