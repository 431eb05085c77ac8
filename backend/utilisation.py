"""How busy a device was in a region of time, by three measures that say different things.

- **utilisation** (NVML `gpu`): share of each sample period in which at least one kernel ran, however few of the
  device's multiprocessors it used. A device that runs one small kernel after the other is at 100%.
- **SM activity** (NVML GPM, Hopper and newer): share of the multiprocessors that were busy, mean over the region: what
  "the GPU was full" means. With it come the warps' occupancy, the tensor cores' activity and the memory bandwidth, as
  shares of what the device could. Absent where the driver does not offer it.
- **busy time by events**: union of the spans that the executor's own CUDA events mark, over the region's length. On a
  CPU the only one there is. Results of policies have it for each GPU and policy as `utilisation_G` of their metrics.

Sampling takes a thread that asks NVML; it touches no stream. Knows nothing about what runs. Without the package
`nvidia-ml-py`, or without a GPU, the numbers are missing and `note` says why.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

PERIOD_S = 0.1
"""Between two samples: NVML itself averages `gpu` over 1/6 to 1 s, so a region has to be longer than that."""
GPM = {
    "sm_activity": "NVML_GPM_METRIC_SM_UTIL",
    "sm_occupancy": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "tensor_activity": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "memory_bandwidth": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}


@dataclass(slots=True)
class Utilisation:
    """What was seen of a device while a region ran; shares are 0..1, None where nobody could tell."""

    duration_s: float = 0.0
    gpu_samples: list[float] = field(default_factory=list)
    memory_samples: list[float] = field(default_factory=list)
    """Share of the sample period in which device memory was read or written."""
    activity: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(GPM))
    """Over the whole region, from one GPM sample at either end; keys of GPM."""
    power_w: list[float] = field(default_factory=list)
    peak_allocated_bytes: int | None = None
    """Most that torch's tensors took at a time on the device, in the region."""
    peak_reserved_bytes: int | None = None
    """Most that torch's allocator held."""
    busy_s: float | None = None
    """Busy time by events, where the caller measures it (`union_s`)."""
    note: str = ""
    """Why something is missing."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form: means of the samples, their number, and the note where there is one."""
        found: dict[str, Any] = {"duration_s": self.duration_s, "samples": len(self.gpu_samples)}
        means = {
            "gpu_utilisation": self.gpu_samples,
            "memory_utilisation": self.memory_samples,
            "power_w": self.power_w,
        }
        found |= {name: sum(values) / len(values) if values else None for name, values in means.items()}
        found |= self.activity
        found |= {name: getattr(self, name) for name in ("peak_allocated_bytes", "peak_reserved_bytes")}
        if self.busy_s is not None and self.duration_s:
            found["busy_by_events"] = self.busy_s / self.duration_s
        return {**found, "note": self.note} if self.note else found


@contextmanager
def watched(device: torch.device | str, period_s: float = PERIOD_S) -> Iterator[Utilisation]:
    """Watch the device while the block runs; what it yields is complete after the block, which waits for the device.

    The caller may set `busy_s` from its own events, see `union_s`.
    """
    device = torch.device(device)
    seen = Utilisation()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    sampler = _sampler(device, period_s, seen)
    begin = perf_counter()
    if sampler:
        sampler.start()
    try:
        yield seen
        if on_gpu:
            torch.cuda.synchronize(device)
    finally:
        seen.duration_s = perf_counter() - begin
        if sampler:
            sampler.stop()
    if on_gpu:
        seen.peak_allocated_bytes = torch.cuda.max_memory_allocated(device)
        seen.peak_reserved_bytes = torch.cuda.max_memory_reserved(device)


def union_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are covered by at least one of the (start, duration) spans."""
    total = end = 0.0
    first = True
    for start, duration in sorted(spans):
        if first or start > end:
            total, end, first = total + duration, start + duration, False
        elif start + duration > end:
            total, end = total + start + duration - end, start + duration
    return total


def _sampler(device: torch.device, period_s: float, seen: Utilisation) -> _Sampler | None:
    if device.type != "cuda":
        seen.note = "NVML knows nothing of a CPU"
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        seen.note = "no utilisation: the package nvidia-ml-py is not installed"
        return None
    try:
        nvml.nvmlInit()
        handle = _handle(nvml, device)
    except nvml.NVMLError as error:
        seen.note = f"no utilisation: NVML says {error}"
        return None
    return _Sampler(nvml, handle, period_s, seen)


def _handle(nvml: Any, device: torch.device) -> Any:
    """NVML's handle of torch's device: by its UUID, since the two count differently under CUDA_VISIBLE_DEVICES."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


class _Sampler:
    """A thread that fills in a `Utilisation`; an error of NVML ends that number with a note, never the measurement."""

    def __init__(self, nvml: Any, handle: Any, period_s: float, seen: Utilisation) -> None:
        self._nvml, self._handle, self._period_s, self._seen = nvml, handle, period_s, seen
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="utilisation", daemon=True)
        self._activity = _Activity.begin(nvml, handle, seen)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        if self._activity:
            self._activity.end(self._seen)

    def _watch(self) -> None:
        nvml, seen = self._nvml, self._seen
        try:
            while not self._over.wait(self._period_s):
                rates = nvml.nvmlDeviceGetUtilizationRates(self._handle)
                seen.gpu_samples.append(rates.gpu / 100)
                seen.memory_samples.append(rates.memory / 100)
                seen.power_w.append(nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3)
        except nvml.NVMLError as error:
            seen.note = f"utilisation stopped: NVML says {error}"


class _Activity:
    """SM activity between two GPM samples, one at either end of the region."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._samples = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
        nvml.nvmlGpmSampleGet(handle, self._samples[0])

    @classmethod
    def begin(cls, nvml: Any, handle: Any, seen: Utilisation) -> _Activity | None:
        """Take the first sample; None, and a note, where the device or the driver has no GPM."""
        try:
            if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                seen.note = "no SM activity: this device has no GPM"
                return None
            return cls(nvml, handle)
        except (nvml.NVMLError, AttributeError) as error:
            seen.note = f"no SM activity: {error}"
            return None

    def end(self, seen: Utilisation) -> None:
        """Take the second one and fill in what lies between; free both."""
        nvml = self._nvml
        try:
            nvml.nvmlGpmSampleGet(self._handle, self._samples[1])
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(GPM)
            asked.sample1, asked.sample2 = self._samples
            for i, name in enumerate(GPM.values()):
                asked.metrics[i].metricId = getattr(nvml, name)
            nvml.nvmlGpmMetricsGet(asked)
            for i, name in enumerate(GPM):
                if asked.metrics[i].nvmlReturn == nvml.NVML_SUCCESS:
                    seen.activity[name] = asked.metrics[i].value / 100
        except nvml.NVMLError as error:
            seen.note = f"no SM activity: NVML says {error}"
        finally:
            for sample in self._samples:
                nvml.nvmlGpmSampleFree(sample)
