"""Runs one policy through steps: the part that the simulated and the real executor share.

An executor calls, for every step, in this order

    begin_step                              decision point 0
    for each layer: routed, dispatch        decision point layer + 1, then the split of the layer's true load
    end_step

starts the transfers that come back, waits for the blocking ones, and says `arrived` when one is complete. The driver
builds the causal view, asks the policy, keeps the residency, writes the decision log and counts. Knows nothing about
time, simpy or torch.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import Forecast, Ids, Oracle, PastStep, Seen
from moesim.sim.dispatch import Ints, send_matrix
from moesim.sim.policies import Policy
from moesim.sim.residency import Transfer
from moesim.traces import InputError, StepTokens

HISTORY_STEPS = 64
"""Past steps that a predictor may look back on; bounds the memory of a long run."""

Sink = Callable[[dict[str, Any]], None]
"""Takes one decision, a JSON object."""


@dataclass(slots=True)
class Scores:
    """What became of forecasts and transfers, summed over the run."""

    forecasts: int = 0
    load_error: float = 0.0
    """Sum over forecasts of the share of tokens forecast for the wrong expert (half the absolute difference)."""
    guessed: int = 0
    hits: int = 0
    """Of `guessed` chosen experts with a per-token forecast, those among the K forecast ones."""
    overloaded: int = 0
    overloaded_found: int = 0
    """Of the experts that had over twice the mean load, those forecast to have it."""
    transfers: int = 0
    late: int = 0
    """Transfers for a layer of the running step that had not arrived when it dispatched."""

    def summary(self) -> dict[str, float | int | None]:
        """Ratios for reports; None where there was nothing to score."""
        return {
            "forecasts": self.forecasts,
            "load_error": self.load_error / self.forecasts if self.forecasts else None,
            "recall": self.hits / self.guessed if self.guessed else None,
            "overloaded_recall": self.overloaded_found / self.overloaded if self.overloaded else None,
            "transfers": self.transfers,
            "late_transfers": self.late,
        }


class Driver:
    """See the module docstring; `sink`, where given, receives the decision log."""

    def __init__(self, policy: Policy, sink: Sink | None = None) -> None:
        self.policy = policy
        self.cluster = policy.cluster
        self.residency = policy.start()
        self.scores = Scores()
        self._sink = sink
        self._past: deque[PastStep] = deque(maxlen=HISTORY_STEPS)
        self._forecasts: dict[tuple[int, int], Forecast] = {}
        self._in_flight: set[Transfer] = set()
        self._step = -1

    def begin_step(
        self,
        tokens: StepTokens,
        *,
        queued: StepTokens | None = None,
        truth: tuple[Ids, Ids | None] | None = None,
    ) -> list[Transfer]:
        """Start the next step; decision point 0. `truth` ([T, L, K] of this step and of the queued one) is shown to an
        oracle only. Raises InputError where the policy needs an oracle's view and there is no recorded routing."""
        self._step += 1
        self._seen = Seen(step=self._step, tokens=tokens, queued=queued, past=self._past)
        if isinstance(self.policy.predictor, Oracle):
            if truth is None:
                raise InputError(f"policy {self.policy.name} is shown the future: it needs a recorded trace to replay")
            self.policy.predictor.reveal(*truth)
        return self._decide(0)

    def routed(self, ids_TK: Ids) -> list[Transfer]:
        """Take the true routing of the next layer, dropped tokens included; decision point layer + 1."""
        layer = len(self._seen.routed)
        self._score(layer, ids_TK)
        self._seen.routed.append(ids_TK)
        return self._decide(layer + 1)

    def dispatch(self, counts_GE: Ints) -> Ints:
        """[G_from, E, G_to] the exact split of the layer that has just routed, over the replicas that have arrived.

        `counts_GE` are the tokens that each rank holds for each expert, dropped ones not counted.
        """
        layer = len(self._seen.routed) - 1
        load_E = counts_GE.sum(axis=0)
        tokens_EG = self.policy.recipe.split(load_E, self.residency.usable_LEG[layer])
        self.scores.late += sum(t.layer == layer for t in self._in_flight)
        if self._sink:
            expert, gpu = np.nonzero(tokens_EG)
            split = np.stack([expert, gpu, tokens_EG[expert, gpu]], axis=1).tolist()
            self._sink({"decision": "dispatch", "step": self._step, "layer": layer, "expert_gpu_tokens": split})
        return send_matrix(counts_GE, tokens_EG)

    def end_step(self) -> None:
        """All layers have run: the step becomes history."""
        seen = self._seen
        self._past.append(PastStep(tokens=seen.tokens, topk_ids=np.stack(seen.routed, axis=1)))

    def arrived(self, transfer: Transfer) -> None:
        """The copy is complete; from now on its replica computes (unless its slot has been given away since)."""
        self._in_flight.discard(transfer)
        self.residency.arrived(transfer)

    def _decide(self, point: int) -> list[Transfer]:
        rule, predictor, seen = self.policy.recipe.rule, self.policy.predictor, self._seen
        moves: list[Transfer] = []
        for target in rule.targets(self._step, point, self.cluster.layers):
            if target.queued and seen.queued is None:
                continue
            assert predictor is not None, "a rule that asks for forecasts comes with a predictor"
            forecast = predictor.forecast(seen, target.layer, queued=target.queued)
            self._forecasts[self._step + target.queued, target.layer] = forecast
            moves += rule.transfers(target, forecast, self.residency)
        return self._begin(moves, point)

    def _begin(self, wanted: list[Transfer], point: int) -> list[Transfer]:
        if not wanted:
            return []
        moves = [replace(t, serial=self.scores.transfers + i) for i, t in enumerate(wanted)]
        self.residency.begin(moves)
        self._in_flight = {t for t in self._in_flight if self.residency.holds(t)} | set(moves)
        self.scores.transfers += len(moves)
        if self._sink:
            listed = [asdict(t) for t in moves]
            self._sink({"decision": "transfers", "step": self._step, "point": point, "transfers": listed})
        return moves

    def _score(self, layer: int, ids_TK: Ids) -> None:
        forecast = self._forecasts.pop((self._step, layer), None)
        if forecast is None:
            return
        truth_E = np.bincount(ids_TK.ravel(), minlength=self.cluster.experts)
        s = self.scores
        s.forecasts += 1
        s.load_error += float(np.abs(forecast.load - truth_E).sum()) / 2 / max(int(truth_E.sum()), 1)
        hot_E: NDArray[np.bool_] = truth_E > 2 * truth_E.mean()
        s.overloaded += int(hot_E.sum())
        s.overloaded_found += int((hot_E & (forecast.load > 2 * forecast.load.mean())).sum())
        if forecast.topk is not None:
            s.guessed += ids_TK.size
            s.hits += int((ids_TK[:, :, None] == forecast.topk[:, None, :]).any(axis=2).sum())


class DecisionLog:
    """Decisions as JSON lines, byte-identical for identical decisions."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, decision: dict[str, Any]) -> None:
        """Append one decision."""
        self.lines.append(json.dumps(decision, sort_keys=True, separators=(",", ":")))

    def text(self) -> str:
        """All lines, each ended by a newline."""
        return "".join(line + "\n" for line in self.lines)
