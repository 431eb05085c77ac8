"""Torch files that nobody vouches for: tensors, numbers, texts, lists and dicts; nothing is unpickled beyond those.

`torch.load(weights_only=True)` refuses every other object before it is made. What the zip container promises is checked
first. Torch is imported when a file is read or written.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.text_files import replacing

MOST_UNPACKED = 1 << 33
MOST_MEMBERS = 1 << 18


def is_torch(path: Path) -> bool:
    """Whether the file is a zip with a torch pickle in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def load_torch(path: Path) -> Any:
    """The content of a `.pt` file, tensors on the CPU. Raises InputError: unreadable, not one, hostile, or cut short.

    Files from before torch 1.6, which are bare pickles, are refused: save them again.
    """
    _check_container(path)
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever the interpreter of its opcodes runs into
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a sound torch file, or it holds more than plain data ({reason})") from None


def array_of(value: Any, what: str, ndim: int) -> NDArray[Any]:
    """A tensor (or nested list) as an array of `ndim` dimensions. Raises InputError naming `what`."""
    import torch

    if isinstance(value, list | tuple):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError(f"{what}: must be a tensor of numbers") from None
    if not isinstance(value, torch.Tensor) or value.ndim != ndim or value.is_complex() or value.is_quantized:
        raise InputError(f"{what}: must be a tensor of numbers in {ndim} dimensions")
    try:
        # Strides come from the file: what they reach was checked by torch, what they multiply to was not.
        if value.numel() > value.untyped_storage().nbytes():
            raise InputError(f"{what}: promises {value.numel():,} numbers and holds fewer")
        value = value.to_dense() if value.is_sparse else value
        return np.asarray(value.float() if value.dtype == torch.bfloat16 else value)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(f"{what}: cannot be read ({str(error)[:80]})") from None


def save_torch(value: Any, path: Path) -> None:
    """Write arrays, numbers, texts, lists and dicts as a `.pt`, arrays as tensors. Raises InputError if it exists."""
    import torch

    def tensors(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: tensors(entry) for name, entry in part.items()}
        if isinstance(part, list):
            return [tensors(entry) for entry in part]
        return torch.from_numpy(np.ascontiguousarray(part)) if isinstance(part, np.ndarray) else part

    buffer = io.BytesIO()
    torch.save(tensors(value), buffer)
    with replacing(path) as file:
        file.write(buffer.getvalue())


def _check_container(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise InputError(f"{path}: not a torch file in zip form (torch 1.6 and later)") from None
    # Torch stores its members without compression; anything else is not its own.
    size = path.stat().st_size
    if len(members) > MOST_MEMBERS or sum(m.file_size for m in members) > min(MOST_UNPACKED, 2 * size):
        raise InputError(f"{path}: promises more than it holds; not a file that torch has written")
