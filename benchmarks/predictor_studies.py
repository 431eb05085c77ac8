"""How a predictor goes through a study of benchmarks/predictors.py, and what is kept of it.

A study is kept predictor by predictor, so that a rerun does only what is missing. Knows nothing about how the report
looks. Shape letters: K experts per token.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from predictor_plan import EXTRA_SLOTS, GPUS, Study, Task

from moesim.predictors import PREDICTORS, Adapting, Forecast, PastStep, Predictor, Seen, routed_layer
from moesim.predictors.scores import Score
from moesim.sim.driver import HISTORY_STEPS
from moesim.sim.prediction import Fitted, Fold, Learning, able, fit, make_folds, score
from moesim.traces.store import Trace

FROZEN = ", frozen"
"""Behind the name of a predictor that was kept from adapting."""


@dataclass(slots=True, kw_only=True)
class Kept:
    """What there is of a study: settings, and per predictor and task the reports of the folds."""

    path: Path
    settings: dict[str, Any]
    predictors: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Kept:
        """What was kept under the same settings; nothing where they were others."""
        kept = cls(path=path, settings=settings)
        if path.exists():
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["settings"] == settings:
                kept.predictors = told["predictors"]
        return kept

    def save(self) -> None:
        """Replace the file; an interruption leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, "predictors": self.predictors}), encoding="utf-8")
        part.replace(self.path)


class Frozen:
    """A fitted predictor that neither observes a step nor sees an earlier one."""

    def __init__(self, inner: Predictor) -> None:
        self._inner = inner
        self.name, self.needs = inner.name, inner.needs
        self.fit, self.cost = inner.fit, inner.cost

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """As in the very first step."""
        return self._inner.forecast(replace(seen, past=deque()), layer, queued=queued)


def settings_of(study: Study, learning: Learning) -> dict[str, Any]:
    """What a kept result depends on, but for the code."""
    tasks = [task.describe() for task in study.tasks]
    how = {"gpus": GPUS, "extra_slots": list(EXTRA_SLOTS), "epochs": learning.epochs, "seed": learning.seed}
    return {"title": study.title, "phase": study.phase.name.lower(), "stream": study.stream, "tasks": tasks, **how}


def run_study(
    study: Study,
    traces: dict[str, Trace],
    kept: Kept,
    learning: Learning,
    tell: Callable[[str, int, int], None],
) -> None:
    """Every able predictor that is not kept yet; the file is written after each. `tell` takes what is done next, the
    number of predictors that are done, and that of all."""
    folds = {task.label: _folds(study, task, traces) for task in study.tasks}
    known = [name for name in study.names if name in PREDICTORS]
    names, _ = able(known, folds[study.tasks[0].label][0])
    for done, name in enumerate(names):
        if name in kept.predictors:
            continue
        tell(name, done, len(names))
        for named, label, report in _reports(study, name, folds, learning):
            kept.predictors.setdefault(named, {}).setdefault(label, []).append(report)
        place = {named: i for i, named in enumerate(PREDICTORS)}
        kept.predictors = dict(sorted(kept.predictors.items(), key=lambda one: place.get(one[0].split(",")[0], 0)))
        kept.save()
    tell("done", len(names), len(names))


def _folds(study: Study, task: Task, traces: dict[str, Trace]) -> list[Fold]:
    return make_folds(
        traces[task.trace],
        phase=study.phase,
        gpus=GPUS,
        workload=task.workload,
        split=task.workload.split,
        fit_on=[traces[name] for name in task.fit_on],
        max_steps=task.max_steps,
    )


def _reports(
    study: Study, name: str, folds: dict[str, list[Fold]], learning: Learning
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(predictor, task, report) of all folds. What is fitted on the same requests is fitted once, and every fold
    starts with it as it was fitted."""
    ready: dict[tuple[str, ...], Fitted] = {}
    for task in study.tasks:
        for fold in folds[task.label]:
            key = (*(task.fit_on or (task.trace,)), fold.split)
            if key not in ready:
                ready[key] = _timed(fit(name, fold, learning), name, fold, learning)
            for named, fitted in _variants(study, name, ready[key]):
                report = (
                    {"split": fold.split, **stream(fold, fitted.predictor)}
                    if study.stream
                    else score(fold, {named: fitted}, horizons=task.horizons, extra_slots=EXTRA_SLOTS)
                )
                yield named, task.label, report


def _timed(fitted: Fitted, name: str, fold: Fold, learning: Learning) -> Fitted:
    """With the seconds that a training took which another study did: read beside its checkpoint."""
    if not (hasattr(fitted.predictor, "training") and learning.checkpoints):
        return fitted
    path = learning.checkpoints / f"{name}-{fold.split}.seconds".replace(":", "-").replace("/", "-")
    seconds = max(fitted.seconds, float(path.read_text(encoding="utf-8")) if path.exists() else 0.0)
    path.write_text(f"{seconds}\n", encoding="utf-8")
    return replace(fitted, seconds=seconds)


def _variants(study: Study, name: str, fitted: Fitted) -> Iterator[tuple[str, Fitted]]:
    """Fresh copies: as it is, and frozen where the study asks for it and the predictor can adapt."""
    yield name, replace(fitted, predictor=deepcopy(fitted.predictor))
    if (study.frozen or study.stream) and isinstance(fitted.predictor, Adapting):
        yield name + FROZEN, replace(fitted, predictor=Frozen(deepcopy(fitted.predictor)))


def stream(fold: Fold, predictor: Predictor) -> dict[str, list[float | None]]:
    """Recall@K and load error of each step, one layer ahead, over all layers but the first."""
    top_k = fold.scenario.cluster.top_k
    past: deque[PastStep] = deque(maxlen=HISTORY_STEPS)
    told: dict[str, list[float | None]] = {"recall": [], "load_error": []}
    for batch in fold.scenario.batches:
        table = fold.scenario.run.take(batch.rows)
        seen, scored = Seen(step=batch.index, tokens=batch.tokens, past=past), Score(widths=(top_k,))
        for layer in range(fold.scenario.cluster.layers):
            if layer:
                scored.add(predictor.forecast(seen, layer), table.topk_ids[:, layer], 0.0)
            seen.routed.append(routed_layer(table, layer))
        if isinstance(predictor, Adapting):
            predictor.observe(seen)
        past.append(PastStep(tokens=batch.tokens, topk_ids=table.topk_ids))
        summary = scored.summary()
        told["recall"].append(summary[f"recall_at_{top_k}"])
        told["load_error"].append(summary["load_error"])
    return told
