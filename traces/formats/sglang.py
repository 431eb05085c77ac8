"""SGLang's expert distribution recorder (--expert-distribution-recorder-mode), and the count files of its plans.

- stat, stat_approx: `logical_count` [steps, layers, experts], all-reduced, so every rank's file says the same;
- per_pass: records with `global_physical_count` [L, P], summed over the ranks of a pass;
- per_token: records that also have every token's physical experts; see sglang_tokens.py;
- --init-expert-location files with `logical_count` [L, E] or [S, L, E].

Shape letters: S steps, L layers (dense ones included, as zeros), E logical and P physical experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats import sglang_tokens
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.loads import Counts, counts, logical, recording_of, step_loads
from moesim.traces.formats.text_files import first_record, json_file
from moesim.traces.formats.torch_files import array_of, is_torch, load_torch, save_torch
from moesim.traces.store import Trace

Content = dict[str, Any]


def recognise(path: Path) -> bool:
    """A torch file (or the first of a folder) with counts or records, or such a JSON file."""
    files = _files(path)
    try:
        if files and is_torch(files[0]):
            return _is_ours(load_torch(files[0]))
        return path.is_file() and "logical_count" in first_record(path)
    except InputError:
        return False


def read(path: Path, options: ImportOptions) -> Recording:
    """Whatever the files hold; all files of a folder must be of one kind."""
    files = _files(path)
    if not files:
        raise InputError(f"{path}: the folder has no .pt file")
    contents = [(file, _content(file)) for file in files]
    kinds = {"records" in content for _, content in contents}
    if len(kinds) > 1:
        raise InputError(f"{path}: mixes files with counts and files with records; import one kind at a time")
    if not kinds.pop():
        return _stat(path, contents, options)
    records = [(file, record) for file, content in contents for record in _records(file, content)]
    map_LP = _map(*contents[0])
    for file, content in contents[1:]:
        if not np.array_equal(_map(file, content), map_LP):
            raise InputError(f"{file}: its map is not that of {contents[0][0].name}; import one recording at a time")
    if any("topk_ids_of_layer" in record for _, record in records):
        return sglang_tokens.read(path, records, map_LP, options)
    return _per_pass(path, records, map_LP, options)


def write(trace: Trace, stack: str, path: Path) -> None:
    """A file of mode stat: the load of every recorded step, a row for each layer of the model."""
    spec = trace.spec.stack(stack)
    steps = np.concatenate(list(step_loads(trace, stack)))
    count_SLE = np.zeros((len(steps), spec.num_layers, trace.spec.num_experts), np.int64)
    count_SLE[:, list(spec.moe_layers)] = steps
    if count_SLE.max(initial=0) >= 1 << 31:
        raise InputError(f"{path}: a count does not fit the int32 of SGLang's files")
    value = {"rank": 0, "logical_count": count_SLE.astype(np.int32), "average_utilization_rate_over_window": None}
    save_torch(value, path)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.pt")) if path.is_dir() else [path]


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and ("logical_count" in content or "records" in content)


def _content(file: Path) -> Content:
    content = load_torch(file) if is_torch(file) else json_file(file)
    if not isinstance(content, dict) or not _is_ours(content):
        raise InputError(f"{file}: has neither logical_count nor records; is it of SGLang's recorder?")
    return content


def _stat(path: Path, contents: list[tuple[Path, Content]], options: ImportOptions) -> Recording:
    """Files of one recording repeat each other, one a rank; files of several recordings follow each other."""
    kept: list[Counts] = []
    repeated = 0
    for file, content in contents:
        raw = content["logical_count"]
        found = counts(_array(raw, f"{file}: logical_count"), f"{file}: logical_count")
        found = found[None] if found.ndim == 2 else found
        if any(np.array_equal(found, other) for other in kept):
            repeated += 1
        else:
            kept.append(found)
    notes: dict[str, Any] = {}
    if repeated:
        notes["ranks"] = f"{repeated} files repeat the sum over all ranks and were left out"
    if len({found.shape[1:] for found in kept}) > 1:
        raise InputError(f"{path}: its files count different layers or experts")
    return _without_empty(path, np.concatenate(kept), options, notes)


def _per_pass(path: Path, records: list[tuple[Path, Content]], map_LP: Counts, options: ImportOptions) -> Recording:
    passes: dict[int, list[tuple[str, Counts]]] = {}
    for number, of_ranks in sglang_tokens.by_pass(records).items():
        for file, record in of_ranks:
            where = f"{file}, pass {number}"
            found = counts(_array(record.get("global_physical_count"), where), where, 2)
            if found.shape != map_LP.shape:
                raise InputError(f"{where}: counts {list(found.shape)}, the map is {list(map_LP.shape)}")
            passes.setdefault(number, []).append((where, found))
    if not passes:
        raise InputError(f"{path}: has no record")
    notes: dict[str, Any] = {"physical_ids": "made logical by last_physical_to_logical_map"}
    several = [found for found in passes.values() if len(found) > 1]
    # Where all ranks of every pass say the same, each holds the sum over all of them.
    same = bool(several) and all((a == found[0][1]).all() for found in several for _, a in found[1:])
    if several:
        notes["ranks"] = "every rank holds the sum: one was taken" if same else "the sum over the ranks was taken"
    experts = options.spec.num_experts if options.spec else options.experts or int(map_LP.max()) + 1
    load_NLE = np.stack([
        _logical_layers(found[0][1] if same else np.sum([a for _, a in found], axis=0), map_LP, experts, found[0][0])
        for found in passes.values()
    ])  # fmt: skip
    return _without_empty(path, load_NLE, options, notes)


def _logical_layers(count_LP: Counts, map_LP: Counts, experts: int, where: str) -> Counts:
    return np.stack([logical(row, to, experts, where) for row, to in zip(count_LP, map_LP, strict=True)])


def _without_empty(path: Path, load_NLE: Counts, options: ImportOptions, notes: dict[str, Any]) -> Recording:
    """Leave out layers that never count (dense) and rows of the ring buffer that were never filled."""
    if load_NLE.ndim != 3:
        raise InputError(f"{path}: counts must be [steps, layers, experts], got shape {list(load_NLE.shape)}")
    routed_L, filled_N = load_NLE.any(axis=(0, 2)), load_NLE.any(axis=(1, 2))
    if not routed_L.any():
        raise InputError(f"{path}: nothing was counted")
    if not filled_N.all():
        notes["unfilled_rows"] = int((~filled_N).sum())
    layers = tuple(int(layer) for layer in np.flatnonzero(routed_L))
    parts = iter([load_NLE[filled_N][:, routed_L]])
    return recording_of(path, parts, options, layers=layers, num_layers=load_NLE.shape[1], notes=notes)


def _records(file: Path, content: Content) -> Iterator[Content]:
    records = content["records"]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{file}: 'records' must be a list of records")
    yield from records


def _map(file: Path, content: Content) -> Counts:
    return counts(_array(content.get("last_physical_to_logical_map"), f"{file}: last_physical_to_logical_map"),
                  f"{file}: last_physical_to_logical_map", 2)  # fmt: skip


def _array(value: Any, what: str) -> NDArray[Any]:
    ndim = value.ndim if hasattr(value, "ndim") else _depth(value)
    return array_of(value, what, ndim)


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and value:
        value, depth = value[0], depth + 1
    return depth


FORMAT = Format(
    name="sglang",
    summary="SGLang: .pt files of the expert distribution recorder (stat, stat_approx, per_pass, per_token)",
    recognise=recognise,
    read=read,
    write=write,
)
