"""What every calibration of a device has: its memory, a large copy, a square matrix product, and its provenance.

How it is timed, and who else is at work meanwhile, is the calibration's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from moesim.backend.session import versions
from moesim.sim.profile import Provenance

Work = tuple[float, Callable[[], object]]
"""(how much of it, what does it)."""

COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}
"""Far more than any cache of a GPU."""
ROWS = {"cuda": 8192, "cpu": 384}
"""Of a square matrix."""


def copy_work(device: torch.device) -> Work:
    """(bytes read and written, a copy inside the device's memory)."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * len(source), lambda: target.copy_(source)


def matmul_work(device: torch.device, dtype: torch.dtype) -> Work:
    """(FLOPs, a product of random numbers, as zeros may be faster)."""
    n = ROWS[device.type]
    a = torch.randn((n, n), device=device).to(dtype)
    out = torch.empty_like(a)
    return 2.0 * n**3, lambda: torch.mm(a, a, out=out)


def memory_bytes(device: torch.device) -> int:
    """Memory of the device; of a CPU the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measured_now(executor: str, device: torch.device, *, where: str, source: str, notes: str) -> Provenance:
    """Of numbers that this machine has just given, on `where` (in words)."""
    return Provenance(
        kind="measured",
        executor=executor,
        device=where,
        date=datetime.now(UTC).date().isoformat(),
        driver=f"CUDA {torch.version.cuda}" if device.type == "cuda" else "",
        sources=(source,),
        versions=versions(),
        notes=notes,
    )
