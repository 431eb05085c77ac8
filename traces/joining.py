"""Traces one after the other: a shift of the workload in the middle of a recording."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.traces.errors import InputError
from moesim.traces.gates import Gates
from moesim.traces.importing import Progress
from moesim.traces.store import OPTIONAL, Trace
from moesim.traces.tokens import LoadTable, TokenTable
from moesim.traces.versions import version
from moesim.traces.writer import TraceWriter


def concat_traces(
    paths: list[Path], out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> tuple[Trace, list[str]]:
    """Write the traces at `paths`, in that order, as the trace `out`; also returns the columns that not all of them
    have and that were left out.

    Requests and steps are numbered on. Requests without a text's name get the name of their trace, so that a split by
    data set can tell the parts apart. Raises InputError where the traces are not of one kind and one router.
    """
    traces = [Trace.open(path) for path in paths]
    for trace in traces[1:]:
        _check_same_router(traces[0], trace)
    left_out = _left_out(traces)
    gates = _common_gates(traces)
    if gates is None and any(trace.gate_file for trace in traces):
        left_out.append("gates")
    total = sum(shard.rows for trace in traces for shard in trace.shards)
    provenance = {
        "concatenated": [{"trace": trace.path.name, "provenance": trace.provenance} for trace in traces],
        "synthetic": any(trace.provenance.get("synthetic") for trace in traces),
        "versions": {"moesim": version("moesim")},
    }
    spec = next((trace.spec for trace in traces if trace.spec.widths), traces[0].spec)
    request = step = done = 0
    with TraceWriter(out, spec, provenance, kind=traces[0].kind, overwrite=overwrite, gates=gates) as writer:
        for trace in traces:
            requests, steps = len(trace.request_texts), 0
            for stack, part in _parts(trace):
                if isinstance(part, TokenTable):
                    requests = max(requests, int(part.request.max(initial=-1)) + 1)
                    part = _moved(part, request, left_out)  # noqa: PLW2901
                steps = max(steps, int(part.step.max(initial=-1)) + 1)
                writer.append(stack, replace(part, step=part.step + np.int32(step)))
                done += len(part)
                if progress:
                    progress(done, total)
            named = list(trace.request_texts)
            writer.add_requests(named + [trace.path.stem] * (requests - len(named)))
            request, step = request + requests, step + steps
    return Trace.open(out), left_out


def _check_same_router(first: Trace, other: Trace) -> None:
    if other.kind != first.kind:
        raise InputError(f"{other.path} holds {other.kind} and {first.path} {first.kind}: they cannot be joined")
    for what in ("num_experts", "top_k", "stacks", "vocab_size"):
        a, b = getattr(first.spec, what), getattr(other.spec, what)
        if a != b:
            raise InputError(
                f"{other.path}: its {what} is {_brief(b)}, that of {first.path} {_brief(a)}: not one router"
            )


def _brief(value: Any) -> Any:
    return [(stack.name, len(stack.moe_layers)) for stack in value] if isinstance(value, tuple) else value


def _left_out(traces: list[Trace]) -> list[str]:
    """Optional columns that some shard lacks."""
    if traces[0].kind == "loads":
        return []
    columns = [next(trace.parts(stack)).arrays().keys() for trace in traces for stack in trace.stacks]
    return [name for name in OPTIONAL if any(name in have for have in columns) and not all(name in h for h in columns)]


def _common_gates(traces: list[Trace]) -> dict[str, Gates] | None:
    """The gates, where all traces have the same."""
    files = [trace.gate_file for trace in traces]
    if files[0] is None or any(file is None or file.sha256 != files[0].sha256 for file in files):
        return None
    found = {stack.name: traces[0].gates(stack.name) for stack in traces[0].spec.stacks}
    return {stack: gates for stack, gates in found.items() if gates is not None}


def _parts(trace: Trace) -> Iterator[tuple[str, TokenTable | LoadTable]]:
    for stack in trace.stacks:
        parts = trace.load_parts(stack) if trace.kind == "loads" else trace.parts(stack)
        for part in parts:
            yield stack, part


def _moved(part: TokenTable, request: int, left_out: list[str]) -> TokenTable:
    changes: dict[str, Any] = dict.fromkeys(name for name in left_out if name in OPTIONAL)
    return replace(part, request=part.request + np.int32(request), **changes)
