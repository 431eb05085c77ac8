"""Tensors and some facts about them in one safetensors file, written whole or not at all. Nothing is pickled.

Knows nothing about predictors: what the facts are is up to who writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moesim.traces import InputError

Facts = dict[str, Any]
"""Names and JSON values."""


def write(path: Path, tensors: Mapping[str, torch.Tensor], facts: Facts) -> None:
    """Write beside `path`, push to the disk, rename: `path` is there whole or as it was. Raises InputError."""
    temporary = path.with_name(path.name + ".partial")
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    data = save(copies, metadata={name: json.dumps(value) for name, value in facts.items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or choose another place") from None


def read(path: Path, wanted: Facts) -> tuple[dict[str, torch.Tensor], Facts]:
    """The tensors, on the CPU, and the facts. Raises InputError: missing, damaged, or not as `wanted`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise damaged(path, " ".join(str(error).split())[:120]) from None
    for name, value in wanted.items():
        if facts.get(name) != value:
            raise InputError(
                f"{path}: its {name} is {_shown(facts.get(name))}, and {_shown(value)} is needed here: use another file"
            )
    return tensors, facts


def matching(path: Path, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError where the names, shapes or dtypes of `tensors` are not those of `like`."""
    for name in sorted(tensors.keys() ^ like.keys()):
        raise damaged(path, f"tensor {name} is {'missing' if name in like else 'unknown'}")
    for name, wanted in like.items():
        found = tensors[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise damaged(path, f"{name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}")


def damaged(path: Path, what: str) -> InputError:
    """The error of a file that cannot be used."""
    return InputError(f"{path}: damaged, or not written by moesim ({what}); delete it or restore it")


def _shown(value: Any) -> str:
    text = json.dumps(value) if value is not None else "not stated"
    return text if len(text) <= 80 else text[:77] + "..."
