"""What a foreign format is: how it is recognised, read as a stream of tables, and written.

A reader yields logical expert ids (or loads) in the order of the recording, in parts of bounded size, and notes what it
had to do on the way (ranks that held the same sum, physical ids, padding). It knows nothing about moesim's own store.
Shape letters: T tokens, N rows of loads, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.traces.spec import ModelSpec
from moesim.traces.store import Kind, Trace
from moesim.traces.tokens import LoadTable, Phase, TokenTable

PART_TOKENS = 1 << 14
"""Tokens that a reader yields at once, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the user knows of a recording and its file does not say."""

    spec: ModelSpec | None = None
    """The model (of --model); goes before what a file implies."""
    experts: int | None = None
    layers: int | None = None
    """MoE layers, where a file is a flat buffer."""
    stack: str | None = None
    """The stack that was recorded; default: what the file says, else the decoder."""
    top_k: int | None = None
    phase: Phase = Phase.PREFILL
    """For recordings that do not say in which phase a token was computed."""
    physical_to_logical: Path | None = None
    """A map [L, P] for recordings whose ids are physical and that do not bring it along."""


@dataclass(slots=True, kw_only=True)
class Recording:
    """A foreign recording that was opened: its shape is known, its rows come once, as a stream."""

    kind: Kind
    layers: tuple[int, ...]
    """Numbers of the MoE layers in the model (0-based), as far as the file tells; else 0..L-1."""
    num_layers: int
    """All layers of the model, dense ones included, as far as the file tells; else L."""
    num_experts: int
    top_k: int
    parts: Iterator[TokenTable] | Iterator[LoadTable]
    spec: ModelSpec | None = None
    """The whole model, where the file brings it along (moesim's own exports)."""
    stack: str = "decoder"
    """Name of the stack that was recorded."""
    requests: list[str] = field(default_factory=list)
    """Name of the text or data set of every request, in order of request number; empty where nothing is known. May be
    filled while `parts` is consumed."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was done and guessed, for the manifest: plain JSON. May grow while `parts` is consumed. Known keys:
    padding_rows (dropped by the reader), unfilled_rows, ranks (how ranks were combined), physical_ids (how they were
    turned into logical ones), experts, top_k, requests, phase (where guessed, in words)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One foreign format. All functions raise InputError in one line: the file, what is wrong, what to do."""

    name: str
    summary: str
    """One line for help and messages: the system, and what the file or folder is."""
    recognise: Callable[[Path], bool]
    """Looks at the content of a file or folder, cheaply; never raises, executes nothing."""
    read: Callable[[Path, ImportOptions], Recording] | None
    write: Callable[[Trace, str, Path], None] | None = None
    """Writes a stack of a trace; None where the format cannot be written from a trace."""
