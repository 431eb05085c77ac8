"""Where steps come from: one after the other (a closed loop), or made of the requests that are there (an open loop).

An open loop batches continuously under a budget of tokens a step (Orca, OSDI 2022; chunked prefill: Sarathi-Serve,
arXiv 2403.02310): first one token of every request that decodes, then prompts in order of arrival, cut where the
budget ends. An encoder's requests are not cut. The routing of every token is the recording's. Knows nothing about
experts or time but what it is told. Shape letters: T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.sim.arrivals import Arrivals
from moesim.sim.profile import HardwareProfile
from moesim.sim.residency import Cluster
from moesim.sim.scenario import Scenario, StepInput
from moesim.traces import InputError, Phase, StepTokens, step_tokens
from moesim.traces.spec import DTYPE_BYTES


class Source(Protocol):
    """Hands out steps."""

    def next(self, now_s: float) -> StepInput | float | None:
        """The next step; or the time until which there is nothing to do; or None: all is done."""

    def ended(self, now_s: float) -> list[dict[str, Any]]:
        """The step that was handed out last has ended; the requests that are done with it, for the event log."""

    def config(self) -> dict[str, Any]:
        """For reports."""


class Closed:
    """The steps of a scenario, each as soon as the one before has ended; `groups` of GPUs hold different requests."""

    def __init__(self, scenario: Scenario, groups: int) -> None:
        self._steps: Iterator[StepInput] = scenario.steps(groups)

    def next(self, now_s: float) -> StepInput | None:
        """The next step."""
        return next(self._steps, None)

    def ended(self, now_s: float) -> list[dict[str, Any]]:
        """Steps know no requests."""
        return []

    def config(self) -> dict[str, Any]:
        """Nothing beside the scenario's."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Options of an open loop."""

    arrivals: Arrivals
    requests: int | None = None
    """How many come; the recorded ones are taken in turn, again where more come. None: each once."""
    seed: int = 0
    max_running: int = 1024
    """Requests in flight at most."""
    ttft_s: float | None = None
    tpot_s: float | None = None
    """Targets; a request that meets those that are given counts to the goodput."""

    def __post_init__(self) -> None:
        if self.max_running < 1 or (self.requests is not None and self.requests < 1):
            raise InputError("an open loop needs at least one request, and one in flight")
        for name in ("ttft_s", "tpot_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise InputError(f"the target {name} must be positive, got {value}")

    def targets(self) -> dict[str, float]:
        """Those that are given."""
        given = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(slots=True)
class _Request:
    number: int
    arrival_s: float
    rows: NDArray[np.intp]
    """Of the recording, in order of position: the prompt, then what was generated."""
    prompt: int
    group: int = 0
    done: int = 0
    """Tokens that have been computed."""
    start_s: float = -1.0
    first_token_s: float = -1.0


class Server:
    """An open loop over the requests of a scenario made to be served."""

    def __init__(self, scenario: Scenario, serving: Serving, groups: int, kv_tokens: int | None) -> None:
        if scenario.workload.unit != "tokens":
            raise InputError("an open loop batches by tokens: give --batch-tokens, the budget of a step")
        self._scenario, self._serving, self._groups = scenario, serving, groups
        self._budget, self._kv_tokens = scenario.workload.batch, kv_tokens
        self._whole = scenario.phase is Phase.ENCODER
        recorded = _requests(scenario)
        count = serving.requests or len(recorded)
        times = serving.arrivals.times(count, serving.seed).tolist()
        self._coming = deque(_Request(i, time, *recorded[i % len(recorded)]) for i, time in enumerate(times))
        if kv_tokens is not None and (most := max(len(rows) for rows, _ in recorded)) > kv_tokens:
            raise InputError(
                f"a request has {most} tokens, the KV cache of a GPU has room for {kv_tokens}: use more GPUs or a "
                "smaller dtype"
            )
        self._running: list[_Request] = []
        self._held = [0] * groups
        self._now: list[tuple[_Request, int]] = []

    def config(self) -> dict[str, Any]:
        """What the open loop depends on."""
        s = self._serving
        return {
            "arrivals": s.arrivals.text(),
            "seed": s.seed,
            "requests": len(self._coming) + len(self._running),
            "max_running": s.max_running,
            "targets": s.targets(),
        }

    def next(self, now_s: float) -> StepInput | float | None:
        """A step of what is there now."""
        self._admit(now_s)
        if not self._running:
            return self._coming[0].arrival_s if self._coming else None
        left = self._budget
        chosen: list[tuple[_Request, int]] = []
        for request in self._running:  # those that decode first
            if request.done >= request.prompt and left:
                chosen.append((request, 1))
                left -= 1
        for request in self._running:
            if request.done < request.prompt and left:
                want = request.prompt - request.done
                if self._whole and want > left and chosen:
                    break
                taken = want if self._whole else min(want, left)
                chosen.append((request, taken))
                left -= min(taken, left)
        for request, _ in chosen:
            if request.start_s < 0:
                request.start_s = now_s
        self._now = sorted(chosen, key=lambda pair: pair[0].number)
        return self._step()

    def ended(self, now_s: float) -> list[dict[str, Any]]:
        """Requests that are done leave, and their group has room again."""
        finished = []
        for request, taken in self._now:
            request.done += taken
            if request.first_token_s < 0 and request.done >= request.prompt:
                request.first_token_s = now_s
            if request.done == len(request.rows):
                self._held[request.group] -= len(request.rows)
                finished.append(
                    {
                        "request": request.number,
                        "arrival_s": request.arrival_s,
                        "start_s": request.start_s,
                        "first_token_s": request.first_token_s,
                        "prompt_tokens": request.prompt,
                        "output_tokens": len(request.rows) - request.prompt + 1,
                    }
                )
        gone = {done["request"] for done in finished}
        self._running = [request for request in self._running if request.number not in gone]
        return finished

    def _admit(self, now_s: float) -> None:
        """In order of arrival, while there is room for the whole request."""
        while self._coming and self._coming[0].arrival_s <= now_s and len(self._running) < self._serving.max_running:
            group = min(range(self._groups), key=lambda g: (self._held[g], g))
            need = len(self._coming[0].rows)
            if self._kv_tokens is not None and self._held[group] + need > self._kv_tokens:
                return
            request = self._coming.popleft()
            request.group = group
            self._held[group] += need
            self._running.append(request)

    def _step(self) -> StepInput:
        rows = np.concatenate([request.rows[request.done : request.done + taken] for request, taken in self._now])
        counts = [taken for _, taken in self._now]
        run = self._scenario.run
        known = step_tokens(run, rows)
        number = np.repeat(np.array([r.number for r, _ in self._now], np.int32), counts)
        return StepInput(
            tokens=StepTokens(token_id=known.token_id, request=number, position=known.position),
            queued=None,
            rank=np.repeat(np.array([r.group for r, _ in self._now], np.int64), counts),
            routing=run.take(rows),
            decode=np.repeat(np.array([r.done >= r.prompt for r, _ in self._now]), counts),
            queued_ids=None,
        )


def _requests(scenario: Scenario) -> list[tuple[NDArray[np.intp], int]]:
    """(rows, tokens of the prompt) of every recorded request, in order of arrival."""
    run = scenario.run
    order = np.lexsort((run.position, run.request))
    ends = np.flatnonzero(np.append(np.diff(run.request[order]) != 0, True)) + 1
    parts = np.split(order, ends[:-1])
    parts.sort(key=lambda rows: int(rows.min()))
    found = [(rows, int((run.phase[rows] != Phase.DECODE).sum())) for rows in parts]
    without = sum(prompt == 0 for _, prompt in found)
    if without:
        raise InputError(f"{without} recorded requests have no prompt: an open loop needs whole requests")
    return found


def kv_tokens(scenario: Scenario, cluster: Cluster, profile: HardwareProfile, dtype: str, shared: int) -> int | None:
    """Tokens whose keys and values fit on the GPUs of a group beside the experts' slots and the dense weights of the
    stack; None in an encoder, which keeps none. Embeddings and activations are not counted."""
    if scenario.phase is Phase.ENCODER:
        return None
    spec, w, size = scenario.spec, scenario.spec.sized(), DTYPE_BYTES[dtype]
    stack = spec.stack(scenario.stack)
    moe = len(stack.moe_layers)
    attention = w.d_model * (2 * w.num_heads * w.d_kv + w.kv_width)
    dense = stack.num_layers * attention + moe * w.ffn_params(w.shared_d_ff)
    dense += (stack.num_layers - moe) * w.ffn_params(w.dense_d_ff)
    room = profile.gpu.memory_bytes - cluster.gpu_slots * spec.expert_bytes(dtype) - dense * size // shared
    return max(room, 0) * shared // (stack.num_layers * w.kv_width * size)
