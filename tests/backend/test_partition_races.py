"""Races between partitions, looked for on purpose: queues that do their work as late, and in as odd an order, as they
may, with slots poisoned. A wait that is missing somewhere lets a kernel read NaN, or weights of another expert."""

import copy
import random
import time
from concurrent.futures import Future

import cases
import pytest
import torch

from moesim.backend.partitions import PartitionExecutor
from moesim.backend.queues import HostMoment
from moesim.sim.policies import make_policy
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload

CPU = torch.device("cpu")


class LazyMoment(HostMoment):
    """Done when its queue has come to it; asking sometimes makes some queue go on."""

    def __init__(self, queue):
        super().__init__(Future())
        self.queue = queue

    def done(self):
        self.queue.world.stir()
        return self._at.done()

    def wait(self):
        while not self._at.done():
            self.queue.step()
        self._at.result()


class LazyQueue:
    """Does nothing before somebody waits for it, or chance wants it to."""

    def __init__(self, world):
        self.world, self.waiting = world, []
        world.queues.append(self)

    def run(self, work):
        self.waiting.append(work)

    def after(self, moment):
        self.waiting.append(moment.wait)

    def record(self):
        moment = LazyMoment(self)
        self.waiting.append(lambda: moment._at.set_result(time.perf_counter()))
        return moment

    def keep(self, used):
        self.waiting.append(lambda: used)

    def step(self):
        with torch.inference_mode():
            self.waiting.pop(0)()


class World:
    """All lazy queues, and the chance that one of them goes on when the host looks."""

    def __init__(self, seed):
        self.queues, self.chance = [], random.Random(seed)

    def stir(self):
        busy = [queue for queue in self.queues if queue.waiting]
        if busy and self.chance.random() < 0.5:
            queue = self.chance.choice(busy)
            for _ in range(self.chance.randint(1, len(queue.waiting))):
                if queue.waiting:
                    queue.step()


@pytest.fixture(scope="module")
def case():
    """(model, scenario of 3 partitions, the unpatched model's output of every step)."""
    model = cases.tiny_model()
    recording, _ = cases.recorded(copy.deepcopy(model), False)
    workload = Workload(batch=cases.BATCH_TOKENS)
    scenario = make_scenario(
        cases.spec_of(model), recording, phase=Phase.ENCODER, gpus=3, workload=workload, extra_slots=2
    )
    wanted = cases.expected(model, scenario, together=True)
    return model, scenario, [hidden for hidden, _, _ in wanted]


def lazy_executor(case, seed):
    model, scenario, _ = case
    executor = PartitionExecutor(CPU, copy.deepcopy(model), scenario, poison=True)
    world = World(seed)
    executor.queues.compute = [LazyQueue(world) for _ in range(3)]
    executor.queues.copy = [LazyQueue(world) for _ in range(3)]
    return executor


@pytest.mark.parametrize("policy", ["eplb", "predictive-layer", "oracle-batch"])
def test_no_order_of_the_queues_changes_what_comes_out(case, policy):
    _, scenario, wanted = case
    late = []
    for seed in range(3):
        executor = lazy_executor(case, seed)
        off = []

        def keep(number, hidden, off=off):
            off.append(float((hidden - wanted[number]).abs().max().nan_to_num(nan=9e9)))

        executor.run(make_policy(policy, scenario.cluster, scenario.fit), None, keep)
        executor.close()
        assert max(off) <= 1e-5
        assert executor.scores()["transfers"] > 0
        late.append(executor.scores()["late_transfers"])
    assert policy == "eplb" or any(late), "some copies must be late, or nothing was tried"


def test_a_wait_that_is_missing_is_found(case, monkeypatch):
    """Without waiting for blocking copies the same test fails: it can see what it looks for."""
    from moesim.backend.partition_copies import PartitionCopies

    _, scenario, wanted = case
    finish = PartitionCopies._finish

    def hasty(self, residency):
        blocking = [each for each in self.pending if each.transfer.blocking]
        for each in blocking:
            each.end.wait, each.end.since = (lambda: None), (lambda _: 0.0)
        return finish(self, blocking, residency)

    monkeypatch.setattr(PartitionCopies, "wait_blocking", hasty)
    executor = lazy_executor(case, 0)
    off = []
    executor.run(
        make_policy("eplb", scenario.cluster, scenario.fit),
        None,
        lambda number, hidden: off.append(float((hidden - wanted[number]).abs().max().nan_to_num(nan=9e9))),
    )
    executor.close()
    assert max(off) > 1
