"""The simulated executor: SimPy at phase granularity.

Within a step the barriers of its layers make a chain, so one process runs a micro-batch's phases one after the other,
with the G GPUs' times computed in numpy (lane.py). What is asynchronous are copies of experts: each is a process of its
own that queues for links (copies.py). Everything is deterministic: events at equal times keep the order in which they
were scheduled, and arrivals come before the decision or dispatch that falls on the same instant.

The step, decision points and copies are those of docs/architecture.md; the policy really decides, in no simulated time
unless the profile says how long it takes. What a run reports is computed from its events (events.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import simpy

from moesim.sim.contention import Wires
from moesim.sim.copies import Copies
from moesim.sim.cost import host_seconds, measured_ranges
from moesim.sim.dispatch import Ints
from moesim.sim.driver import Driver, Sink
from moesim.sim.events import Book, Event, plain
from moesim.sim.eviction import ORACLES, Future
from moesim.sim.execution import Execution, copy_bytes
from moesim.sim.fabric import Fabric
from moesim.sim.faults import Fault, check_faults
from moesim.sim.lane import Lane
from moesim.sim.limits import check_fits, on_disk
from moesim.sim.policies import Policy, decides_like, recipe_digest
from moesim.sim.profile import HardwareProfile
from moesim.sim.rates import rates_of
from moesim.sim.results import Result
from moesim.sim.scenario import Scenario, StepInput, micro_batches
from moesim.sim.serving import Closed, Source
from moesim.sim.static import StaticSteps, is_static
from moesim.sim.station import Station
from moesim.traces import InputError
from moesim.traces.versions import version

Steps = Generator[Any, Any, None]
DEFAULT = Execution()


def simulate(
    scenario: Scenario,
    policy: Policy,
    profile: HardwareProfile,
    *,
    execution: Execution = DEFAULT,
    source: Source | None = None,
    faults: Sequence[Fault] = (),
    sink: Sink | None = None,
    events: Sink | None = None,
    keep_steps: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Run the steps of `scenario` under `policy` on the simulated cluster.

    `source` hands out the steps; without one they follow each other at once (a closed loop). `sink` takes the
    decisions, `events` the events (events.py); `keep_steps=False` keeps sums only, so that memory does not grow with
    the steps; `progress` is told the steps done. Raises InputError where the profile has too few GPUs, too little
    memory, no rate for the dtype, the GPUs cannot be grouped, or an oracle of all steps meets an open loop.
    """
    dtype = execution.dtype or scenario.spec.dtype
    execution.check(scenario.cluster.gpus, profile)
    check_fits(scenario, policy.cluster, profile, dtype)
    check_faults(faults, scenario.cluster.gpus, profile)
    told = replace(policy.cluster, node_size=profile.node_size, rates=rates_of(scenario, profile, dtype))
    policy = replace(policy, cluster=told)
    source = source or Closed(scenario, scenario.cluster.gpus // execution.tensor_parallel)
    decides = decides_like(policy, profile.decide_s)
    config = {
        **scenario.config(),
        **source.config(),
        "policy_digest": recipe_digest(policy.recipe),
        "dtype": dtype,
        "profile": profile.name,
        "profile_kind": profile.provenance.kind,
        "profile_device": profile.provenance.device,
        **({"profile_executor": profile.provenance.executor} if profile.provenance.executor else {}),
        "decide_s": None if decides is None else profile.decide_s[decides],
        **({"decide_s_of": decides} if decides not in (None, policy.name) else {}),
        "measured": measured_ranges(scenario.cluster.gpus, profile, scenario.spec, dtype),
        **execution.describe(),
        **({"faults": [fault.text() for fault in faults]} if faults else {}),
        "moesim": version("moesim"),
    }
    book = Book(keep_steps, config.get("targets", {}))
    future = None
    if policy.recipe.eviction in ORACLES:
        if not isinstance(source, Closed):
            raise InputError(f"policy {policy.name} is shown the future, which an open loop does not have yet")
        future = future_needs(scenario, execution)
    machine = Machine(scenario, policy, profile, execution, dtype, book, sink, events, future)
    plain_run = execution == Execution(dtype=execution.dtype) and not faults and isinstance(source, Closed)
    usable_LEG = machine.driver.residency.usable_LEG
    fast = plain_run and sink is None and events is None and is_static(scenario, policy, profile, dtype, usable_LEG)
    machine.log("run begins", policy=policy.name, gpus=scenario.cluster.gpus, config=config)
    for fault in faults:
        machine.env.process(machine.fault(fault))
    if fast:
        static = StaticSteps(scenario, usable_LEG, profile, dtype)
        main = static.run(machine.env, book, machine.decide_s, progress)
    else:
        main = machine.steps(source, progress)
    machine.env.run(until=machine.env.process(main))
    scores = machine.driver.scores.summary()
    machine.log("run ends", scores=scores)
    return Result(
        kind="simulated",
        policy=policy.name,
        config=config,
        steps=book.steps,
        totals=book.totals,
        scores=scores,
        serving=book.requests.summary(book.targets),
    )


def future_needs(scenario: Scenario, execution: Execution) -> Future:
    """Of each layer, the experts that have tokens in every micro-batch of a closed loop, in order."""
    found: list[list[Ints]] = [[] for _ in range(scenario.cluster.layers)]
    groups = scenario.cluster.gpus // execution.tensor_parallel
    for step in scenario.steps(groups):
        for part in micro_batches(step, execution.micro_batches, groups, execution.overlap):
            for layer, visits in enumerate(found):
                visits.append(np.unique(part.ids[~part.dropped[:, layer], layer]).astype(np.int64))
    return found


class Machine:
    """The cluster of one simulation: its queues, who computes on it, and the events of what happens."""

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        profile: HardwareProfile,
        execution: Execution,
        dtype: str,
        book: Book,
        sink: Sink | None,
        events: Sink | None,
        future: Future | None,
    ) -> None:
        self.scenario, self.spec, self.cluster = scenario, scenario.spec, scenario.cluster
        self.profile, self.execution, self.dtype = profile, execution, dtype
        decides = decides_like(policy, profile.decide_s)
        self.decide_s = 0.0 if decides is None else profile.decide_s[decides]
        self.env = simpy.Environment()
        self.book = book
        self._events = events
        self.curves = bool(measured_ranges(self.cluster.gpus, profile, self.spec, dtype))
        """Whether times are read off measured curves, which do not reach everywhere."""
        self.failures = 0
        """GPUs that have failed."""
        cheaper = self._cheaper(self._copy_bytes("full")) if policy.recipe.miss == "cpu" else None
        self.driver = Driver(policy, sink, cheaper, future)
        self.fabric = Fabric(self.env, profile)
        self.wires = Wires(self.env, "pause" if policy.recipe.phase_locked else execution.contention)
        self.collectives = Station(self.env, "collectives")
        self.turns = [Station(self.env, f"experts of layer {layer}") for layer in range(self.cluster.layers)]
        if policy.cluster.pooled:  # what one layer fetches may displace another's: one at a time
            self.turns = self.turns[:1] * self.cluster.layers
        least = execution.copy_dtype
        self.copies = Copies(self.env, self.driver, self.fabric, self.wires, self._copy_bytes, least, self.log)
        self.copies.on_disk_LE = on_disk(scenario, profile, dtype)
        self._groups = self.cluster.gpus // execution.tensor_parallel
        lanes = execution.lanes()
        self._lanes = [Lane(self, number, together=lanes > 1) for number in range(lanes)]
        for lane in self._lanes[1:]:
            lane.share(self._lanes[0])

    def steps(self, source: Source, progress: Callable[[int], None] | None) -> Steps:
        """The process of the run: what the source hands out, one step after the other."""
        number, execution = 0, self.execution
        while (step := source.next(float(self.env.now))) is not None:
            if isinstance(step, float):
                begin = float(self.env.now)
                yield self.env.timeout(step - begin)
                self.log("idle", begin_s=begin, duration_s=float(self.env.now) - begin)
                continue
            self._number = number
            self.log("step begins", tokens=len(step.tokens))
            yield from self._parts(micro_batches(step, execution.micro_batches, self._groups, execution.overlap))
            self.log("step ends")
            for done in source.ended(float(self.env.now)):
                self.log("request done", **done)
            number += 1
            if progress:
                progress(number)

    def _parts(self, parts: list[StepInput]) -> Steps:
        if len(self._lanes) == 1:
            for part, step in enumerate(parts):
                yield from self._lanes[0].run(step, part)
            return
        running = zip(self._lanes, parts, range(len(parts)), strict=False)
        yield self.env.all_of([self.env.process(lane.run(step, part)) for lane, step, part in running])

    def ranks(self, group_T: Ints) -> Ints:
        """[T] the first GPU of the group that holds each token; the requests of groups that failed go to others."""
        size = self.execution.tensor_parallel
        if self.failures:
            alive = np.flatnonzero(self.driver.residency.alive_G.reshape(-1, size).all(axis=1))
            lives = np.isin(group_T, alive)
            group_T = np.where(lives, group_T, alive[group_T % len(alive)])
        return group_T * size

    def fault(self, fault: Fault) -> Steps:
        """The process of one fault: what begins after it feels it."""
        yield self.env.timeout(fault.time_s)
        if fault.what == "link":
            links = fault.degraded(self.profile.links)
            self.profile = fault.applied(self.profile, links)
            self.fabric.links = links
        elif fault.factor == 0:
            # The GPUs of a group share every layer of its attention: the group fails with any of them.
            size = self.execution.tensor_parallel
            first = int(fault.where) // size * size
            for gpu in range(first, first + size):
                self.driver.fail(gpu)
            self.failures += 1
        else:
            self.driver.residency.slowdown_G[int(fault.where)] = 1 / fault.factor
        self.log("fault", fault=fault.text())

    def _copy_bytes(self, precision: str) -> int:
        """Bytes of a copy that the policy wants in `precision`."""
        if precision == "full":
            precision = self.execution.copy_dtype or "full"
        return copy_bytes(self.spec.expert_params(), self.spec.expert_bytes(self.dtype), precision)

    def _cheaper(self, nbytes: int) -> Callable[[int], bool]:
        self.profile.known_cpu()
        copy_s = self.profile.links.host.link.seconds(nbytes)
        return lambda tokens: host_seconds(np.array([tokens]), self.profile, self.spec, self.dtype) < copy_s

    def log(self, what: str, **detail: Any) -> None:
        """An event that ends now."""
        event: Event = {"time_s": float(self.env.now), "what": what, "step": getattr(self, "_number", None), **detail}
        self.book.take(event)
        if self._events is not None:
            self._events(plain(event))
