"""What is run: which recorded tokens, in which steps, on how many GPUs. The same scenario feeds both executors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.sim.dispatch import Ints
from moesim.sim.residency import Cluster
from moesim.traces import (
    Batch,
    InputError,
    ModelSpec,
    Phase,
    StepTokens,
    TokenTable,
    assign_ranks,
    batches,
    split_requests,
)

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
    batch_tokens: int
    fit: TokenTable
    """The requests that predictors and placements learn from."""
    run: TokenTable
    """The others: these are executed."""
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
            "batch_tokens": self.batch_tokens,
            "steps": len(self.batches),
            "tokens": sum(len(batch.tokens) for batch in self.batches),
            "split": "fitted on one half of the requests, run on the other",
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
    table: TokenTable,
    *,
    phase: Phase,
    gpus: int,
    batch_tokens: int,
    extra_slots: int = 1,
    max_steps: int | None = None,
) -> Scenario:
    """Split the requests of `table` (the tokens of the phase's stack), batch the held-out ones.

    Raises InputError where the recording is too short, or the cluster is impossible.
    """
    table = table.take(table.phase == phase)
    fit, run = split_requests(table)
    if not len(fit) or not len(run):
        raise InputError(f"the trace needs at least two {phase.name.lower()} requests: one to fit on, one to run")
    cluster = Cluster(
        layers=table.num_layers,
        experts=spec.num_experts,
        gpus=gpus,
        extra_slots=extra_slots,
        top_k=spec.top_k,
    )
    steps = batches(run, batch_tokens, phase)[:max_steps]
    return Scenario(
        spec=spec,
        phase=phase,
        cluster=cluster,
        batch_tokens=batch_tokens,
        fit=fit,
        run=run,
        batches=tuple(steps),
    )


def rank_counts(ids_TK: NDArray[np.integer], dropped_T: NDArray[np.bool_], rank_T: Ints, cluster: Cluster) -> Ints:
    """[G, E] tokens that each rank holds for each expert of one layer; dropped tokens do not count."""
    key = rank_T[:, None] * cluster.experts + ids_TK.astype(np.int64)
    count = np.bincount(key[~dropped_T].ravel(), minlength=cluster.gpus * cluster.experts)
    return count.reshape(cluster.gpus, cluster.experts)
