"""TensorRT-LLM's expert statistics (EXPERT_STATISTIC_PATH): meta_info.json and one safetensors file a rank.

Keys are `{iteration}_{layer}`; every rank counts its own tokens, so ranks are summed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.loads import Counts, counts, recording_of, step_loads
from moesim.traces.formats.text_files import json_file
from moesim.traces.store import Trace

META = "meta_info.json"
RANK = re.compile(r"rank(\d{1,5})\.safetensors", re.ASCII)
KEY = re.compile(r"(\d{1,9})_(\d{1,4})", re.ASCII)


def recognise(path: Path) -> bool:
    """A folder with meta_info.json and files of ranks."""
    return path.is_dir() and (path / META).is_file() and bool(_ranks(path))


def read(path: Path, options: ImportOptions) -> Recording:
    """One row an iteration; the keys number the layers."""
    about = json_file(path / META, 1 << 20)
    experts, top_k = (
        about.get(n) if isinstance(about, dict) else None for n in ("num_experts", "num_experts_per_token")
    )
    if type(experts) is not int or type(top_k) is not int or not 0 < top_k <= experts <= 65_535:
        raise InputError(f"{path / META}: must give num_experts and num_experts_per_token")
    ranks = _ranks(path)
    if not ranks:
        raise InputError(f"{path}: has no rank0.safetensors")
    keys = _keys(ranks[0])
    steps, layers = sorted({step for step, _ in keys}), tuple(sorted({layer for _, layer in keys}))
    if len(keys) != len(steps) * len(layers):
        missing = next((s, la) for s in steps for la in layers if (s, la) not in keys)
        raise InputError(f"{ranks[0]}: lacks {missing[0]}_{missing[1]}: every iteration must have every layer")
    notes: dict[str, Any] = {"ranks": f"the sum over {len(ranks)} ranks"}
    parts = _rows(ranks, steps, layers, experts)
    return recording_of(path, parts, options, layers=layers, top_k=top_k, notes=notes)


def write(trace: Trace, stack: str, path: Path) -> None:
    """A folder as of one rank, an iteration a recorded step. Raises InputError where `path` exists."""
    spec = trace.spec
    if path.exists():
        raise InputError(f"{path} exists already; choose another name")
    layers = spec.stack(stack).moe_layers
    tensors = {
        f"{step}_{layer}": load[0, i].copy()
        for step, load in enumerate(step_loads(trace, stack))
        for i, layer in enumerate(layers)
    }
    meta = {"num_experts": spec.num_experts, "num_experts_per_token": spec.top_k}
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.mkdir(parents=True)  # fails where somebody else's is there, so that only our own is removed
        try:
            save_file(tensors, temporary / "rank0.safetensors")
            (temporary / META).write_text(json.dumps(meta), encoding="utf-8")
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({str(error)[:80]})") from None


def _ranks(path: Path) -> list[Path]:
    named = {int(match[1]): file for file in path.iterdir() if (match := RANK.fullmatch(file.name))}
    return [named[rank] for rank in sorted(named)]


def _keys(file: Path) -> set[tuple[int, int]]:
    try:
        with safe_open(file, framework="np") as content:
            names = list(content.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({str(error)[:80]})") from None
    matches = [KEY.fullmatch(name) for name in names]
    if not names or not all(matches):
        raise InputError(f"{file}: its keys must be ITERATION_LAYER")
    return {(int(match[1]), int(match[2])) for match in matches if match}


def _rows(ranks: list[Path], steps: list[int], layers: tuple[int, ...], experts: int) -> Iterator[Counts]:
    with ExitStack() as stack:
        try:
            files = [(file, stack.enter_context(safe_open(file, framework="np"))) for file in ranks]
            for step in steps:
                yield np.sum([_row(file, content, step, layers, experts) for file, content in files], axis=0)[None]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{ranks[0].parent}: a rank's file lacks an iteration or is damaged "
                             f"({str(error)[:80]})") from None  # fmt: skip


def _row(file: Path, content: Any, step: int, layers: tuple[int, ...], experts: int) -> Counts:
    rows = []
    for layer in layers:
        what = f"{file}: {step}_{layer}"
        row = counts(content.get_tensor(f"{step}_{layer}"), what, 1)
        if len(row) != experts:
            raise InputError(f"{what}: counts {len(row)} experts, {META} says {experts}")
        rows.append(row)
    return np.stack(rows)


FORMAT = Format(
    name="tensorrt",
    summary="TensorRT-LLM: the folder of EXPERT_STATISTIC_PATH",
    recognise=recognise,
    read=read,
    write=write,
)
