"""A model by its folder, or by its id on the Hugging Face hub: what is run is always a folder.

Fetched are configuration, tokenizer and weights, once; afterwards they are found in the hub's own cache.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from moesim.traces import InputError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEXTS = ("*.json", "*.model", "*.txt")
SAFE, OLD = "*.safetensors", "*.bin"
"""Weights; those of the old form are read as weights only, never unpickled, and only where there are no others."""


def model_folder(source: str) -> Path:
    """The folder `source`, or one that holds the model of that id, fetched where it is not here yet.

    Raises InputError where it is no folder and cannot be fetched. What is no id is left to whoever reads it.
    """
    folder = Path(source)
    if folder.is_dir() or not HUB_ID.fullmatch(source):
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=[*TEXTS, SAFE]))
        if not any(folder.glob(SAFE)):
            folder = Path(snapshot_download(source, allow_patterns=[*TEXTS, OLD]))
    except Exception as error:  # network, rights, an unknown name: each library version has its own
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{source}: no such model folder, and the model hub does not give it ({type(error).__name__}: {reason})"
        ) from None
    return folder


def model_name(folder: str | Path) -> str:
    """What people call the model in `folder`: the folder's name, or the id of what lies in the hub's cache."""
    path = Path(folder)
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def model_digest(folder: Path) -> str:
    """One for configuration and weights, as a recording of the model has it."""
    from moesim.traces.store import files_digest

    found = {}
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as content:
            found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return files_digest(found)
