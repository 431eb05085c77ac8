"""Foreign routing and load formats: the one place where a format is registered.

`recognise` asks each format by content, in the order below; narrow ones come first.
"""

from __future__ import annotations

from pathlib import Path

from moesim.traces.errors import InputError
from moesim.traces.formats import (
    arrays,
    esft,
    jsonl,
    load_csv,
    megatron,
    moe_balance,
    npz,
    parquet,
    sglang,
    sglang_requests,
    tensorrt,
    vllm,
    vllm_loads,
)
from moesim.traces.formats.base import Format, ImportOptions, Recording

_ALL: tuple[Format, ...] = (
    parquet.FORMAT,
    sglang.FORMAT,
    sglang_requests.FORMAT,
    vllm.FORMAT,
    vllm_loads.FORMAT,
    tensorrt.FORMAT,
    megatron.FORMAT,
    esft.FORMAT,
    npz.FORMAT,
    moe_balance.FORMAT,
    jsonl.FORMAT,
    load_csv.FORMAT,
    load_csv.LLAMACPP,
    arrays.MOE_INFINITY,
    arrays.DEEPSEEK,
)
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}


def recognise(path: Path) -> Format:
    """The format of the file or folder at `path`. Raises InputError: nothing there, or listing what was looked for."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    for known in FORMATS.values():
        if known.read and known.recognise(path):
            return known
    looked = "; ".join(f"{f.name} ({f.summary})" for f in FORMATS.values() if f.read)
    raise InputError(f"{path}: not a recording that moesim recognises; name it with --format. Looked for: {looked}")


__all__ = ["FORMATS", "Format", "ImportOptions", "Recording", "recognise"]
