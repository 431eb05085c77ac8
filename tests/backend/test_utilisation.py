"""Utilisation: definitions that can be checked on a CPU, and the sampler against a stand-in for NVML."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from moesim.backend.utilisation import GPM, Utilisation, _Sampler, _sampler, union_s, watched


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0),
        ([(1.0, 2.0)], 2),
        ([(0.0, 1.0), (2.0, 1.0)], 2),
        ([(2.0, 2.0), (0.0, 3.0)], 4),
        ([(0.0, 10.0), (1.0, 2.0), (4.0, 1.0)], 10),
        ([(-3.0, 1.0), (-2.0, 1.0)], 2),
    ],
)
def test_time_covered_by_spans_counts_once(spans, seconds):
    assert union_s(spans) == pytest.approx(seconds)


def test_a_cpu_has_time_and_busy_time_only():
    with watched("cpu") as seen:
        sum(range(1000))
    seen.busy_s = seen.duration_s / 2
    found = seen.to_dict()
    assert found["duration_s"] > 0 and found["busy_by_events"] == pytest.approx(0.5)
    assert found["samples"] == 0 and found["gpu_utilisation"] is None and found["sm_activity"] is None
    assert found["note"] == "NVML knows nothing of a CPU"


def test_an_error_in_the_region_passes():
    with pytest.raises(ZeroDivisionError), watched("cpu") as seen:
        raise ZeroDivisionError
    assert seen.duration_s > 0


def test_a_missing_package_is_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    seen = Utilisation()
    assert _sampler(torch.device("cuda", 0), 0.01, seen) is None
    assert seen.note == "no utilisation: the package nvidia-ml-py is not installed"


class FakeNvml:
    """Of NVML what the sampler asks; `gpm` says whether the device has GPM."""

    NVML_SUCCESS = 0
    NVML_GPM_METRICS_GET_VERSION = 1

    class NVMLError(Exception):
        """As NVML raises it."""

    def __init__(self, *, gpm=True, broken=False):
        self.gpm, self.broken, self.asked, self.freed, self.sampled = gpm, broken, threading.Event(), [], []
        for number, name in enumerate(GPM.values()):
            setattr(self, name, number + 2)

    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.broken:
            self.asked.set()
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(gpu=80, memory=25)

    def nvmlDeviceGetPowerUsage(self, handle):
        self.asked.set()
        return 350_000

    def nvmlGpmQueryDeviceSupport(self, handle):
        return SimpleNamespace(isSupportedDevice=int(self.gpm))

    def nvmlGpmSampleAlloc(self):
        return object()

    def nvmlGpmSampleGet(self, handle, sample):
        self.sampled.append(sample)

    def nvmlGpmSampleFree(self, sample):
        self.freed.append(sample)

    def c_nvmlGpmMetricsGet_t(self):
        return SimpleNamespace(metrics=[SimpleNamespace(nvmlReturn=None, value=None) for _ in range(98)])

    def nvmlGpmMetricsGet(self, asked):
        assert [asked.sample1, asked.sample2] == self.sampled
        for metric in asked.metrics[: asked.numMetrics]:
            metric.nvmlReturn, metric.value = (0, 10.0 * metric.metricId) if metric.metricId < 5 else (3, 1.0)


def sample(nvml):
    seen = Utilisation()
    sampler = _Sampler(nvml, "handle", 0.001, seen)
    sampler.start()
    assert nvml.asked.wait(30)
    sampler.stop()
    return seen


def test_samples_and_activity():
    nvml = FakeNvml()
    seen = sample(nvml)
    found = seen.to_dict()
    assert found["samples"] >= 1 and found["power_w"] == pytest.approx(350)
    assert found["gpu_utilisation"] == pytest.approx(0.8) and found["memory_utilisation"] == pytest.approx(0.25)
    assert found["sm_activity"] == pytest.approx(0.2) and found["sm_occupancy"] == pytest.approx(0.3)
    assert found["memory_bandwidth"] is None, "a metric that the driver refused is no number"
    assert "note" not in found and nvml.freed == nvml.sampled


def test_an_older_device_and_a_lost_one_are_notes():
    assert sample(FakeNvml(gpm=False)).note == "no SM activity: this device has no GPM"
    assert sample(FakeNvml(broken=True)).note == "utilisation stopped: NVML says GPU is lost"
