"""Torch files that nobody vouches for: tensors, numbers, texts, lists and dicts; nothing is unpickled beyond those.

What the zip container promises and which names its pickle calls is checked first, then `torch.load(weights_only=True)`
refuses what is left. Torch is imported when a file is read or written.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.text_files import replacing

MOST_UNPACKED = 1 << 33
MOST_MEMBERS = 1 << 18
MOST_REPEATED = 1 << 24
"""Numbers of a tensor that repeats a smaller storage (`expand`)."""
ZIP_MAGIC = b"PK\x03\x04"
PLAIN = re.compile(
    r"torch\._utils (_rebuild_tensor_v2|_rebuild_tensor_v3|_rebuild_parameter)|torch (\w+Storage|u?int\d+|Size)"
    r"|torch\.storage UntypedStorage|collections OrderedDict",
    re.ASCII,
)
"""Names that tensors, numbers, texts, lists and dicts need. `weights_only` lets `bytearray(n)` and `Tensor(n)` pass,
too, and a file of 1 KB takes any amount of memory with them."""


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
        return _array_of_list(value, what, ndim)
    if not isinstance(value, torch.Tensor) or value.ndim != ndim or value.is_complex() or value.is_quantized:
        raise InputError(f"{what}: must be a tensor of numbers in {ndim} dimensions")
    try:
        # Strides come from the file: what they reach was checked by torch, what they multiply to was not.
        if value.numel() > max(value.untyped_storage().nbytes(), MOST_REPEATED):
            raise InputError(f"{what}: promises {value.numel():,} numbers and holds fewer")
        value = value.detach()
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


def _array_of_list(value: Any, what: str, ndim: int) -> NDArray[Any]:
    try:
        array = np.array(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{what}: ragged, or not numbers") from None
    if array.ndim != ndim or array.dtype.kind not in "iuf":
        raise InputError(f"{what}: must be numbers in {ndim} dimensions")
    return array if array.size else array.astype(np.int64)  # an empty list has no dtype of its own


def _check_container(path: Path) -> None:
    """Raises InputError where the zip promises more than it holds, or its pickle calls more than plain data needs."""
    try:
        with path.open("rb") as file:
            begins_as_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC  # else torch reads it as a bare pickle
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # Torch stores its members without compression; anything else is not its own.
            size = path.stat().st_size
            if len(members) > MOST_MEMBERS or sum(m.file_size for m in members) > min(MOST_UNPACKED, size):
                raise InputError(f"{path}: promises more than it holds; not a file that torch has written")
            pickles = [archive.read(member) for member in members if member.filename.endswith("/data.pkl")]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):
        raise InputError(f"{path}: not a torch file in zip form (torch 1.6 and later), or damaged") from None
    if not begins_as_zip:
        raise InputError(f"{path}: not a torch file in zip form (torch 1.6 and later), or damaged")
    for data in pickles:
        _check_names(data, path)


def _check_names(data: bytes, path: Path) -> None:
    try:
        for opcode, name, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not PLAIN.fullmatch(str(name)):
                raise InputError(
                    f"{path}: not a sound torch file, or it holds more than plain data ({str(name)[:80]!r})"
                )
    except (ValueError, IndexError, OverflowError):
        raise InputError(f"{path}: not a sound torch file (its pickle is damaged)") from None
