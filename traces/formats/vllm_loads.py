"""vLLM's dump of expert loads: JSON lines of eplb_load_stats, physical counts with their map (vLLM PR 41141).

Lines of eplb_initial_mapping, which are plans, may stand between them and are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.traces.errors import InputError
from moesim.traces.formats.base import Format, ImportOptions, Recording
from moesim.traces.formats.loads import Counts, counts, logical, recording_of, step_loads
from moesim.traces.formats.text_files import first_record, int_array, json_lines, replacing
from moesim.traces.store import Trace

STATS, MAPPING = "eplb_load_stats", "eplb_initial_mapping"


def recognise(path: Path) -> bool:
    """A first line of one of the two record types."""
    return path.is_file() and first_record(path).get("record_type") in (STATS, MAPPING)


def read(path: Path, options: ImportOptions) -> Recording:
    """One row a record of statistics, logical experts."""
    said = options.spec.num_experts if options.spec else options.experts
    experts = said or max((int(map_LP.max()) + 1 for _, _, map_LP in _records(path)), default=0)
    if not 0 < experts <= 65_535:
        raise InputError(f"{path}: has no {STATS} record, or its map names an expert beyond 65535")
    notes: dict[str, Any] = {"physical_ids": "made logical by each record's p2l_map"}
    if said is None:
        notes["experts"] = f"{experts}, the largest in the maps + 1; --experts or --model would say it"

    def parts() -> Iterator[Counts]:
        for where, load_LP, map_LP in _records(path):
            pairs = zip(load_LP, map_LP, strict=True)
            yield np.stack([logical(load_P, map_P, experts, where) for load_P, map_P in pairs])[None]

    return recording_of(path, parts(), options, notes=notes)


def write(trace: Trace, stack: str, path: Path) -> None:
    """The load of every recorded step, physical experts = logical ones, one rank."""
    experts = trace.spec.num_experts
    with replacing(path) as file:
        for step, load in enumerate(step_loads(trace, stack)):
            record = {
                "record_type": STATS,
                "version": 1,
                "step": step,
                "num_ranks": 1,
                "num_layers": load.shape[1],
                "expert_load": load[0].tolist(),
                "p2l_map": [list(range(experts))] * load.shape[1],
                "tokens": (load[0].sum(axis=1, keepdims=True) // trace.spec.top_k).tolist(),
            }
            file.write(json.dumps(record).encode() + b"\n")


def _records(path: Path) -> Iterator[tuple[str, Counts, Counts]]:
    """(where, load [L, P], map [L, P])."""
    for number, record in json_lines(path):
        where = f"{path}, line {number}"
        if record.get("record_type") == MAPPING:
            continue
        if record.get("record_type") != STATS or record.get("version") != 1:
            raise InputError(f"{where}: not a record {STATS} of version 1")
        load = counts(int_array(record.get("expert_load"), f"{where}, expert_load", 2), f"{where}, expert_load")
        to = counts(int_array(record.get("p2l_map"), f"{where}, p2l_map", 2), f"{where}, p2l_map")
        if load.shape != to.shape or not load.size:
            raise InputError(f"{where}: expert_load is {list(load.shape)}, p2l_map {list(to.shape)}")
        yield where, load, to


FORMAT = Format(
    name="vllm-loads",
    summary="vLLM: JSON lines of eplb_load_stats",
    recognise=recognise,
    read=read,
    write=write,
)
