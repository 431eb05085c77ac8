"""Splitting a GPU, against a stand-in for the driver: what is called, and what follows when it refuses."""

from types import SimpleNamespace

import pytest
import torch

from moesim.backend import green
from moesim.backend.gate import MOST_S, Gate

CUDA = torch.device("cuda", 0)
EVERY = 0


class Driver:
    """Answers like cuda.bindings.driver of a GPU with `sms` multiprocessors; `refuses` names a function that fails."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, sms=132, refuses=None, at_call=1, clusters=None):
        self.sms, self.refuses, self.at_call, self.clusters = sms, refuses, at_call, clusters
        self.calls, self.alive = [], set()

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, *arguments))
            if name == self.refuses and self.at_call in (EVERY, sum(c[0] == name for c in self.calls)):
                return (SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED"), *[None] * 3)
            return (0, *getattr(self, f"_{name}")(*arguments))

        return call

    def _cuDeviceGet(self, index):
        return (f"device {index}",)

    def _cuDeviceGetDevResource(self, device, kind):
        return (resource(self.sms),)

    def _cuDevSmResourceSplitByCount(self, count, whole, flags, least):
        made = min(count, whole.sm.smCount // least)
        if self.clusters and not flags:  # groups that the driver finds where it keeps clusters together
            made = min(made, self.clusters)
        return [resource(least) for _ in range(made)], made, resource(whole.sm.smCount - made * least)

    def _cuDevResourceGenerateDesc(self, resources, count):
        return (f"descriptor of {resources[0].sm.smCount}",)

    def _cuGreenCtxCreate(self, descriptor, device, flags):
        self.alive.add(context := f"context {len(self.calls)} {descriptor}")
        return (context,)

    def _cuGreenCtxStreamCreate(self, context, flags, priority):
        assert context in self.alive
        self.alive.add(stream := 1000 + len(self.calls))
        return (stream,)

    def _cuStreamDestroy(self, stream):
        self.alive.remove(stream)
        return ()

    def _cuGreenCtxDestroy(self, context):
        assert not any(isinstance(thing, int) for thing in self.alive if thing in self.streams_of(context))
        self.alive.remove(context)
        return ()

    def streams_of(self, context):
        made = [c for c in self.calls if c[0] == "cuGreenCtxStreamCreate"]
        return {1000 + self.calls.index(c) + 1 for c in made if c[1] == context}


def resource(sms):
    return SimpleNamespace(sm=SimpleNamespace(smCount=sms))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there: torch's part of it."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda raw, device: ("external", raw))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: ("plain", device))
    monkeypatch.setattr(green, "_try", lambda device, streams: None)

    def give(driver):
        monkeypatch.setattr(green, "_driver", lambda: driver)
        return driver

    return give


@pytest.mark.parametrize(("count", "size", "left"), [(8, 16, 4), (4, 32, 4), (16, 8, 4), (3, 40, 12)])
def test_groups_come_from_one_split_and_copies_get_what_is_left(gpu, count, size, left):
    driver = gpu(Driver())
    groups = green.split(CUDA, count)
    assert groups.kind == green.SM_GROUPS
    assert groups.sms == (size,) * count and groups.copy_sms == left
    assert [call[0] for call in driver.calls].count("cuDevSmResourceSplitByCount") == 1
    assert len({*groups.streams, *groups.copy_streams}) == 2 * count
    assert sum(call[0] == "cuGreenCtxCreate" for call in driver.calls) == count + 1, (
        "one context a group, one for copies"
    )
    groups.close()
    assert not driver.alive


def test_where_clusters_do_not_fit_they_are_done_without(gpu):
    driver = gpu(Driver(clusters=7))
    groups = green.split(CUDA, 8)
    assert groups.sms == (16,) * 8
    assert [call[3:] for call in driver.calls if "Split" in call[0]] == [(0, 16), (1, 16)]


def test_fewer_groups_than_asked_for_are_no_partition(gpu, monkeypatch):
    gpu(Driver())
    monkeypatch.setattr(Driver, "_cuDevSmResourceSplitByCount", lambda self, *_: ([], 0, resource(132)))
    assert green.split(CUDA, 8).kind == "streams: the driver makes 0 groups of 8 multiprocessors, not 8"


def test_without_left_over_multiprocessors_copies_run_on_plain_streams(gpu):
    gpu(Driver(sms=128))
    groups = green.split(CUDA, 8)
    assert groups.sms == (16,) * 8 and groups.copy_sms == 0
    assert all(kind == "plain" for kind, _ in groups.copy_streams)


def test_a_context_that_is_refused_for_copies_does_not_undo_the_groups(gpu):
    driver = gpu(Driver(refuses="cuGreenCtxCreate", at_call=9))
    groups = green.split(CUDA, 8)
    assert groups.kind == green.SM_GROUPS and groups.copy_sms == 0 and len(groups.copy_streams) == 8
    groups.close()
    assert not driver.alive


@pytest.mark.parametrize(
    ("name", "at_call"),
    [
        ("cuDeviceGet", 1),
        ("cuDeviceGetDevResource", 1),
        ("cuDevSmResourceSplitByCount", EVERY),
        ("cuDevResourceGenerateDesc", 3),
        ("cuGreenCtxCreate", 4),
        ("cuGreenCtxStreamCreate", 5),
    ],
)
def test_whatever_the_driver_refuses_is_the_reason_for_plain_streams(gpu, name, at_call):
    driver = gpu(Driver(refuses=name, at_call=at_call))
    groups = green.split(CUDA, 8)
    assert groups.kind == f"streams: {name}: CUDA_ERROR_NOT_SUPPORTED"
    assert groups.sms == () and len(groups.streams) == len(groups.copy_streams) == 8
    assert not driver.alive, "what was made before is destroyed"


def test_streams_that_torch_cannot_use_are_given_up(gpu, monkeypatch):
    driver = gpu(Driver())

    def fail(device, streams):
        raise green.GreenContextError("torch cannot use its streams: invalid resource handle")

    monkeypatch.setattr(green, "_try", fail)
    groups = green.split(CUDA, 8)
    assert groups.kind == "streams: torch cannot use its streams: invalid resource handle" and not driver.alive


def test_too_many_groups_are_the_reason_for_plain_streams(gpu):
    gpu(Driver())
    assert "132 multiprocessors are too few for 32 groups of at least 8" in green.split(CUDA, 32).kind


def test_a_missing_package_is_the_reason_for_plain_streams(gpu, monkeypatch):
    monkeypatch.setattr(green, "_driver", lambda: (_ for _ in ()).throw(green.GreenContextError("no package")))
    assert green.split(CUDA, 4).kind == "streams: no package"


def test_on_a_cpu_there_are_threads():
    groups = green.split(torch.device("cpu"), 4)
    assert groups.describe() == {"partitions": "cpu threads", "sms": [], "copy_sms": 0}
    groups.close()


def test_a_gate_holds_as_long_as_as_many_launches_took_lately(monkeypatch):
    held = []
    monkeypatch.setattr(torch.cuda, "_sleep", held.append)
    gate = Gate(torch.device("cpu"))
    gate.hold(8)
    assert held == [], "threads begin as they are given work"
    gate.on, gate._ticks_per_s = True, 1e9
    for _ in range(9):
        gate.launched(8, 1e-3)
        gate.launched(1, 1e-4)
    gate.launched(8, 2.0)  # one that compiled
    gate.hold(8)
    gate.hold(1)
    assert held == pytest.approx([1.3e6, 1.3e5], rel=1e-6), "each by launches of its own kind"
    for _ in range(9):
        gate.launched(8, 1.0)
    gate.hold(8)
    assert held[-1] == int(MOST_S * 1e9), "bounded, whatever happened"
