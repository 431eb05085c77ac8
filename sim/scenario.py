"""What is run: which recorded tokens, in which steps, on how many GPUs. The same scenario feeds both executors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.sim.dispatch import Ints
from moesim.sim.residency import Cluster
from moesim.traces import (
    Batch,
    InputError,
    LoadTable,
    ModelSpec,
    Phase,
    StepTokens,
    TokenTable,
    Workload,
    assign_ranks,
    batches,
    merge_steps,
    split_loads,
    split_requests,
)
from moesim.traces.expand import tokens_of_loads

STACK_OF_PHASE = {Phase.ENCODER: "encoder", Phase.PREFILL: "decoder", Phase.DECODE: "decoder"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step with its recorded routing, T tokens in order of request and position."""

    tokens: StepTokens
    queued: StepTokens | None
    """The next step's tokens, where a server would know them (not in decode, not at the end)."""
    rank: NDArray[np.int64]
    """[T] the GPU that holds each token under data-parallel attention."""
    ids: NDArray[np.integer]
    """[T, L, K] recorded routing."""
    dropped: NDArray[np.bool_]
    """[T, L] tokens over capacity."""
    queued_ids: NDArray[np.integer] | None
    """[T', L, K] recorded routing of the queued step, for oracles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Held-out requests of one phase, cut into steps; policies are fitted on the other requests."""

    spec: ModelSpec
    phase: Phase
    cluster: Cluster
    workload: Workload
    fit: TokenTable | LoadTable
    """The requests that predictors and placements learn from."""
    run: TokenTable
    """The others: these are executed. Of a recording of loads: tokens drawn so that the loads come out."""
    batches: tuple[Batch, ...]

    @property
    def stack(self) -> str:
        """The stack that the phase runs in."""
        return STACK_OF_PHASE[self.phase]

    def config(self) -> dict[str, Any]:
        """What both executors report of the inputs; two results are comparable only where all of it agrees."""
        return {
            "family": self.spec.family,
            "d_model": self.spec.sized().d_model,
            "d_ff": self.spec.sized().d_ff,
            "experts": self.spec.num_experts,
            "layers": self.cluster.layers,
            "phase": self.phase.name.lower(),
            "gpus": self.cluster.gpus,
            "extra_slots": self.cluster.extra_slots,
            **self.workload.describe(),
            "recorded": "loads" if isinstance(self.fit, LoadTable) else "tokens",
            "steps": len(self.batches),
            "tokens": sum(len(batch.tokens) for batch in self.batches),
        }

    def steps(self) -> Iterator[StepInput]:
        """The steps in order, with the recorded routing of each."""
        for i, batch in enumerate(self.batches):
            following = self.batches[i + 1] if i + 1 < len(self.batches) else None
            known = following if self.phase is not Phase.DECODE else None
            yield StepInput(
                tokens=batch.tokens,
                queued=known.tokens if known else None,
                rank=assign_ranks(batch.tokens.request, self.cluster.gpus),
                ids=self.run.topk_ids[batch.rows],
                dropped=self.run.dropped[batch.rows],
                queued_ids=self.run.topk_ids[known.rows] if known else None,
            )


def make_scenario(
    spec: ModelSpec,
    table: TokenTable | LoadTable,
    *,
    phase: Phase,
    gpus: int,
    workload: Workload,
    extra_slots: int = 1,
    max_steps: int | None = None,
    request_texts: Sequence[str] = (),
) -> Scenario:
    """Split the requests of `table` (the phase's stack) and batch the held-out ones; loads are split by time.

    `request_texts` names the text of every request, for a split by data set.
    Raises InputError where the recording is too short, the split impossible, or the cluster.
    """
    table = _of_phase(table, phase)
    fit: TokenTable | LoadTable
    run: TokenTable | LoadTable
    if isinstance(table, LoadTable):
        fit, run = split_loads(table, workload.split)
        workload = replace(workload, split="time")
    else:
        fit, run = split_requests(table, workload.split, request_texts)
    return _assemble(spec, phase, gpus, workload, extra_slots, max_steps, fit, run)


def unsplit_scenario(
    spec: ModelSpec,
    table: TokenTable | LoadTable,
    *,
    phase: Phase,
    gpus: int,
    workload: Workload,
    extra_slots: int = 1,
    max_steps: int | None = None,
) -> Scenario:
    """Fitted and run on the whole recording: to plan for a server, never to score. Raises InputError as
    `make_scenario`."""
    table = _of_phase(table, phase)
    return _assemble(spec, phase, gpus, workload, extra_slots, max_steps, table, table)


def _of_phase(table: TokenTable | LoadTable, phase: Phase) -> TokenTable | LoadTable:
    table = table.take(table.phase == phase)
    if not len(table):
        raise InputError(f"the trace has no {phase.name.lower()} tokens; record them, or choose another phase")
    return table


def _assemble(
    spec: ModelSpec,
    phase: Phase,
    gpus: int,
    workload: Workload,
    extra_slots: int,
    max_steps: int | None,
    fit: TokenTable | LoadTable,
    run: TokenTable | LoadTable,
) -> Scenario:
    if isinstance(run, LoadTable):
        run = tokens_of_loads(merge_steps(run, workload, spec.top_k).take(slice(max_steps)), spec.top_k)
        steps = batches(run, replace(workload, unit="recorded", shuffle=None), phase)
    else:
        steps = batches(run, workload, phase)[:max_steps]
    cluster = Cluster(
        layers=run.num_layers,
        experts=spec.num_experts,
        gpus=gpus,
        extra_slots=extra_slots,
        top_k=spec.top_k,
    )
    return Scenario(
        spec=spec,
        phase=phase,
        cluster=cluster,
        workload=workload,
        fit=fit,
        run=run,
        batches=tuple(steps),
    )


def rank_counts(ids_TK: NDArray[np.integer], dropped_T: NDArray[np.bool_], rank_T: Ints, cluster: Cluster) -> Ints:
    """[G, E] tokens that each rank holds for each expert of one layer; dropped tokens do not count."""
    key = rank_T[:, None] * cluster.experts + ids_TK.astype(np.int64)
    count = np.bincount(key[~dropped_T].ravel(), minlength=cluster.gpus * cluster.experts)
    return count.reshape(cluster.gpus, cluster.experts)
