"""Errors of torch and of the GPU's driver in one line, with what to do about them.

Recognises them by torch's own classes where it has some, else by their text. Knows nothing about what was computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from moesim.traces import InputError, MoesimError

OUT_OF_MEMORY = (
    "out of memory on {where}{what}: take fewer tokens a step (--batch-tokens), a smaller --dtype (bfloat16), fewer "
    "experts on the device (--resident), or more GPUs"
)
HOST_MEMORY = r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory"
GPU_MEMORY = r"CUDA out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation"
COMMUNICATION = r"NCCL|nccl[A-Z]|gloo|Connection (closed|reset) by peer"
DEVICE: tuple[tuple[str, type[MoesimError], str], ...] = (
    (
        r"not compiled with CUDA|requires CUDA support|no kernel image is available|pinned memory allocator",
        InputError,
        "this build of torch cannot use the GPU ({said}): install one for it, or use --device cpu",
    ),
    (
        r"no NVIDIA driver|libcuda\.so|driver version is insufficient|driver on your system is too old"
        r"|CUDA driver initialization failed|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH|CUDA_ERROR_NOT_INITIALIZED",
        InputError,
        "the NVIDIA driver is missing or too old ({said}): install it, or use --device cpu",
    ),
    (
        r"No CUDA GPUs are available|no CUDA-capable device|invalid device ordinal|CUDA_ERROR_NO_DEVICE",
        InputError,
        "torch sees no such GPU here ({said}): use --device cpu, or look at CUDA_VISIBLE_DEVICES",
    ),
    (
        r"illegal memory access|device-side assert|misaligned address|unspecified launch failure|uncorrectable ECC",
        MoesimError,
        "the GPU stopped with an error ({said}): nothing computed since counts. Run again with CUDA_LAUNCH_BLOCKING=1 "
        "to see where, and report it",
    ),
)
"""Pattern of what an error says, the kind that is made of it, and its line. Earlier ones go first."""
MOST = 160
"""Characters of an error's own text that are quoted."""


def explained(error: BaseException) -> MoesimError | None:
    """The error in one line with what to do; None where it is none of torch or the driver, so perhaps a bug of ours.

    One of our own comes back as it is.
    """
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, MoesimError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or re.search(GPU_MEMORY, text):
        # The driver says the same of host memory that it could not pin.
        return MoesimError(OUT_OF_MEMORY.format(where="the GPU (or in pinned host memory)", what=_asked(text)))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(HOST_MEMORY, text)):
        return MoesimError(OUT_OF_MEMORY.format(where="the host", what=_asked(text)))
    if lost_connection(error):
        return MoesimError(f"communication between the ranks failed ({_quoted(text)}): NCCL_DEBUG=WARN shows why")
    if isinstance(error, RuntimeError | AssertionError | OSError):
        for pattern, kind, line in DEVICE:
            if re.search(pattern, text):
                return kind(line.format(said=_quoted(text)))
    return None


def lost_connection(error: BaseException) -> bool:
    """True for an error of nccl or gloo: mostly the echo of another rank's end, so not the one to blame."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search(COMMUNICATION, str(error)) is not None


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raise what `explained` knows as that; everything else passes as it is."""
    try:
        yield
    except Exception as error:
        known = explained(error)
        if known is None or known is error:
            raise
        raise known from error


def _asked(text: str) -> str:
    """How much was asked for, where the error says so."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    return f" (asked for {found[1]})" if found else ""


def _quoted(text: str) -> str:
    """The first sentence: torch adds paragraphs of advice."""
    first = re.split(r"(?<=[a-z])\. |CUDA kernel errors might|Compile with ", text, maxsplit=1)[0].strip()
    return first if len(first) <= MOST else first[: MOST - 3] + "..."
