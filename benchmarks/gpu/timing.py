"""What every GPU benchmark needs: times by CUDA events, the device's own rates, and failures that stop nothing else.

Knows nothing about what is measured. On a CPU the same functions use `time.perf_counter`, so all is rehearsed there.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moesim.backend.rates import copy_work, matmul_work

Report = Callable[[str, dict[str, Any]], None]
"""Takes the name of a measurement and its numbers; they are safe on disk when it returns."""

PACKAGES = ("moesim", "torch", "triton", "transformers", "numpy", "simpy", "cuda-bindings", "nvidia-ml-py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call, over `repeats` timed calls."""

    median_s: float
    min_s: float
    max_s: float
    repeats: int

    def to_dict(self) -> dict[str, float]:
        """JSON form."""
        return asdict(self)


def median_s(
    fn: Callable[[], object],
    device: str | torch.device,
    *,
    repeats: int = 10,
    warmup: int = 3,
    setup: Callable[[], object] | None = None,
    calls: int = 1,
) -> Timing:
    """Time `fn` alone: median, smallest and largest over `repeats`, after `warmup` that are not counted.

    The device is idle when a repeat begins, so that what the host takes to launch is not hidden behind earlier work.
    `setup` runs before every repeat outside the timed region. `calls` calls in a row make one repeat (their mean), for
    what is too short to be timed alone; the caller rotates inputs where the cache must not help.
    """
    setup = setup or (lambda: None)
    for _ in range(warmup):
        setup()
        fn()
    once = _cuda_once if torch.device(device).type == "cuda" else _host_once
    spent = []
    for _ in range(max(repeats, 1)):
        setup()
        spent.append(once(fn, torch.device(device), calls) / calls)
    return Timing(median_s=statistics.median(spent), min_s=min(spent), max_s=max(spent), repeats=len(spent))


def _cuda_once(fn: Callable[[], object], device: torch.device, calls: int) -> float:
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            fn()
        end.record()
        # All streams, not this one only: what `fn` left on another one must not run into the next repeat.
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def _host_once(fn: Callable[[], object], _device: torch.device, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        fn()
    return time.perf_counter() - begin


def copy_rate(device: str | torch.device, *, repeats: int = 10) -> float:
    """Bytes/s of a copy inside the device's memory, read and written bytes both counted: the bandwidth of floors."""
    nbytes, copy = copy_work(torch.device(device))
    return nbytes / median_s(copy, device, repeats=repeats).median_s


def matmul_rate(device: str | torch.device, dtype: torch.dtype, *, repeats: int = 10) -> float:
    """FLOP/s of a large square matrix product of random numbers in `dtype`, as torch runs it by default."""
    flops, multiply = matmul_work(torch.device(device), dtype)
    return flops / median_s(multiply, device, repeats=repeats).median_s


@contextmanager
def guarded(report: Report, name: str) -> Iterator[None]:
    """Report an exception in the block as `{"error": ...}` under `name`, free what its frames hold, and go on."""
    try:
        yield
    except Exception as error:
        report(name, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "at": _place(error)})
        # An out-of-memory error keeps the tensors of its frames alive, and with them the memory that others need.
        traceback.clear_frames(error.__traceback__)
        free_memory()


def _place(error: BaseException) -> str:
    """File and line where it was raised and the last of ours on the way, without folders."""
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames[-4:]))


def free_memory() -> None:
    """Give cached device memory back to the driver; after a failed kernel the device may refuse even that."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            return


def environment(device: str | torch.device) -> dict[str, Any]:
    """What numbers were measured on: device, driver, versions, date, commit (where known)."""
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.device(device).type,
        "device_name": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device_name": properties.name,
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return about


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The driver's version: by NVML where its package is there, which takes no second as nvidia-smi does."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # whatever it is, the other ways are left
        return _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def commit() -> str | None:
    """The commit of this checkout, with a + where files differ from it, or MOESIM_COMMIT; None where unknown."""
    if known := os.environ.get("MOESIM_COMMIT"):
        return known
    git = ["git", "-C", str(Path(__file__).parent)]
    head = _said([*git, "rev-parse", "--short=12", "HEAD"])
    return head and head + ("+" if _said([*git, "status", "--porcelain", "--untracked-files=no"]) else "")


def _said(words: list[str]) -> str | None:
    """First line of a command's output; None where it is missing, fails, or says nothing."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0].strip() if done.stdout.strip() else None
