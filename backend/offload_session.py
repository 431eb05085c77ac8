"""Policies of one phase on one device whose slots do not hold every expert: steps of a scenario, interleaved, timed.

The phase's stack is offloaded; of a decoder, what it reads and its prompts are prepared before anything is timed. Knows
nothing about terminals. Shape letters: T tokens of a step, B rows, S positions, L MoE layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.attention import fuse_norms
from moesim.backend.job import Progress
from moesim.backend.offload import Offload
from moesim.backend.prompts import request_states
from moesim.backend.session import Pass, device_facts, summarise, take_turns
from moesim.backend.slots import FULL
from moesim.backend.switch import check_trace
from moesim.backend.walk import Choices, DecodeWalk, EncoderWalk, Known, Walk
from moesim.sim.driver import DecisionLog
from moesim.sim.eviction import ORACLES, Future
from moesim.sim.policies import Policy, recipe_digest
from moesim.sim.results import Result
from moesim.sim.scenario import Scenario, StepInput
from moesim.sim.timeline import Span
from moesim.traces import InputError, Phase, TokenTable

Keep = Callable[[int, torch.Tensor], None]
"""Is given the last hidden states [T, D] of a step, by its number."""
READ_TOKENS = 128
"""Encoder positions that a decoder attends to where nobody says how many."""
HOST_TOKENS = (1, 4, 16, 64)
"""Tokens of one expert for which the host's time is measured."""
GRAPHS, GRAPH_STEPS = 12, 2
"""Shapes of batches that become CUDA graphs: as many, those of at least so many steps; the others are called
directly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One step, as it is given to the device."""

    step: StepInput
    walk: Walk
    packed: torch.Tensor
    admitted: tuple[tuple[int, int], ...] = ()
    """(row, request) that begin with this step."""


class OffloadRun:
    """A scenario's steps on a model whose phase's stack is offloaded; `run` policies, whatever their number of slots.

    `replay`: the recorded routing is forced onto the layers, and of a decoder the caches are made up; otherwise the
    model's own routers decide, on what was recorded. `offload`: the model's experts, where another scenario's run
    has taken them already; then the options are its own. Patches `model` in place and takes its experts. Raises
    InputError where model and recording do not fit together.
    """

    def __init__(
        self,
        model: Any,
        scenario: Scenario,
        device: torch.device,
        *,
        replay: bool,
        encoder_table: TokenTable | None = None,
        prompts: TokenTable | None = None,
        copy_dtype: str | None = None,
        poison: bool = False,
        asynchronous: bool = True,
        kernel: str = "auto",
        offload: Offload | None = None,
    ) -> None:
        if scenario.phase is Phase.PREFILL:
            raise InputError("offloading on the device runs the phases encoder and decode")
        self.scenario, self.device, self.replay = scenario, device, replay
        stack: Any = scenario.stack
        if offload is None:
            offload = Offload(
                model, stack, device, copy_dtype=copy_dtype, poison=poison, asynchronous=asynchronous, kernel=kernel
            )
            model.to(device)
            fuse_norms(model)
        self.offload = offload
        check_trace(scenario.spec, stack, self.offload.patched, replay=replay)
        self._stack = getattr(model, stack)
        self._choices = Choices(self._stack, scenario.run if replay else None)
        self._states: dict[int, Any] = {}
        decode = scenario.phase is Phase.DECODE
        if decode and not replay:
            self._states = request_states(model, scenario, encoder_table, prompts, device)
        self._steps = list(self._decode() if decode else self._encode())
        self._copy_dtype = copy_dtype
        self.future = _needs(scenario)
        self._host_s: list[float] | None = None
        self._copy_s = 0.0

    def graph(self) -> None:
        """Capture the shapes of batches that come often as CUDA graphs; nothing where there is no CUDA."""
        walks = [one.walk for one in self._steps]
        often = sorted({id(walk): walk for walk in walks}.values(), key=lambda walk: -walks.count(walk))
        for walk in often[:GRAPHS]:
            if walks.count(walk) >= GRAPH_STEPS:
                walk.graph()

    def run(
        self,
        policy: Policy,
        log: DecisionLog | None = None,
        *,
        keep: Keep | None = None,
        spans: bool = False,
        copy_dtype: str | None = None,
    ) -> Pass:
        """All steps under one policy. `copy_dtype`: of copies in full precision, instead of what the run was made
        with."""
        offload, oracle = self.offload, policy.recipe.eviction in ORACLES
        offload.options = replace(offload.options, copy_dtype=copy_dtype or self._copy_dtype)
        if policy.recipe.routing == "predicted":
            raise InputError(
                f"policy {policy.name} executes forecasts: its quality is measured by moesim quality, not its speed"
            )
        offload.start(policy, log, cheaper=self._cheaper, future=self.future if oracle else None, continuous=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        try:
            for number, prepared in enumerate(self._steps):
                self._step(prepared)
                if keep is not None:
                    keep(number, prepared.walk.hidden_ND[: len(prepared.step.tokens)].clone())
        finally:
            offload.finish()
        wall_s = time.perf_counter() - began
        records = offload.tally.records
        steps = offload.tally.events
        hit, awaited, missed = np.sum([step.needed for step in steps], axis=0).tolist()
        scores: dict[str, float | int | None] = {
            **offload.driver.scores.summary(),
            "hit_rate": hit / max(hit + awaited + missed, 1),
            "decide_host_s": sum(step.decide_s for step in steps),
            "wall_s": wall_s,
        }
        if self.device.type == "cuda":
            scores["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return Pass(records, scores, log.text() if log else "", _spans(records) if spans else ())

    def _step(self, prepared: Prepared) -> None:
        offload, step, tokens = self.offload, prepared.step, len(prepared.step.tokens)

        def between(layer: int, known: Known) -> torch.Tensor:
            told = offload.ask(known.routed, known.code_2N, tokens)
            return offload.compute(layer, known.routed, told, known.groups)

        walk = prepared.walk
        for row, request in prepared.admitted:
            assert isinstance(walk, DecodeWalk)
            walk.admit(row, self._states[request])
        recorded = step.routing if self.replay else None
        offload.expect(queued=step.queued, truth=(step.ids, step.queued_ids), recorded=recorded)
        walk.put(prepared.packed)
        offload.begin(step.tokens)
        walk(between)
        offload.end()

    def _cheaper(self, tokens: int) -> bool:
        """Whether the host computes so many tokens of an expert sooner than its copy comes, both as measured here."""
        if self._host_s is None:
            self._host_s, self._copy_s = host_seconds(self.offload), _copy_seconds(self.offload)
        return float(np.interp(tokens, HOST_TOKENS, self._host_s)) * max(tokens / HOST_TOKENS[-1], 1.0) < self._copy_s

    def _encode(self) -> Iterator[Prepared]:
        walks: dict[tuple[int, int, bool], EncoderWalk] = {}
        for step, rows in zip(self.scenario.steps(), _rows(self.scenario), strict=True):
            request_T, position_T = step.tokens.request, step.tokens.position
            row_T = np.cumsum(np.diff(request_T, prepend=request_T[:1]) != 0)
            B, S = int(row_T[-1]) + 1, int(position_T.max()) + 1
            shape = (B, S, len(request_T) < B * S)
            if shape not in walks:
                walks[shape] = EncoderWalk(self._stack, self._choices, B, S, padded=shape[2])
            walk = walks[shape]
            yield Prepared(step=step, walk=walk, packed=walk.pack(row_T * S + position_T, rows, step.tokens.token_id))

    def _decode(self) -> Iterator[Prepared]:
        """Each request keeps its row from its first step to its last."""
        steps = list(self.scenario.steps())
        rows, room = max(len(step.tokens) for step in steps), 1 + max(int(s.tokens.position.max()) for s in steps)
        read = max((state.read_keys.shape[2] for state in self._states.values()), default=READ_TOKENS)
        walk = DecodeWalk(self._stack, self._choices, rows, room, read)
        if self.replay:
            walk.make_up()
        held: dict[int, int] = {}
        for step, recorded in zip(steps, _rows(self.scenario), strict=True):
            now = step.tokens.request.tolist()
            held = {request: row for request, row in held.items() if request in now}
            free = iter(sorted(set(range(rows)) - set(held.values())))
            new = [(next(free), request) for request in now if request not in held]
            held |= {request: row for row, request in new}
            row_T = np.array([held[request] for request in now])
            packed = walk.pack(row_T, recorded, step.tokens.token_id, step.tokens.position)
            yield Prepared(step=step, walk=walk, packed=packed, admitted=() if self.replay else tuple(new))


def run_interleaved(
    run: OffloadRun,
    policies: Sequence[Policy],
    *,
    repeats: int,
    warmup: int,
    say: Progress | None = None,
    decisions: bool = False,
    spans: bool = False,
) -> dict[str, list[Pass]]:
    """Policy to its counted passes; see `take_turns`."""
    one = partial(run.run, spans=spans)
    return take_turns(one, policies, repeats=repeats, warmup=warmup, say=say, decisions=decisions)


def results_of(
    passes: dict[str, list[Pass]], policies: Sequence[Policy], run: OffloadRun, config: dict[str, Any]
) -> list[Result]:
    """The median pass of every policy; `config` is what the caller adds to what is known here."""
    about = {**run.scenario.config(), "executor": "offload", "routing": "replay" if run.replay else "model"}
    about |= {"copy_dtype": run.offload.options.copy_dtype} if run.offload.options.copy_dtype else {}
    about |= {**describe_device(run.device), **config}
    return [
        summarise(
            policy.name,
            passes[policy.name],
            {**about, "resident": policy.cluster.resident, "policy_digest": recipe_digest(policy.recipe)},
        )
        for policy in policies
    ]


def describe_device(device: torch.device) -> dict[str, Any]:
    """Device, its name, threads and library versions."""
    return {**device_facts(device), "threads": torch.get_num_threads()}


def host_seconds(offload: Offload, repeats: int = 3) -> list[float]:
    """Of each of HOST_TOKENS, the host's seconds for so many tokens of one expert: the least of some, each with another
    expert."""
    shape, found = offload.patched.shape, []
    for tokens in HOST_TOKENS:
        x_ND, spent = torch.zeros((tokens, shape.d_model), dtype=shape.dtype), []
        for expert in range(min(repeats, offload.patched.experts)):
            began = time.perf_counter()
            offload.host.compute(0, expert, x_ND, offload.patched.activation)
            spent.append(time.perf_counter() - began)
        found.append(min(spent))
    return found


def _copy_seconds(offload: Offload, repeats: int = 3) -> float:
    """Seconds of one expert's copy to the device that has the link to itself, the least of some."""
    to_P, spent = torch.empty_like(offload.slots.rows_SP[0]), []
    for expert in range(min(repeats, offload.patched.experts)):
        began = time.perf_counter()
        to_P.copy_(offload.host.rows(FULL)[0][expert])
        spent.append(time.perf_counter() - began)
    return min(spent)


def _rows(scenario: Scenario) -> Iterator[NDArray[np.intp]]:
    """Of every step, its tokens' rows in the recording that is run."""
    return (batch.rows for batch in scenario.batches)


def _needs(scenario: Scenario) -> Future:
    """What evictions that are oracles are shown: of each layer, the experts that have tokens, step after step."""
    run = scenario.run
    return [
        [
            np.unique(run.topk_ids[batch.rows, layer][~run.dropped[batch.rows, layer]]).astype(np.int64)
            for batch in scenario.batches
        ]
        for layer in range(run.num_layers)
    ]


def _spans(records: Sequence[Any]) -> list[Span]:
    """Phases of all steps, one after the other; where they lie within a step is not kept."""
    found, now_s = [], 0.0
    for record in records:
        for phase, seconds in record.phase_s.items():
            if seconds > 0:
                found.append(Span(phase, "GPU 0", now_s, seconds))
                now_s += seconds
    return found
