"""What is run: which recorded tokens, in which steps, on how many GPUs. The same scenario feeds both executors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import RoutedLayer, routed_layer
from moesim.sim.dispatch import Ints
from moesim.sim.residency import EMPTY, Cluster
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
    request_lengths,
    split_loads,
    split_requests,
)
from moesim.traces.expand import tokens_of_loads
from moesim.traces.gates import Gates

STACK_OF_PHASE = {Phase.ENCODER: "encoder", Phase.PREFILL: "decoder", Phase.DECODE: "decoder"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step with its recorded routing, T tokens in order of request and position."""

    tokens: StepTokens
    queued: StepTokens | None
    """The next step's tokens, where a server would know them (not in decode, not at the end)."""
    rank: NDArray[np.int64]
    """[T] the GPU, or the group of GPUs with tensor-parallel attention, that holds each token."""
    routing: TokenTable
    """What was recorded of the T tokens; whoever runs the step shows it layer by layer."""
    decode: NDArray[np.bool_]
    """[T] tokens that continue a request: they read its KV cache."""
    queued_ids: NDArray[np.integer] | None
    """[T', L, K] recorded routing of the queued step, for oracles."""

    @property
    def ids(self) -> NDArray[np.integer]:
        """[T, L, K] recorded routing."""
        return self.routing.topk_ids

    @property
    def dropped(self) -> NDArray[np.bool_]:
        """[T, L] tokens over capacity."""
        return self.routing.dropped

    def layer(self, layer: int) -> RoutedLayer:
        """What the router of `layer` did, as a predictor may see it from then on."""
        return routed_layer(self.routing, layer)


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
    """The steps of a closed loop; none where requests come by themselves (serving.py)."""
    gates: Gates | None = None
    """The frozen gates of the recorded model, where they were recorded."""
    served: bool = False
    """True: `run` holds whole requests, prompts and what was generated, for an open loop."""
    model_digest: str = ""
    """Of the recorded model's weights, as the trace has it; empty where it does not say."""

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
            "phase": "prefill and decode" if self.served and self.stack == "decoder" else self.phase.name.lower(),
            "gpus": self.cluster.gpus,
            "extra_slots": self.cluster.extra_slots,
            **self.workload.describe(),
            "recorded": "loads" if isinstance(self.fit, LoadTable) else "tokens",
            **({"model_digest": self.model_digest} if self.model_digest else {}),
            **({"resident": self.cluster.resident} if self.cluster.resident is not None else {}),
            **({} if self.served else {"steps": len(self.batches), "tokens": sum(len(b.tokens) for b in self.batches)}),
        }

    def steps(self, groups: int | None = None) -> Iterator[StepInput]:
        """The steps in order, with the recorded routing of each; requests lie on `groups` ranks (default: GPUs)."""
        for i, batch in enumerate(self.batches):
            following = self.batches[i + 1] if i + 1 < len(self.batches) else None
            known = following if self.phase is not Phase.DECODE else None
            yield StepInput(
                tokens=batch.tokens,
                queued=known.tokens if known else None,
                rank=assign_ranks(batch.tokens.request, groups or self.cluster.gpus),
                routing=self.run.take(batch.rows),
                decode=np.full(len(batch.rows), self.phase is Phase.DECODE),
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
    resident: int | None = None,
    max_steps: int | None = None,
    request_texts: Sequence[str] = (),
    gates: Gates | None = None,
    served: bool = False,
    node_size: int | None = None,
) -> Scenario:
    """Split the requests of `table` (the phase's stack) and batch the held-out ones; loads are split by time.

    `request_texts` names the text of every request, for a split by data set. `resident`: slots a GPU and layer where
    the host's memory backs them. `served`: the requests of the stack come by themselves, in an open loop. `node_size`:
    GPUs of a node, for placements that keep things in one; None: all GPUs.
    Raises InputError where the recording is too short, the split impossible, or the cluster.
    """
    if served and isinstance(table, LoadTable):
        raise InputError("a recording of loads knows no requests: an open loop needs tokens")
    table = table if served and phase is not Phase.ENCODER else _of_phase(table, phase)
    fit: TokenTable | LoadTable
    run: TokenTable | LoadTable
    if isinstance(table, LoadTable):
        fit, run = split_loads(table, workload.split)
        workload = replace(workload, split="time")
    else:
        fit, run = split_requests(table, workload.split, request_texts)
    shape = _Shape(gpus, extra_slots, resident, node_size)
    if served:
        assert isinstance(run, TokenTable), "loads were refused"
        phase = Phase.PREFILL if phase is Phase.DECODE else phase
        return replace(_scenario(spec, phase, workload, fit, run, shape, ()), gates=gates)
    return replace(_assemble(spec, phase, workload, max_steps, fit, run, shape), gates=gates)


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
    return _assemble(spec, phase, workload, max_steps, table, table, _Shape(gpus, extra_slots, None))


def _of_phase(table: TokenTable | LoadTable, phase: Phase) -> TokenTable | LoadTable:
    table = table.take(table.phase == phase)
    if not len(table):
        raise InputError(f"the trace has no {phase.name.lower()} tokens; record them, or choose another phase")
    return table


@dataclass(frozen=True, slots=True)
class _Shape:
    gpus: int
    extra_slots: int
    resident: int | None
    node_size: int | None = None


def _assemble(
    spec: ModelSpec,
    phase: Phase,
    workload: Workload,
    max_steps: int | None,
    fit: TokenTable | LoadTable,
    run: TokenTable | LoadTable,
    shape: _Shape,
) -> Scenario:
    if isinstance(run, LoadTable):
        run = tokens_of_loads(merge_steps(run, workload, spec.top_k).take(slice(max_steps)), spec.top_k)
        steps = batches(run, replace(workload, unit="recorded", shuffle=None), phase)
    else:
        steps = batches(run, workload, phase)[:max_steps]
    return _scenario(spec, phase, workload, fit, run, shape, tuple(steps))


def _scenario(
    spec: ModelSpec,
    phase: Phase,
    workload: Workload,
    fit: TokenTable | LoadTable,
    run: TokenTable,
    shape: _Shape,
    steps: tuple[Batch, ...],
) -> Scenario:
    cluster = Cluster(
        layers=run.num_layers,
        experts=spec.num_experts,
        gpus=shape.gpus,
        extra_slots=shape.extra_slots,
        top_k=spec.top_k,
        resident=shape.resident,
        node_size=shape.node_size,
        groups=spec.groups,
    )
    return Scenario(
        spec=spec,
        phase=phase,
        cluster=cluster,
        workload=workload,
        fit=fit,
        run=run,
        batches=steps,
        served=not steps,
    )


def micro_batches(step: StepInput, count: int, groups: int, together: bool) -> list[StepInput]:
    """`step`, whose requests lie on `groups` ranks, in at most `count` parts by whole requests: those of every rank go,
    in order, to the part with the fewest of its tokens. What a part sees queued is its own part of the next step where
    parts run `together`, and the part after it where they run in turn."""
    if count == 1:
        return [step]
    mine_T = _parts(step.tokens.request, step.rank, count)
    mine = [(step.tokens.take(rows), step.ids[rows]) for rows in _rows(mine_T, count)]
    waiting: list[tuple[StepTokens, NDArray[np.integer]]] = []
    if step.queued is not None and step.queued_ids is not None:
        queued_T = _parts(step.queued.request, assign_ranks(step.queued.request, groups), count)
        waiting = [(step.queued.take(rows), step.queued_ids[rows]) for rows in _rows(queued_T, count)]
    if not together:
        waiting = mine[1:] + waiting[:1]
    found = []
    for part, rows in enumerate(_rows(mine_T, count)):
        queued, queued_ids = waiting[part] if part < len(waiting) else (None, None)
        tokens, _ = mine[part]
        found.append(
            StepInput(
                tokens=tokens,
                queued=queued,
                rank=step.rank[rows],
                routing=step.routing.take(rows),
                decode=step.decode[rows],
                queued_ids=queued_ids,
            )
        )
    return found


def _rows(part_T: NDArray[np.int64], count: int) -> list[NDArray[np.intp]]:
    """The rows of every part that has any."""
    rows = (np.flatnonzero(part_T == part) for part in range(count))
    return [some for some in rows if len(some)]


def _parts(request_T: NDArray[np.int32], rank_T: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """[T] the part of each token."""
    lengths = request_lengths(request_T)
    held: dict[int, list[int]] = {}
    part_R = np.empty(len(lengths), np.int64)
    for i, (rank, length) in enumerate(
        zip(rank_T[np.cumsum(lengths) - lengths].tolist(), lengths.tolist(), strict=True)
    ):
        tokens = held.setdefault(rank, [0] * count)
        part_R[i] = part = tokens.index(min(tokens))
        tokens[part] += length
    return np.repeat(part_R, lengths)


def rank_counts(ids_TK: NDArray[np.integer], dropped_T: NDArray[np.bool_], rank_T: Ints, cluster: Cluster) -> Ints:
    """[G, E] tokens that each rank holds for each expert of one layer; dropped tokens and EMPTY pairs do not count."""
    key = rank_T[:, None] * cluster.experts + ids_TK.astype(np.int64)
    kept_TK = ~dropped_T[:, None] & (ids_TK != EMPTY)
    count = np.bincount(key[kept_TK], minlength=cluster.gpus * cluster.experts)
    return count.reshape(cluster.gpus, cluster.experts)
