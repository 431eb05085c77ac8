"""Results: what both executors report of a run, in one form, so that simulated and measured can stand side by side.

Metrics are computed from the totals of the step records alone (totals.py); no policy and no executor counts for itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesim.sim.timeline import Span, pack, unpack
from moesim.sim.totals import PHASES, StepRecord, Totals
from moesim.traces import InputError

FORMAT, VERSION = "moesim-result", 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run of one policy, simulated or measured."""

    kind: str
    """'simulated' or 'measured'."""
    policy: str
    config: dict[str, Any]
    """Everything that the run depends on: model, phase, GPUs, batch, device, profile, routing, versions."""
    steps: list[StepRecord] = field(default_factory=list)
    """Every step, where they were asked for."""
    totals: Totals = field(default_factory=Totals)
    """Sums over all steps; those of `steps` where it is left out."""
    scores: dict[str, float | int | None] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    """Of an open loop: requests, queueing delay, time to first token and per token, goodput (serving.py)."""
    spans: list[Span] = field(default_factory=list)
    """What happened when (timeline.py), where a timeline was asked for."""

    def __post_init__(self) -> None:
        if not self.totals.steps:
            object.__setattr__(self, "totals", Totals.of(self.steps))

    @property
    def total_s(self) -> float:
        """Seconds of all steps together; the numerator and denominator of every speedup."""
        return self.totals.total_s

    def phase_s(self) -> dict[str, float]:
        """Seconds by phase over all steps."""
        return dict(self.totals.phase_s)

    def metrics(self) -> dict[str, Any]:
        """Those of the totals, of the forecasts, and of the requests where they arrive by themselves."""
        serving = {"serving": self.serving} if self.serving else {}
        return {**self.totals.metrics(), **self.scores, **serving}

    def to_dict(self) -> dict[str, Any]:
        """JSON form, metrics included for scripts that only read."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "policy": self.policy,
            "config": self.config,
            "steps": [asdict(step) for step in self.steps],
            "totals": self.totals.to_dict(),
            "scores": self.scores,
            "serving": self.serving,
            "phase_s": self.phase_s(),
            "metrics": self.metrics(),
            **({"spans": pack(self.spans)} if self.spans else {}),
        }


def save_results(results: list[Result], path: Path) -> None:
    """Write results as one JSON file, complete or not at all."""
    temporary = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps([result.to_dict() for result in results], indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_results(path: Path) -> list[Result]:
    """Read what `save_results` wrote. Raises InputError naming the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); write it with simulate or run-gpu --out"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None
    items = data if isinstance(data, list) else [data]
    return [_result(item, path) for item in items]


def _result(item: Any, path: Path) -> Result:
    if not isinstance(item, dict) or item.get("format") != FORMAT:
        raise InputError(f"{path}: not a result of moesim simulate or run-gpu")
    if item.get("version") != VERSION:
        raise InputError(f"{path}: result version {item.get('version')!r}, this moesim reads {VERSION}")
    try:
        result = Result(
            kind=item["kind"],
            policy=item["policy"],
            config=item["config"],
            steps=[StepRecord(**step) for step in item["steps"]],
            totals=Totals.from_dict(item["totals"]),
            scores=item["scores"],
            serving=item["serving"],
            spans=unpack(item["spans"]) if "spans" in item else [],
        )
        result.metrics()
    except (AttributeError, InputError, KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path}: damaged result ({error})") from None
    return result


__all__ = ["PHASES", "Result", "StepRecord", "load_results", "save_results"]
