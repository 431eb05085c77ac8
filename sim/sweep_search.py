"""Which runs a sweep makes: every combination (the grid), or those that Optuna's sampler asks for.

A search asks for `BATCH` trials at a time, is seeded, and is told results in the order in which it asked: the same
trials come whatever the number of workers, and a search that was killed asks the same questions again and finds the
answers on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesim.sim.policies import recipe
from moesim.sim.sweep import Progress, Row, Settings, check_axes, points
from moesim.sim.sweep_pool import Pool, open_pool
from moesim.sim.sweep_store import Store, extra, manifest_of, with_speedup
from moesim.traces import InputError

BATCH = 4
"""Trials that are asked for together."""
OBJECTIVES = {"speedup": "maximize", "throughput": "maximize", "latency-p95": "minimize"}
COLUMN = {"speedup": "speedup", "throughput": "throughput_tokens_per_s", "latency-p95": "latency_p95_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search instead of the grid."""

    trials: int
    objective: str = "speedup"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"a search needs at least one trial, got {self.trials}")
        if self.objective not in OBJECTIVES:
            raise InputError(f"unknown objective {self.objective!r}; known: {', '.join(OBJECTIVES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is asked for."""

    axes: Mapping[str, Sequence[Any]]
    """Setting to its values; the search chooses among these, too."""
    baseline: str | None = None
    """Policy that speedups refer to; None: contiguous, with resident slots on-demand."""
    search: Search | None = None


def total_runs(sweep: Sweep) -> int:
    """Runs at most; a search asks for some twice, and for the baseline of each."""
    return 2 * sweep.search.trials if sweep.search else len(points(sweep.axes, sweep.baseline))


def run_sweep(sweep: Sweep, folder: Path, *, workers: int, ray: str | None, done: Progress) -> tuple[list[Row], int]:
    """Run what has not been run in `folder`; (rows with their speedup, runs that were there already).

    `done` is told how many runs have just ended or were found. Whatever ends it, finished runs stay and the table is
    written. Raises InputError where the folder holds something else, an optional package is missing, or the cluster.
    """
    check_axes(sweep.axes)
    store = Store(folder)
    if sweep.search:
        _optuna()
    searched = asdict(sweep.search) if sweep.search else {}
    store.open(manifest_of(sweep.axes, sweep.baseline, searched))
    found: dict[Settings, Row | None] = {}
    there = 0

    def settle(settings: Sequence[Settings], pool: Pool) -> None:
        nonlocal there
        new = {one: store.row(one.key) for one in settings if one not in found}
        missing = [one for one, row in new.items() if row is None]
        found.update(new)
        there += len(new) - len(missing)
        done(len(new) - len(missing))
        pool.run(missing, done)
        found.update({one: store.row(one.key) for one in missing})

    try:
        with open_pool(store, workers, ray) as pool:
            if sweep.search is None:
                settle(points(sweep.axes, sweep.baseline), pool)
            else:
                for settings, tell in _trials(sweep, sweep.search):
                    settle([each for one in settings for each in (one.baseline(sweep.baseline), one)], pool)
                    tell(with_speedup(found, sweep.baseline))
    finally:
        # An interrupted pool has kept more than it could tell.
        rows = with_speedup({one: row or store.row(one.key) for one, row in found.items()}, sweep.baseline)
        store.write_table(rows)
    return rows, there


def _trials(sweep: Sweep, search: Search) -> Iterator[tuple[list[Settings], Any]]:
    """Batches of settings that the sampler asks for, each with the function that is to be given all rows so far. What
    cannot run, is not exact, or knows the future counts as failed: the sampler learns to stay away from it."""
    optuna = _optuna()
    study = optuna.create_study(
        direction=OBJECTIVES[search.objective], sampler=optuna.samplers.TPESampler(seed=search.seed)
    )
    varied = {name: list(dict.fromkeys(values)) for name, values in sweep.axes.items()}
    for first in range(0, search.trials, BATCH):
        trials = [study.ask() for _ in range(first, min(first + BATCH, search.trials))]
        settings = [
            Settings(**{name: _suggested(trial, name, values) for name, values in varied.items()}) for trial in trials
        ]

        def tell(rows: list[Row], trials: list[Any] = trials, settings: list[Settings] = settings) -> None:
            by_key = {row["key"]: row for row in rows}
            for trial, one in zip(trials, settings, strict=True):
                row = by_key[one.key]
                value = row[COLUMN[search.objective]]
                if value is None or row["lossy"] or recipe(one.policy).clairvoyant:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, value)

        yield settings, tell


def _suggested(trial: Any, name: str, values: list[Any]) -> Any:
    """One of `values`, asked for by its number: numbers are in an order that a sampler can learn from, names not."""
    if all(isinstance(value, int) for value in values) and values == sorted(values):
        return values[trial.suggest_int(name, 0, len(values) - 1)]
    return values[trial.suggest_categorical(name, list(range(len(values))))]


def _optuna() -> Any:
    optuna = extra("optuna", "sweep", "--optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
