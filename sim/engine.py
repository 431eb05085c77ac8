"""The simulated executor: SimPy at phase granularity.

Within a step the barriers of its layers make a chain, so one process runs the phases one after the other, with the G
GPUs' times computed in numpy. What is asynchronous are copies of experts: each is a process of its own that queues for
links. Everything is deterministic: events at equal times keep the order in which they were scheduled, and arrivals come
before the decision or dispatch that falls on the same instant.

The step, decision points and copies are those of docs/architecture.md; the policy really decides, in no simulated time
unless the profile says how long it takes. Copies and all-to-alls slow each other down where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import simpy

from moesim.sim.contention import Contention, Wires
from moesim.sim.cost import all_to_all_seconds, attention_seconds, expert_seconds, rank_tokens
from moesim.sim.dispatch import Ints
from moesim.sim.driver import Driver, Sink
from moesim.sim.fabric import Fabric
from moesim.sim.policies import Policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.residency import Transfer
from moesim.sim.results import PHASES, Result, StepRecord
from moesim.sim.scenario import Scenario, StepInput, rank_counts
from moesim.sim.static import StaticSteps, StaticWork, is_static
from moesim.traces import InputError

DEMAND, PREFETCH = 0, 1
"""Priorities on a link; equal ones in order of arrival. What a link has begun to carry is not interrupted."""

Steps = Generator[Any, Any, None]
Loads = Generator[Any, Any, list[list[int]]]
"""Ends with the tokens that each GPU computed in each layer, [L, G]."""
Log = Callable[..., None]


def simulate(
    scenario: Scenario,
    policy: Policy,
    profile: HardwareProfile,
    *,
    sink: Sink | None = None,
    dtype: str | None = None,
    contention: Contention = "none",
    event_log: list[dict[str, Any]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Run all steps of `scenario` under `policy` on the simulated node.

    `dtype` of weights and activations (default: the recorded one). `contention` of copies and all-to-alls: see
    contention.py. `sink` takes the decisions, `event_log` the events, JSON objects in order of `time_s`, an event being
    written when it ends; `progress` is told the steps done. Raises InputError where the profile has too few GPUs, too
    little memory, or no rate for the dtype.
    """
    dtype = dtype or scenario.spec.dtype
    _check_fits(scenario, profile, dtype)
    fast = sink is None and event_log is None and contention == "none"
    run = _Run(scenario, Driver(policy, sink), profile, dtype, contention, fast, event_log)
    run.env.run(until=run.env.process(run.all_steps(progress)))
    config = {
        **scenario.config(),
        "dtype": dtype,
        "profile": profile.name,
        "profile_kind": profile.provenance.kind,
        "profile_device": profile.provenance.device,
        "decide_s": profile.decide_s.get(policy.name),
        "contention": contention,
        "moesim": version("moesim"),
    }
    return Result(
        kind="simulated", policy=policy.name, config=config, steps=run.records, scores=run.driver.scores.summary()
    )


def _check_fits(scenario: Scenario, profile: HardwareProfile, dtype: str) -> None:
    cluster, stack = scenario.cluster, scenario.spec.stack(scenario.stack)
    profile.check_gpus(cluster.gpus)
    profile.gpu.matmul_rate(dtype)
    if len(stack.moe_layers) != cluster.layers:
        raise InputError(f"the trace has {cluster.layers} MoE layers, its {stack.name} has {len(stack.moe_layers)}")
    need = cluster.layers * cluster.layer_slots * scenario.spec.expert_bytes(dtype)
    if need > profile.gpu.memory_bytes:
        raise InputError(
            f"the expert slots need {need / 2**30:.1f} GiB on each GPU, profile {profile.name} has "
            f"{profile.gpu.memory_bytes / 2**30:.1f} GiB; use more GPUs, fewer extra slots or a smaller dtype"
        )


class _Run:
    """One simulation: the process that runs the steps, and what it counts."""

    def __init__(
        self,
        scenario: Scenario,
        driver: Driver,
        profile: HardwareProfile,
        dtype: str,
        contention: Contention,
        fast: bool,
        events: list[dict[str, Any]] | None,
    ) -> None:
        self.scenario, self.driver, self.dtype, self.contention = scenario, driver, dtype, contention
        self.profile, self.gpu, self.spec = profile, profile.gpu, scenario.spec
        self.decide_s = profile.decide_s.get(driver.policy.name, 0.0)
        self.env = simpy.Environment()
        self.records: list[StepRecord] = []
        self._events = events
        usable_LEG = driver.residency.usable_LEG
        static = fast and is_static(driver.policy, usable_LEG)
        self._static = StaticSteps(scenario, usable_LEG, profile, dtype) if static else None
        expert_bytes = scenario.spec.expert_bytes(dtype)
        fabric = Fabric(self.env, profile, scenario.cluster.gpus)
        self.wires = Wires(self.env, contention)
        self.copies = _Copies(self.env, driver, fabric, self.wires, expert_bytes, self._log)

    def all_steps(self, progress: Callable[[int], None] | None) -> Steps:
        """The process of the run."""
        for number, step in enumerate(self.scenario.steps()):
            yield from self._step(number, step)
            if progress:
                progress(number + 1)

    def _step(self, number: int, step: StepInput) -> Steps:
        cluster, begin = self.scenario.cluster, float(self.env.now)
        self._where: dict[str, Any] = {"step": number, "layer": None}
        self._phase_s = dict.fromkeys(PHASES, 0.0)
        self._busy_G = np.zeros(cluster.gpus)
        self.copies.moved_bytes = self.copies.hidden_bytes = 0
        if self._static:
            load_LG = yield from self._static_layers(self._static.of(step))
        else:
            load_LG = yield from self._decided_layers(step)
        self.records.append(
            StepRecord(
                duration_s=float(self.env.now) - begin,
                tokens=len(step.tokens),
                phase_s=self._phase_s,
                load_LG=load_LG,
                busy_s=self._busy_G.tolist(),
                moved_bytes=self.copies.moved_bytes,
                hidden_bytes=self.copies.hidden_bytes,
            )
        )

    def _static_layers(self, work: StaticWork) -> Loads:
        """The phases of a policy that moves nothing, with nothing between the events: no decisions to wait for, no
        copies that arrive, nobody who looks. Sums go in the order of the layers, as they do elsewhere."""
        timeout, decide_s = self.env.timeout, self.decide_s
        attention_L, experts_L = (seconds.max(axis=1).tolist() for seconds in (work.attention_LG, work.experts_LG))
        attention = communication = experts = 0.0
        decide = decide_s
        if decide_s:
            yield timeout(decide_s)
        for attention_s, exchange_s, experts_s in zip(attention_L, work.exchange_L, experts_L, strict=True):
            for seconds in (attention_s, decide_s, exchange_s, experts_s, exchange_s):
                if seconds:
                    yield timeout(seconds)
            attention, decide, experts = attention + attention_s, decide + decide_s, experts + experts_s
            communication = communication + exchange_s + exchange_s
        spent = {"attention": attention, "decide": decide, "communication": communication, "experts": experts}
        self._phase_s.update(spent)
        both = np.stack([work.attention_LG, work.experts_LG], axis=1)
        self._busy_G = np.add.reduce(both.reshape(-1, both.shape[2]), axis=0)
        loads: list[list[int]] = work.load_LG.tolist()
        return loads

    def _decided_layers(self, step: StepInput) -> Loads:
        """The phases of a policy that is asked at every decision point."""
        cluster = self.scenario.cluster
        load_LG: list[list[int]] = []
        ranks = rank_tokens(step.tokens, step.rank, cluster.gpus, self.scenario.phase)
        stack = self.spec.stack(self.scenario.stack)
        attention_LG = attention_seconds(ranks, stack, self.gpu, self.spec, self.dtype)

        truth = (step.ids, step.queued_ids)
        yield from self._decided(partial(self.driver.begin_step, step.tokens, queued=step.queued, truth=truth))
        for layer in range(cluster.layers):
            self._where["layer"] = layer
            yield from self._compute("attention", attention_LG[layer])
            ids_TK = step.ids[:, layer]
            yield from self._decided(partial(self.driver.routed, ids_TK))
            self.copies.needed(layer)
            counts_GE = rank_counts(ids_TK, step.dropped[:, layer], step.rank, cluster)
            send_GEG = self.driver.dispatch(counts_GE)
            load_LG.append(send_GEG.sum(axis=(0, 1)).tolist())
            yield from self._experts(send_GEG)
        self.driver.end_step()
        return load_LG

    def _decided(self, decide: Callable[[], list[Transfer]]) -> Steps:
        """A decision point: the time to decide, then the transfers begin, then the blocking ones are waited for."""
        yield from self._phase("decide", self.decide_s)
        yield self.env.timeout(0)  # what arrives at this instant has arrived
        blocking = self.copies.start(decide())
        if blocking:
            begin = float(self.env.now)
            yield simpy.AllOf(self.env, blocking)
            yield self.env.timeout(0)  # what arrives at this instant has arrived
            self._passed("blocked", float(self.env.now) - begin)

    def _experts(self, send_GEG: Ints) -> Steps:
        """All-to-all, experts, all-to-all; the way back is the transposed matrix, which takes as long."""
        exchange_s = all_to_all_seconds(send_GEG.sum(axis=1), self.profile, self.spec, self.dtype)
        yield from self._exchange(exchange_s)
        tokens_EG = send_GEG.sum(axis=0)
        seconds_G = expert_seconds(tokens_EG, self.gpu, self.spec, self.dtype)
        yield from self._compute("experts", seconds_G, tokens_G=tokens_EG.sum(axis=0))
        yield from self._exchange(exchange_s)

    def _exchange(self, seconds: float) -> Steps:
        if seconds > 0:
            begin = float(self.env.now)
            yield from self.wires.exchange(seconds)
            # Where nothing slowed it down it took what it takes, without the rounding of a difference of times.
            took = float(self.env.now) - begin
            self._passed("communication", seconds if self.contention == "none" else took)

    def _compute(self, phase: str, seconds_G: Any, **arrays: Any) -> Steps:
        """A phase that lasts as long as its slowest GPU; the others idle."""
        self._busy_G += seconds_G
        yield from self._phase(phase, float(seconds_G.max()), gpu_s=seconds_G, **arrays)

    def _phase(self, phase: str, seconds: float, **arrays: Any) -> Steps:
        if seconds > 0:
            yield self.env.timeout(seconds)
            self._passed(phase, seconds, **arrays)

    def _passed(self, phase: str, seconds: float, **arrays: Any) -> None:
        self._phase_s[phase] += seconds
        if self._events is not None:
            detail = {name: array.tolist() for name, array in arrays.items()}
            self._log(phase, **self._where, duration_s=seconds, **detail)

    def _log(self, what: str, **detail: Any) -> None:
        if self._events is not None:
            self._events.append({"time_s": float(self.env.now), "what": what, **detail})


@dataclass(slots=True)
class _Copies:
    """Copies under way, the links that they queue for, and their bytes.

    A copy holds all the queues of its route at once and takes them in the route's order, so copies cannot wait for each
    other in a circle; one that has its first keeps it idle while it queues for the second. A copy is *hidden* when
    nobody waited for it and it was of use: not blocking, in its slot before its layer next dispatched, and the slot
    still its own. One that is late, or whose slot was given away meanwhile, counts as moved only. Free transfers move
    no bytes; copies still under way when the run ends are not counted.
    """

    env: Any
    driver: Driver
    fabric: Fabric
    wires: Wires
    expert_bytes: int
    log: Log
    moved_bytes: int = 0
    hidden_bytes: int = 0
    _started: int = 0
    _pending: dict[int, Transfer] = field(default_factory=dict)
    """Number of a copy, in order of issue, to its transfer."""
    _late: set[int] = field(default_factory=set)

    def start(self, moves: Iterable[Transfer]) -> list[Any]:
        """Issue the transfers that the driver has begun; returns the processes of the blocking ones."""
        blocking = []
        for t in moves:
            where = {"layer": t.layer, "expert": t.expert, "source": t.source, "target": t.target, "slot": t.slot}
            if t.free:
                self.driver.arrived(t)
                self.log("transfer free", **where)
                continue
            number, self._started = self._started, self._started + 1
            self._pending[number] = t
            self.log("transfer issued", number=number, blocking=t.blocking, **where)
            process = self.env.process(self._copy(number, t))
            if t.blocking:
                blocking.append(process)
        return blocking

    def needed(self, layer: int) -> None:
        """`layer` dispatches now: its copies that are still under way are late."""
        self._late.update(number for number, t in self._pending.items() if t.layer == layer)

    def _copy(self, number: int, t: Transfer) -> Steps:
        stations, link = self.fabric.route(t.source, t.target)
        held = []
        for station in stations:
            held.append((yield from station.enter(DEMAND if t.blocking else PREFETCH)))
        self.log("transfer begins", number=number, queues=[station.name for station in stations])
        yield from self.wires.copy(link.seconds(self.expert_bytes))
        for visit in held:
            visit.leave()
        del self._pending[number]
        useful = number not in self._late and self.driver.residency.holds(t)
        self._late.discard(number)
        self.moved_bytes += self.expert_bytes
        self.hidden_bytes += self.expert_bytes if useful and not t.blocking else 0
        self.driver.arrived(t)
        self.log("transfer ends", number=number)
