"""Results: what both executors report of a run, in one form, so that simulated and measured can stand side by side.

Metrics are computed here from the step records alone; no policy and no executor counts for itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.traces import InputError

PHASES = ("attention", "decide", "communication", "experts", "blocked")
"""attention: dense part before the router, slowest GPU. decide: predictor and planner. communication: both all-to-alls,
waiting included. experts: slowest GPU. blocked: waiting for demand transfers."""

FORMAT, VERSION = "moesim-result", 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One executed step."""

    duration_s: float
    tokens: int
    phase_s: dict[str, float]
    """Seconds on the critical path by phase, keys of PHASES."""
    load_LG: list[list[int]]
    """[L, G] tokens that each GPU computed in each layer."""
    busy_s: list[float]
    """[G] seconds that each GPU computed (attention and experts)."""
    moved_bytes: int = 0
    """Bytes of expert weights whose copy ended in this step."""
    hidden_bytes: int = 0
    """Of these, bytes that nobody waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run of one policy, simulated or measured."""

    kind: str
    """'simulated' or 'measured'."""
    policy: str
    config: dict[str, Any]
    """Everything that the run depends on: model, phase, GPUs, batch, device, profile, routing, versions."""
    steps: list[StepRecord]
    scores: dict[str, float | int | None] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """Seconds of all steps together; the numerator and denominator of every speedup."""
        return float(sum(step.duration_s for step in self.steps))

    def phase_s(self) -> dict[str, float]:
        """Seconds by phase over all steps."""
        return {phase: float(sum(step.phase_s.get(phase, 0.0) for step in self.steps)) for phase in PHASES}

    def time_shares(self) -> dict[str, float]:
        """Where the GPUs' time goes, shares of the whole run, mean over the GPUs; they sum to 1.

        compute: attention and experts. barrier: waiting for the slowest GPU to finish those. communication:
        all-to-alls. weights: waiting for blocking copies. deciding: predictor and planner. idle: what no phase
        accounts for.
        """
        spent = self.phase_s()
        busy_s = float(np.mean([step.busy_s for step in self.steps], axis=1).sum())
        shares = {
            "compute": busy_s,
            "barrier": max(spent["attention"] + spent["experts"] - busy_s, 0.0),
            "communication": spent["communication"],
            "weights": spent["blocked"],
            "deciding": spent["decide"],
        }
        shares = {name: seconds / self.total_s for name, seconds in shares.items()}
        return {**shares, "idle": max(1.0 - sum(shares.values()), 0.0)}

    def metrics(self) -> dict[str, Any]:
        """Latency, throughput, balancedness, utilisation and bytes; see the keys."""
        durations = np.array([step.duration_s for step in self.steps])
        load = np.array([step.load_LG for step in self.steps], float)
        peak, mean = load.max(axis=2), load.mean(axis=2)
        busy = np.array([step.busy_s for step in self.steps])
        p50, p95, p99 = np.percentile(durations, [50, 95, 99])
        return {
            "steps": len(self.steps),
            "tokens": sum(step.tokens for step in self.steps),
            "latency_p50_s": float(p50),
            "latency_p95_s": float(p95),
            "latency_p99_s": float(p99),
            "throughput_tokens_per_s": sum(step.tokens for step in self.steps) / self.total_s,
            "balancedness_mean_of_ratios": float(
                np.mean(np.divide(mean, peak, out=np.ones_like(mean), where=peak > 0))
            ),
            "balancedness_ratio_of_sums": float(mean.sum() / peak.sum()) if peak.sum() else 1.0,
            "time_shares": self.time_shares(),
            "utilisation_G": (busy.sum(axis=0) / self.total_s).tolist(),
            "moved_bytes": sum(step.moved_bytes for step in self.steps),
            "hidden_bytes": sum(step.hidden_bytes for step in self.steps),
            **self.scores,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON form, metrics included for scripts that only read."""
        data = asdict(self)
        return {
            "format": FORMAT,
            "version": VERSION,
            **data,
            "phase_s": self.phase_s(),
            "metrics": self.metrics(),
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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None
    items = data if isinstance(data, list) else [data]
    return [_result(item, path) for item in items]


def _result(item: Any, path: Path) -> Result:
    if not isinstance(item, dict) or item.get("format") != FORMAT:
        raise InputError(f"{path}: not a result of moesim simulate or run-gpu")
    if item.get("version") != VERSION:
        raise InputError(f"{path}: result version {item.get('version')!r}, this moesim reads {VERSION}")
    try:
        steps = [StepRecord(**step) for step in item["steps"]]
        result = Result(
            kind=item["kind"],
            policy=item["policy"],
            config=item["config"],
            steps=steps,
            scores=item["scores"],
        )
        result.metrics()
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path}: damaged result ({error})") from None
    return result
