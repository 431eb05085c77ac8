"""The order in which copies are given to a GPU, on a stand-in for its streams: what waits for what, and what is issued
when. That the numbers are right on a GPU is checked there (benchmarks/gpu/offload.py, poisoned slots)."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from moesim.backend import streams
from moesim.backend.slots import FULL, Copy
from moesim.sim.residency import HOST, Transfer


class Event:
    def __init__(self, stream):
        self.stream, self.at, self.done = stream, len(stream.log), False

    def query(self):
        return self.done


class Stream:
    def __init__(self, name):
        self.name, self.log = name, []

    def wait_event(self, event):
        self.log.append(("after", event))

    def record_event(self):
        return Event(self)

    def synchronize(self):
        self.log.append(("synchronized",))


class Cuda:
    """As much of torch.cuda as the mover uses."""

    def __init__(self):
        self.compute = Stream("compute")
        self.now, self.made = self.compute, []

    def new_stream(self, _device, priority=0):
        self.made.append(Stream("demand" if priority < 0 else "ahead"))
        return self.made[-1]

    def current_stream(self, _device):
        return self.now

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


@pytest.fixture
def gpu(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(streams, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(streams, "new_stream", cuda.new_stream)
    monkeypatch.setattr(
        streams, "carry", lambda run, _host, _slots: cuda.now.log.append(("copy", [c.transfer.expert for c in run]))
    )
    cuda.mover = streams.Streamed(None, SimpleNamespace(rows_SP=torch.empty(0)))
    cuda.demand, cuda.ahead = cuda.made
    return cuda


def copy(expert, slot, *, blocking=False, due=0):
    move = Transfer(layer=0, expert=expert, source=HOST, target=0, slot=slot, blocking=blocking, due=due)
    return Copy(transfer=move, precision=FULL)


def copied(stream):
    return [entry[1] for entry in stream.log if entry[0] == "copy"]


def test_demand_goes_at_once_and_few_prefetches_beside_it(gpu):
    prefetches = [copy(10 + 2 * i, i, due=-i) for i in range(5)]
    demand = [copy(1, 7, blocking=True), copy(2, 8, blocking=True), copy(4, 9, blocking=True)]
    gpu.mover.start([*prefetches, *demand])
    assert copied(gpu.demand) == [[1, 2], [4]], "neighbours are one copy"
    assert copied(gpu.ahead) == [[18], [16]], "those that are due first, AHEAD of them"
    after_demand = [entry[1] for entry in gpu.ahead.log if entry[0] == "after" and entry[1].stream is gpu.demand]
    assert after_demand, "what is issued ahead takes no bandwidth from what is waited for"
    gpu.mover.pump()
    assert len(copied(gpu.ahead)) == streams.AHEAD
    gpu.mover._flying[0].event.done = True
    gpu.mover.pump()
    assert copied(gpu.ahead)[-1] == [14]


def test_every_copy_comes_after_what_was_given_to_the_computation_before(gpu):
    gpu.compute.log.append(("kernel that reads the slots",))
    gpu.mover.start([copy(1, 0, blocking=True), copy(5, 1)])
    for stream in (gpu.demand, gpu.ahead):
        first = stream.log.index(next(entry for entry in stream.log if entry[0] == "copy"))
        waits = [entry[1] for entry in stream.log[:first] if entry[0] == "after"]
        assert any(event.stream is gpu.compute and event.at == 1 for event in waits)


def test_waiting_is_the_computations_and_makes_a_queued_copy_demand(gpu):
    prefetches = [copy(10 + 2 * i, i, due=i) for i in range(4)]
    gpu.mover.start(prefetches)
    wanted = [prefetches[0], prefetches[3]]
    gpu.mover.wait(wanted)
    assert copied(gpu.demand) == [[16]]
    waited = [entry[1] for entry in gpu.compute.log if entry[0] == "after"]
    assert {id(event) for event in waited} == {id(one.event) for one in wanted}
    assert gpu.mover.arrived() == wanted, "to whoever decides next they are there"
    assert gpu.mover.arrived() == [], "and nothing else is, nor twice"
    prefetches[1].event.done = True
    assert gpu.mover.arrived() == [prefetches[1]]


def test_a_slot_that_changes_hands_is_written_by_the_last_one_last(gpu):
    first, queued, other = copy(1, 0), copy(3, 5), copy(7, 6)
    gpu.mover.start([first, other, queued])
    assert queued.event is None
    gpu.mover.claim({0, 5})
    last, instead = copy(9, 0, blocking=True), copy(11, 5, blocking=True)
    gpu.mover.start([last, instead])
    assert queued not in gpu.mover.pending and first in gpu.mover.pending
    place = gpu.demand.log.index(("copy", [9]))
    assert ("after", first.event) in gpu.demand.log[:place]
    first.event.done = other.event.done = True
    for _ in range(3):
        gpu.mover.pump()
    assert [3] not in copied(gpu.ahead), "what was dropped is never carried"


def test_nothing_is_under_way_after_draining(gpu):
    gpu.mover.start([copy(i * 2, i) for i in range(4)])
    gpu.mover.drain()
    assert gpu.demand.log[-1] == gpu.ahead.log[-1] == ("synchronized",)
    assert gpu.mover.pending == []
    gpu.mover.pump()
    assert len(copied(gpu.ahead)) == streams.AHEAD
