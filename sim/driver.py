"""Runs one policy through steps: the part that the simulated and the real executor share.

An executor calls, for every step, in this order

    begin_step                              decision point 0
    for each layer: routed, dispatch        decision point layer + 1, then the split of the layer's true load
    end_step

starts the transfers that come back, waits for the blocking ones, and says `arrived` when one is complete. Where not
all experts are on GPUs it asks `executed` after `routed`, and `fetch` before every `dispatch`, and repeats the last two
until no token is left. Micro-batches in flight are lanes, each with its own calls in this order; residency and history
are shared. The driver builds the causal view, asks the policy, keeps the residency, writes the decision log and counts.
Knows nothing about time, simpy or torch.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import Adapting, Forecast, Ids, Oracle, PastStep, RoutedLayer, Seen
from moesim.sim.dispatch import Ints, Site, send_matrix
from moesim.sim.eviction import Future
from moesim.sim.offload import Cache, Cheaper, Executed, Fetch
from moesim.sim.policies import Policy, Prefetch
from moesim.sim.residency import Transfer
from moesim.traces import InputError, PolicyError, StepTokens

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
    """See the module docstring; `sink`, where given, receives the decision log; `cheaper` says when the host's CPU is
    faster than a copy, for policies that ask; `future` is for eviction rules that are oracles."""

    def __init__(
        self,
        policy: Policy,
        sink: Sink | None = None,
        cheaper: Cheaper | None = None,
        future: Future | None = None,
    ) -> None:
        self.policy = policy
        self.cluster = policy.cluster
        self.residency = policy.start()
        self.scores = Scores()
        self.cache = Cache(policy, self.residency, cheaper, future) if policy.recipe.miss else None
        self._sink = sink
        self._past: deque[PastStep] = deque(maxlen=HISTORY_STEPS)
        self._forecasts: dict[tuple[int, int, int], Forecast] = {}
        self._in_flight: set[Transfer] = set()
        self._dispatched: dict[int, tuple[int, int]] = {}
        self._seen: dict[int, Seen] = {}
        self._truth: dict[int, tuple[Ids, Ids | None]] = {}
        self._foreseen: dict[tuple[int, int], Ids] = {}

    def begin_step(
        self,
        tokens: StepTokens,
        *,
        queued: StepTokens | None = None,
        truth: tuple[Ids, Ids | None] | None = None,
        lane: int = 0,
    ) -> list[Transfer]:
        """Start the lane's next step; decision point 0. `truth` ([T, L, K] of this step and of the queued one) is
        shown to an oracle only. Raises InputError where the policy needs it and there is no recorded routing."""
        before = self._seen.get(lane)
        step = before.step + 1 if before else 0
        self._seen[lane] = Seen(step=step, tokens=tokens, queued=queued, past=self._past)
        if isinstance(self.policy.predictor, Oracle):
            if truth is None:
                raise InputError(f"policy {self.policy.name} is shown the future: it needs a recorded trace to replay")
            self._truth[lane] = truth
        if self.cache is not None:
            self.cache.begin_step(np.unique(tokens.request).tolist())
        return self._decide(0, lane)

    def routed(self, routed: RoutedLayer, lane: int = 0) -> list[Transfer]:
        """Take the true routing of the next layer, dropped tokens included; decision point layer + 1. A policy that
        executes its forecasts goes on with these instead."""
        layer = len(self._seen[lane].routed)
        self._score(lane, layer, routed.ids)
        if self.policy.recipe.routing == "predicted":  # from here on nobody knows what the router would have chosen
            routed = RoutedLayer(ids=self.foresee(layer, lane))
            del self._foreseen[lane, layer]
        self._seen[lane].routed.append(routed)
        if self.cache is not None:
            self.cache.computes(layer, routed.ids, lane)
        return self._decide(layer + 1, lane)

    def routed_layers(self, lane: int = 0) -> int:
        """Layers of the lane's step that have routed."""
        return len(self._seen[lane].routed)

    def executed(
        self, dropped_T: NDArray[np.bool_], scores_TE: NDArray[np.floating] | None = None, lane: int = 0
    ) -> Executed:
        """What is computed of the layer that has just routed: the router's choice, unless the policy is lossy. Asked
        once, before the layer's first `fetch`. `dropped_T`: tokens over capacity; `scores_TE`: the router's scores of
        all experts, where there are any, for policies that substitute."""
        routed = self._seen[lane].routed
        if self.cache is None:
            return Executed(ids_TK=routed[-1].ids.astype(np.int64))
        return self.cache.executed(len(routed) - 1, routed[-1], dropped_T, scores_TE)

    def foresee(self, layer: int, lane: int = 0) -> Ids:
        """[T, K] the experts forecast for a layer that has not routed yet, for policies that execute their forecasts.
        Raises PolicyError where the forecast says nothing of single tokens."""
        key = (lane, layer)
        if key not in self._foreseen:
            assert self.policy.predictor is not None, "predicted routing comes with a predictor"
            if isinstance(self.policy.predictor, Oracle):
                self.policy.predictor.reveal(*self._truth[lane])
            topk = self.policy.predictor.forecast(self._seen[lane], layer).topk
            if topk is None:
                raise PolicyError(f"policy {self.policy.name} executes forecasts that say nothing of single tokens")
            self._foreseen[key] = topk[:, : self.cluster.top_k]
        return self._foreseen[key]

    def fetch(self, counts_GE: Ints, lane: int = 0) -> Fetch:
        """What is missing for the tokens that are left of the layer that has just routed; only for policies with a
        `miss`, whose experts need not all be on GPUs."""
        assert self.cache is not None, "only policies that offload fetch"
        layer = len(self._seen[lane].routed) - 1
        found = self.cache.fetch(layer, counts_GE.sum(axis=0), lane)
        return replace(found, moves=self._begin(found.moves, layer + 1, lane))

    def dispatch(self, counts_GE: Ints, lane: int = 0) -> Ints:
        """[G_from, E, G_to] the policy's split of the layer that has just routed, over the replicas that have arrived.

        `counts_GE` are the tokens that each rank holds for each expert, dropped ones not counted. Raises PolicyError
        where an expert has tokens and no copy, unless GPUs have failed or the host backs them: its row is then 0.
        """
        layer = len(self._seen[lane].routed) - 1
        usable_EG = self.residency.usable_LEG[layer]
        if self.cache is not None or not self.residency.alive_G.all():
            counts_GE = np.where(usable_EG.any(axis=1), counts_GE, 0)
        alone = self.cluster.gpus == 1 and self.cache is not None  # what is not there is 0 now: nothing to split
        if alone:
            tokens_EG = counts_GE.T
        else:
            site = Site(counts_GE=counts_GE, node_G=self.cluster.node_G, rates=self.cluster.rates)
            tokens_EG = self.policy.recipe.split(counts_GE.sum(axis=0), usable_EG, self.residency.slowdown_G, site)
        if self._dispatched.get(lane) != (self._seen[lane].step, layer):  # later waves see the same copies
            self._dispatched[lane] = (self._seen[lane].step, layer)
            self.scores.late += sum(t.layer == layer for t in self._in_flight)
        if self._sink:
            expert, gpu = np.nonzero(tokens_EG)
            split = np.stack([expert, gpu, tokens_EG[expert, gpu]], axis=1).tolist()
            where = self._where(lane)
            self._sink({"decision": "dispatch", **where, "layer": layer, "expert_gpu_tokens": split})
        return counts_GE[:, :, None] if alone else send_matrix(counts_GE, tokens_EG, self.cluster.node_G)

    def end_step(self, lane: int = 0) -> None:
        """All layers have run: the step becomes history, and what adapts learns from it."""
        seen = self._seen[lane]
        if self.cache is not None:
            self.cache.done(lane)
        if isinstance(self.policy.predictor, Adapting):
            self.policy.predictor.observe(seen)
        seen.memo.clear()
        self._past.append(PastStep(tokens=seen.tokens, topk_ids=np.stack([r.ids for r in seen.routed], axis=1)))
        # A forecast for a queued step that never came, say the last part of a shorter step, is not kept.
        self._forecasts = {key: f for key, f in self._forecasts.items() if key[0] != lane or key[1] > seen.step}

    def arrived(self, transfer: Transfer, precision: str | None = None) -> None:
        """The copy is complete; from now on its replica computes (unless its slot has been given away since).
        `precision`: what it came in, where that is less than the transfer says."""
        self._in_flight.discard(transfer)
        self.residency.arrived(transfer, precision)
        if self.cache is not None and precision is not None:
            self.cache.comes_in(precision)

    def fail(self, gpu: int) -> None:
        """`gpu` and what it held are gone; copies from and to it as well."""
        self.residency.fail(gpu)
        for t in [t for t in self._in_flight if gpu in (t.source, t.target)]:
            self._in_flight.discard(t)
            self.residency.cancel(t)
        if self.cache is not None:
            self.cache.failed()

    def _decide(self, point: int, lane: int) -> list[Transfer]:
        rule, predictor, seen = self.policy.recipe.rule, self.policy.predictor, self._seen[lane]
        if isinstance(predictor, Oracle):
            predictor.reveal(*self._truth[lane])
        moves: list[Transfer] = []
        prefetched: list[Transfer] = []
        for target in rule.targets(seen.step, point, self.cluster.layers):
            if target.queued and seen.queued is None:
                continue
            assert predictor is not None, "a rule that asks for forecasts comes with a predictor"
            forecast = predictor.forecast(seen, target.layer, queued=target.queued)
            self._forecasts[lane, seen.step + target.queued, target.layer] = forecast
            if not isinstance(rule, Prefetch):
                moves += rule.transfers(target, forecast, self.residency)
                continue
            assert self.cache is not None, "a rule that prefetches comes with a cache"
            due = (seen.step + target.queued) * self.cluster.layers + target.layer
            experts = rule.experts(target, forecast, self.cluster)
            begun = self._begin(self.cache.prefetch(target.layer, experts, forecast, due), point, lane)
            prefetched += begun
            if rule.enough(len(begun)):
                break
        return self._begin(moves, point, lane) + prefetched

    def _begin(self, wanted: list[Transfer], point: int, lane: int) -> list[Transfer]:
        if not wanted:
            return []
        layer_GS = self.residency.layer_GS
        moves = [
            replace(t, serial=self.scores.transfers + i, displaces=int(layer_GS[t.target, t.slot]))
            for i, t in enumerate(wanted)
        ]
        self.residency.begin(moves)
        self._in_flight = {t for t in self._in_flight if self.residency.holds(t)} | set(moves)
        self.scores.transfers += len(moves)
        if self._sink:
            listed = [asdict(t) for t in moves]
            self._sink({"decision": "transfers", **self._where(lane), "point": point, "transfers": listed})
        return moves

    def _where(self, lane: int) -> dict[str, int]:
        where = {"step": self._seen[lane].step}
        return where if len(self._seen) == 1 else {**where, "lane": lane}

    def _score(self, lane: int, layer: int, ids_TK: Ids) -> None:
        forecast = self._forecasts.pop((lane, self._seen[lane].step, layer), None)
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
            guess_TK = forecast.topk[:, : ids_TK.shape[1]]
            s.hits += int((ids_TK[:, :, None] == guess_TK[:, None, :]).any(axis=2).sum())


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
