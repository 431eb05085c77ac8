"""A study of predictors: split recordings, fit, score, and put it all into one report.

What a predictor is fitted on and what it is scored on never share a request. Knows nothing about how reports look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from moesim.predictors import PREDICTORS, Predictor, RouterSpec, missing
from moesim.predictors.base import WITHOUT
from moesim.sim.scenario import STACK_OF_PHASE, Scenario, make_scenario
from moesim.sim.scoreboard import Scoreboard, summaries
from moesim.traces import InputError, Phase, TokenTable, Workload, concat, split_requests
from moesim.traces.store import OPTIONAL, Trace
from moesim.traces.workload import EACH_DATASET

Fitting = Callable[[str, int, int, float], None]
"""Told of training: predictor, steps done, steps in all, loss."""
Scoring = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One division of a recording."""

    split: str
    scenario: Scenario
    """What is scored, and whose fitted requests the experts are placed by."""
    fit: TokenTable
    """What predictors learn from; more than the scenario's, where other recordings help."""
    router: RouterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """How learned predictors are trained; the others take no notice."""

    seed: int = 0
    epochs: int | None = None
    device: str = "auto"
    checkpoints: Path | None = None
    """Folder in which trainings go on where they were interrupted, and that spares those that are done."""
    load: Path | None = None
    """Folder of NAME.safetensors to load instead of training."""
    save: Path | None = None
    """Folder to save NAME.safetensors to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A predictor that is ready to be asked."""

    predictor: Predictor
    seconds: float
    """That fitting took; 0 where it was loaded."""


def make_folds(
    trace: Trace,
    *,
    phase: Phase,
    gpus: int,
    workload: Workload,
    split: str,
    fit_on: Sequence[Trace] = (),
    max_steps: int | None = None,
) -> list[Fold]:
    """The divisions that `split` asks for. With `fit_on`, predictors learn from the fitted part of those recordings
    only, by the same split. Raises InputError: loads without tokens, an impossible split, another router."""
    stack = STACK_OF_PHASE[phase]
    table = trace.table(stack)
    texts = list(dict.fromkeys(trace.request_texts))
    if split == EACH_DATASET and len(texts) < 2:
        raise InputError(f"{trace.path}: holds one data set; --split dataset needs two, see moesim trace concat")
    splits = [f"dataset:{name}" for name in texts] if split == EACH_DATASET else [split]
    folds = []
    for one in splits:
        how = replace(workload, split=one)
        scenario = make_scenario(
            trace.spec,
            table,
            phase=phase,
            gpus=gpus,
            workload=how,
            max_steps=max_steps,
            request_texts=trace.request_texts,
        )
        fit = scenario.fit
        assert isinstance(fit, TokenTable), "a table of tokens was split"
        router = RouterSpec(num_experts=trace.spec.num_experts, top_k=trace.spec.top_k, gates=trace.gates(stack))
        learn = _joined([_fit_part(other, trace, phase, one) for other in fit_on]) if fit_on else fit
        folds.append(Fold(split=one, scenario=scenario, fit=learn, router=router))
    return folds


def able(names: Sequence[str], fold: Fold) -> tuple[list[str], dict[str, str]]:
    """(those of `names` that can learn from the fold, name to why not for the others)."""
    lacks = {name: missing(PREDICTORS[name](), fold.fit, fold.router) for name in names}
    return [n for n in names if lacks[n] is None], {n: WITHOUT[need] for n, need in lacks.items() if need is not None}


def fit(name: str, fold: Fold, learning: Learning, progress: Fitting | None = None) -> Fitted:
    """The registered predictor, fitted on the fold or loaded. Raises InputError as its `fit` and `load` do."""
    predictor = PREDICTORS[name]()
    if not hasattr(predictor, "training"):
        begin = perf_counter()
        predictor.fit(fold.fit, fold.router)
        return Fitted(predictor=predictor, seconds=perf_counter() - begin)
    return _trained(name, predictor, fold, learning, progress)


def _trained(name: str, predictor: Any, fold: Fold, learning: Learning, progress: Fitting | None) -> Fitted:
    from moesim.predictors.learned.training import Training

    if learning.load:
        predictor.load(learning.load / f"{name}.safetensors", fold.router, fold.fit.num_layers)
        return Fitted(predictor=predictor, seconds=0.0)
    label = f"{name}-{fold.split}".replace(":", "-").replace("/", "-")
    if learning.checkpoints:
        learning.checkpoints.mkdir(parents=True, exist_ok=True)
    predictor.training = Training(
        seed=learning.seed,
        epochs=learning.epochs,
        device=learning.device,
        checkpoint=learning.checkpoints / f"{label}.safetensors" if learning.checkpoints else None,
        progress=(lambda done, total, loss: progress(name, done, total, loss)) if progress else None,
    )
    predictor.fit(fold.fit, fold.router)
    if learning.save:
        learning.save.mkdir(parents=True, exist_ok=True)
        predictor.save(learning.save / f"{name}.safetensors")
    return Fitted(predictor=predictor, seconds=predictor.seconds)


def score(
    fold: Fold,
    fitted: dict[str, Fitted],
    *,
    horizons: tuple[int, ...],
    extra_slots: tuple[int, ...],
    widths: tuple[int, ...] | None = None,
    progress: Scoring | None = None,
) -> dict[str, Any]:
    """The fold's report, JSON types."""
    ready = {name: one.predictor for name, one in fitted.items()}
    board = Scoreboard(fold.scenario, ready, horizons=horizons, extra_slots=extra_slots, widths=widths).run(progress)
    told = summaries(board)
    for name, one in fitted.items():
        cost = one.predictor.cost()
        told["predictors"][name] |= {
            "fit_seconds": one.seconds,
            "flops_per_token": cost.flops,
            "parameters": cost.parameters,
        }
    steps = fold.scenario.batches
    return {
        "split": fold.split,
        "fitted_tokens": len(fold.fit),
        "steps": len(steps),
        "tokens": sum(len(step.tokens) for step in steps),
        **told,
    }


def mean_of(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Folds' reports averaged number by number; what some fold does not know is averaged over those that do."""
    return dict(_mean(list(folds)))


def _mean(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    known = [value for value in values if value is not None]
    if not known or isinstance(first, str):
        return ", ".join(values) if known else None
    return float(np.mean(known))


def _fit_part(other: Trace, trace: Trace, phase: Phase, split: str) -> TokenTable:
    a, b = other.spec, trace.spec
    stack = STACK_OF_PHASE[phase]
    table = other.table(stack)
    if (a.num_experts, a.top_k, len(a.stack(stack).moe_layers)) != (
        b.num_experts,
        b.top_k,
        len(b.stack(stack).moe_layers),
    ):
        raise InputError(f"{other.path}: not the router of {trace.path}; predictors must be fitted on the same model")
    return split_requests(table.take(table.phase == phase), split, other.request_texts)[0]


def _joined(parts: list[TokenTable]) -> TokenTable:
    """All requests of several recordings, numbered anew, with the columns that all have."""
    common = set.intersection(*(set(part.arrays()) for part in parts))
    first = 0
    moved = []
    for part in parts:
        gone: dict[str, Any] = {name: None for name in OPTIONAL if name not in common}
        moved.append(replace(part, request=part.request + np.int32(first), **gone))
        first += int(part.request.max()) + 1
    return concat(moved)
