"""NumPy files that nobody vouches for: the header is checked before anything is mapped, unpacked or allocated.

Nothing is ever unpickled. A `.npy` is memory-mapped; an `.npz` is unpacked only where what it promises fits a limit.
"""

from __future__ import annotations

import ast
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError

MAGIC = b"\x93NUMPY"
MOST_HEADER = 1 << 16
MOST_UNPACKED = 1 << 31
"""Bytes of one `.npz`, unpacked; larger recordings come as `.npy`."""
MOST_MEMBERS = 1 << 12

Array = NDArray[Any]


def open_npy(path: Path) -> Array:
    """The array of a `.npy` file, memory-mapped and read-only. Raises InputError: unreadable, not one, hostile, cut."""
    try:
        with path.open("rb") as file:
            head = file.read(12 + MOST_HEADER)
        dtype, fortran, shape = _header(head, str(path))
        offset = _end_of(head, str(path))
        size = path.stat().st_size - offset
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    need = _bytes(dtype, shape)
    if need > size:
        raise InputError(f"{path}: promises {need:,} bytes of shape {list(shape)} and has {size:,}; it was cut short")
    if not need:
        return np.zeros(shape, dtype)
    order: Any = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", offset, shape, order)


def npy_from_bytes(data: bytes, what: str) -> Array:
    """The array in the bytes of a `.npy` file. Raises InputError naming `what`."""
    dtype, fortran, shape = _header(data[: 12 + MOST_HEADER], what)
    offset, need = _end_of(data, what), _bytes(dtype, shape)
    if need > len(data) - offset:
        raise InputError(f"{what}: promises {need:,} bytes of shape {list(shape)} and has {len(data) - offset:,}")
    flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=offset)
    return flat.reshape(shape, order="F" if fortran else "C")


def open_npz(path: Path) -> dict[str, Array]:
    """All arrays of an `.npz` file. Raises InputError where it is not one, is damaged, encrypted, holds objects, or
    would unpack to more than MOST_UNPACKED bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS or sum(m.file_size for m in members) > MOST_UNPACKED:
                raise InputError(f"{path}: unpacks to more than {MOST_UNPACKED >> 30} GiB or {MOST_MEMBERS} arrays")
            return {m.filename.removesuffix(".npy"): _member(archive, m, path) for m in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not a sound .npz file ({str(error)[:80]})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def npz_files(path: Path) -> list[Path]:
    """The file itself, or the `.npz` files of a folder in order of name. Raises InputError where it has none."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: the folder has no .npz file")
    return files


def npz_has(path: Path, names: set[str]) -> bool:
    """Whether an `.npz`, or the first of a folder, has arrays of these names. Never raises."""
    try:
        return npz_names(npz_files(path)[0]) >= names
    except InputError:
        return False


def npz_names(path: Path) -> set[str]:
    """Names of the arrays of an `.npz`, without unpacking; empty where it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return set()


def is_npy(path: Path) -> bool:
    """Whether the file begins like a `.npy`."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def looks_like_ids(array: Array) -> bool:
    """Whether an array may be routed experts [T, L, K]: integers, K small, and (nearly) no expert twice in a token.

    Loads [N, L, E] fail at that: E is large, or counts repeat.
    """
    if array.ndim != 3 or array.dtype.kind not in "iu" or not array.size or array.shape[2] > 32:
        return False
    some = np.sort(np.asarray(array[:256]), axis=2)
    if some.min() < 0 or some.max() > 65_535:
        return False
    distinct = (some[:, :, 1:] != some[:, :, :-1]).all(axis=2)
    return bool(array.shape[2] == 1 or distinct.mean() > 0.5)


def looks_like_loads(array: Array) -> bool:
    """Whether an array may be loads [N, L, E] or [L, E]: counts, and not `looks_like_ids`."""
    if array.ndim not in (2, 3) or array.dtype.kind not in "iuf" or not array.size or array.shape[-1] < 2:
        return False
    if looks_like_ids(array):
        return False
    some = np.asarray(array[:256])
    return bool(np.isfinite(some).all() and (some >= 0).all() and (some == np.floor(some)).all())


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Array:
    what = f"{path}, {member.filename!r}"
    with archive.open(member) as file:
        # What is promised bounds what is read: a bomb inside unpacks no further than that.
        data = file.read(member.file_size + 1)
    if len(data) > member.file_size:
        raise InputError(f"{what}: unpacks to more than it promises")
    return npy_from_bytes(data, what)


def _header(head: bytes, what: str) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    """(dtype, Fortran order, shape) of a `.npy` header; numpy's own reader trusts the shape."""
    end = _end_of(head, what)
    begin = 10 if head[6] == 1 else 12
    try:
        header = ast.literal_eval(head[begin:end].decode("latin1").strip())
        fields = {name: header[name] for name in ("descr", "fortran_order", "shape")}
        dtype = np.dtype(fields["descr"]) if isinstance(fields["descr"], str) else np.dtype(object)
        shape = tuple(fields["shape"])
        sound = len(header) == 3 and type(fields["fortran_order"]) is bool and len(shape) <= 32
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, RecursionError, MemoryError):
        raise InputError(f"{what}: its .npy header is damaged") from None
    if not sound or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise InputError(f"{what}: its .npy header is damaged")
    if dtype.kind not in "iufb":
        raise InputError(f"{what}: holds {dtype}, not plain numbers; such files are never unpickled")
    return dtype, fields["fortran_order"], shape


def _end_of(head: bytes, what: str) -> int:
    if head[: len(MAGIC)] != MAGIC or len(head) < 12 or head[6] not in (1, 2, 3):
        raise InputError(f"{what}: not a .npy file")
    end = 10 + int.from_bytes(head[8:10], "little") if head[6] == 1 else 12 + int.from_bytes(head[8:12], "little")
    if end > len(head):
        raise InputError(f"{what}: its .npy header is cut short or too long")
    return end


def _bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize
