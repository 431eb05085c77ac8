"""One micro-batch on its way through the layers: the phases that it waits for, and the GPUs that compute them.

With one micro-batch in flight the barriers of the layers make a chain. With several, each is a process of its own: a
GPU computes what was given to it first, and one all-to-all runs at a time, so that one micro-batch can compute while
another communicates. Shape letters: L MoE layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.sim.cost import (
    Seconds,
    all_reduce_seconds,
    attention_seconds,
    busiest,
    dense_layers_before,
    exchange_outside,
    exchange_seconds,
    expert_seconds,
    experts_outside,
    host_seconds,
    rank_tokens,
    shared_by,
)
from moesim.sim.dispatch import Ints
from moesim.sim.residency import PRECISIONS, Transfer
from moesim.sim.scenario import StepInput, rank_counts
from moesim.sim.sends import vectors

if TYPE_CHECKING:
    from moesim.sim.engine import Machine

Steps = Generator[Any, Any, None]


class Compute:
    """A queue on every GPU, first come, first served: when each is free again."""

    def __init__(self, env: Any, gpus: int) -> None:
        self._env = env
        self._free_G = np.zeros(gpus)

    def submit(self, seconds_G: Seconds) -> tuple[Seconds, float]:
        """([G] when each GPU begins, seconds from now until the last one ends)."""
        now = float(self._env.now)
        start_G = np.where(seconds_G > 0, np.maximum(self._free_G, now), now)
        end_G = start_G + seconds_G
        self._free_G = np.where(seconds_G > 0, end_G, self._free_G)
        return start_G, float(end_G.max()) - now


class Lane:
    """Runs micro-batches one after the other; `number` tells it from the others that are in flight."""

    def __init__(self, machine: Machine, number: int, together: bool) -> None:
        self._m, self._number = machine, number
        self._env, self._driver = machine.env, machine.driver
        self._compute = Compute(machine.env, machine.cluster.gpus) if together else None

    def share(self, other: Lane) -> None:
        """Compute on the same GPUs as `other`."""
        self._compute = other._compute

    def run(self, step: StepInput, part: int) -> Steps:
        """All layers of a micro-batch, `part` of its step."""
        m = self._m
        self._where: dict[str, Any] = {"part": part, "layer": None}
        dense_L = dense_layers_before(m.spec.stack(m.scenario.stack))
        truth = (step.ids, step.queued_ids)
        begin = partial(self._driver.begin_step, step.tokens, queued=step.queued, truth=truth, lane=self._number)
        yield from self._decided(begin)
        seen = -1
        for layer in range(m.cluster.layers):
            self._where["layer"] = layer
            if seen != m.failures:  # at the start, and when GPUs fail: others take their requests
                seen, rank_T = m.failures, m.ranks(step.rank)
                attention_LG, most = self._attention(step, rank_T)
            yield from self._compute_phase("attention", attention_LG[layer])
            yield from self._all_reduce(most, 1 + 2 * dense_L[layer])
            ahead = yield from self._decided(partial(self._driver.routed, step.layer(layer), self._number))
            m.copies.needed(layer)
            yield from self._experts(layer, step, m.ranks(step.rank) if seen != m.failures else rank_T, ahead)
            yield from self._all_reduce(most, 1)
        self._driver.end_step(self._number)

    def _attention(self, step: StepInput, rank_T: Ints) -> tuple[Seconds, int]:
        """([L, G] seconds, the most tokens that a group of GPUs holds)."""
        m, shared = self._m, self._m.execution.tensor_parallel
        ranks = shared_by(rank_tokens(step.tokens, rank_T, m.cluster.gpus, step.decode), shared)
        stack = m.spec.stack(m.scenario.stack)
        return attention_seconds(ranks, stack, m.profile.gpu, m.spec, m.dtype, shared), int(ranks.tokens_G.max())

    def _decided(self, decide: Callable[[], list[Transfer]]) -> Generator[Any, Any, list[Transfer]]:
        """A decision point: the time to decide, then the transfers begin, then the blocking ones are waited for.
        Returns copies that begin after what the layer is missing: where nobody else could wait for them, those ahead
        of their use."""
        m = self._m
        if m.decide_s:
            begin = float(self._env.now)
            yield self._env.timeout(m.decide_s)
            self._passed("decide", begin, m.decide_s)
        yield self._env.timeout(0)  # what arrives at this instant has arrived
        moves = decide()
        alone = self._driver.cache is not None and self._compute is None
        hold = alone and self._driver.routed_layers(self._number) > 0
        yield from self._blocked(m.copies.start(t for t in moves if t.blocking or t.free or not hold))
        return [t for t in moves if hold and not (t.blocking or t.free)]

    def _blocked(self, copies: list[Any]) -> Steps:
        if copies:
            begin = float(self._env.now)
            yield self._env.all_of(copies)
            yield self._env.timeout(0)  # what arrives at this instant has arrived
            self._passed("blocked", begin, float(self._env.now) - begin)

    def _experts(self, layer: int, step: StepInput, rank_T: Ints, ahead: list[Transfer]) -> Steps:
        """All tokens of a layer. Where experts come and go, one micro-batch at a time: two that displaced each other's
        experts would never end."""
        if self._driver.cache is None or self._compute is None:
            yield from self._waves(layer, step, rank_T, ahead)
            return
        begin = float(self._env.now)
        visit = yield from self._m.turns[layer].enter()
        if self._env.now > begin:
            self._passed("blocked", begin, float(self._env.now) - begin)
        yield from self._waves(layer, step, rank_T, ahead)
        visit.leave()

    def _waves(self, layer: int, step: StepInput, rank_T: Ints, ahead: list[Transfer]) -> Steps:
        """All tokens of a layer, in waves where not all experts find a slot at once."""
        m = self._m
        ids_TK, dropped_T = self._executed(layer, step), step.dropped[:, layer]
        left_GE = rank_counts(ids_TK, dropped_T, rank_T, m.cluster)
        while True:
            host_E = np.zeros(m.cluster.experts, np.int64)
            if self._driver.cache is not None:
                fetch = self._driver.fetch(left_GE, self._number)
                host_E = np.where(fetch.host_E, left_GE.sum(axis=0), 0)
                left_GE = np.where(fetch.host_E, 0, left_GE)
                started = m.copies.start(fetch.moves)
                m.copies.start(ahead)
                ahead = []
                yield from self._blocked([*m.copies.awaited(layer, fetch.awaited), *started])
            elif self._compute is not None:
                yield from self._arrivals(layer, left_GE)
            send_GEG = self._driver.dispatch(left_GE, self._number)
            left_GE = left_GE - send_GEG.sum(axis=2)
            again = self._driver.cache is not None and bool(left_GE.any())
            lost = 0 if again else int(left_GE.sum())
            how, shared = m.execution.send, m.execution.tensor_parallel
            send_GG = vectors(
                send_GEG, ids_TK, dropped_T, rank_T, how=how, shared=shared, node_size=m.profile.node_size
            )
            yield from self._wave(layer, send_GEG.sum(axis=0), send_GG, host_E, lost)
            if not again:
                return

    def _executed(self, layer: int, step: StepInput) -> Ints:
        """[T, K] what is computed of the router's choice; what of it is there is logged where experts come and go."""
        ids_TK, dropped_T = step.ids[:, layer].astype(np.int64), step.dropped[:, layer]
        if self._driver.cache is None:
            predicted = self._driver.policy.recipe.routing == "predicted"
            return self._driver.executed(dropped_T, lane=self._number).ids_TK if predicted else ids_TK
        gates, given = self._m.scenario.gates, step.routing.router_input
        scores_TE = None
        if self._driver.policy.recipe.miss == "substitute" and gates is not None and given is not None:
            scores_TE = given[:, layer].astype(np.float32) @ gates.weight[layer].T + gates.bias[layer]
        chosen = self._driver.executed(dropped_T, scores_TE, self._number)
        counts = {"skipped": chosen.skipped, "substituted": chosen.substituted}
        more = {name: count for name, count in counts.items() if count}
        there = {"hit": chosen.hit, "awaited": chosen.awaited, "missed": chosen.missed}
        self._m.log("needed", **self._where, **there, **more)
        return chosen.ids_TK

    def _arrivals(self, layer: int, load_GE: Ints) -> Steps:
        """Wait for experts that another micro-batch's plan is moving: their only copies are under way."""
        residency = self._driver.residency
        while True:
            missing_E = load_GE.any(axis=0) & ~residency.usable_LEG[layer].any(axis=1)
            pairs = np.argwhere(missing_E[:, None] & residency.coming_LEG[layer]).tolist()
            copies = self._m.copies.awaited(layer, [(expert, gpu) for expert, gpu in pairs])
            if not copies:
                return
            yield from self._blocked(copies)

    def _wave(self, layer: int, tokens_EG: Ints, send_GG: Ints, host_E: Ints, lost: int) -> Steps:
        """All-to-all, experts, all-to-all; the way back is the transposed matrix, which takes as long."""
        m = self._m
        alone = m.execution.tensor_parallel == m.cluster.gpus  # every GPU holds every token
        near, far = busiest(send_GG, m.profile)
        exchange_s = 0.0 if alone else float(exchange_seconds(near, far, m.cluster.gpus, m.profile, m.spec, m.dtype))
        beyond = m.curves and bool(exchange_outside(near, far, m.cluster.gpus, m.profile, m.spec, m.dtype))
        yield from self._exchange(exchange_s, beyond)
        taken_G: Any = m.copies.hbm_G if m.execution.contention != "none" else 0.0
        seconds_G = expert_seconds(tokens_EG, m.profile.gpu, m.spec, m.dtype, taken_G)
        host_s = host_seconds(host_E, m.profile, m.spec, m.dtype) if host_E.any() else 0.0
        code_EG = self._driver.residency.precision_LEG[layer]
        pairs = {name: int(tokens_EG[code_EG == code].sum()) for code, name in enumerate(PRECISIONS) if code}
        odd: dict[str, Any] = {"lost": lost, "rounded": sum(pairs.values())}
        odd["precision"] = {name: count for name, count in pairs.items() if count}
        odd["host"] = int(host_E.sum())
        odd["outside"] = m.curves and self._experts_outside(tokens_EG)
        more = {name: count for name, count in odd.items() if count}
        yield from self._compute_phase("experts", seconds_G, host_s, tokens_G=tokens_EG.sum(axis=0), **more)
        yield from self._exchange(exchange_s, beyond)

    def _experts_outside(self, tokens_EG: Ints) -> bool:
        distinct_G, tokens_G = (tokens_EG > 0).sum(axis=0), tokens_EG.sum(axis=0)
        return bool(experts_outside(distinct_G, tokens_G, self._m.profile.gpu, self._m.spec, self._m.dtype).any())

    def _all_reduce(self, tokens: int, times: int) -> Steps:
        m = self._m
        seconds = all_reduce_seconds(tokens, m.execution.tensor_parallel, m.profile, m.spec, m.dtype)
        yield from self._exchange(times * seconds)

    def _exchange(self, seconds: float, outside: bool = False) -> Steps:
        m = self._m
        if seconds <= 0:
            return
        more = {"outside": True} if outside else {}
        if self._compute is None:
            begin = float(self._env.now)
            yield from m.wires.exchange(seconds)
            # Where nothing slowed it down it took what it takes, without the rounding of a difference of times.
            took = float(self._env.now) - begin
            self._passed("communication", begin, seconds if m.wires.contention == "none" else took, **more)
            return
        visit = yield from m.collectives.enter()
        begin = float(self._env.now)
        yield from m.wires.exchange(seconds)
        visit.leave()
        self._passed("communication", begin, float(self._env.now) - begin, **more)

    def _compute_phase(self, phase: str, seconds_G: Any, host_s: float = 0.0, **detail: Any) -> Steps:
        """A phase that lasts as long as its slowest GPU (or the host, beside them); the others idle."""
        slowdown_G = self._driver.residency.slowdown_G
        seconds_G = seconds_G * slowdown_G
        begin, seconds = float(self._env.now), max(float(seconds_G.max()), host_s)
        if self._compute is not None:
            start_G, wait_s = self._compute.submit(seconds_G)
            seconds = max(wait_s, host_s)
            if (start_G > begin).any():
                detail["start_s"] = start_G
        if host_s:
            detail["host_s"] = host_s
        if seconds > 0:
            end = self._env.timeout(seconds)
            if phase == "experts":
                self._m.copies.computes(self._where["layer"], end)
            yield end
        self._passed(phase, begin, seconds, gpu_s=seconds_G, **detail)

    def _passed(self, phase: str, begin_s: float, seconds: float, **detail: Any) -> None:
        self._m.log(phase, **self._where, begin_s=begin_s, duration_s=seconds, **detail)
