"""Checks of plan files by the rules of the systems that load them, from their documentation and loaders alone.

Each takes the text of a file and what the server runs with, and raises InputError with the first rule that is broken.
Shares nothing with the code that writes plans, so that a mistake there cannot hide here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from moesim.traces.errors import InputError

Row = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server knows before it reads a plan."""

    experts: int
    """Logical experts of a layer."""
    gpus: int
    """Expert-parallel ranks."""
    num_layers: int
    """All layers of the model."""
    moe_layers: tuple[int, ...]
    """Numbers of those with experts."""


def check_sglang(text: str, server: Server) -> None:
    """SGLang, `ExpertLocationMetadata.init_by_mapping`: a row for every layer of the model, slots divide among the
    ranks, every entry a logical expert, every logical expert in every row."""
    rows = _object(json.loads, text).get("physical_to_logical_map")
    if not isinstance(rows, list) or len(rows) != server.num_layers:
        raise InputError(f"physical_to_logical_map must have {server.num_layers} rows, one for each layer of the model")
    for layer, row in enumerate(rows):
        # What dense layers say is never used, so a trivial row may repeat experts on a rank there.
        _check_row(row, layer, len(rows[0]), server, once_a_rank=layer in server.moe_layers)


def check_vllm(text: str, server: Server) -> None:
    """vLLM, offline mapping record: its type and version, slots = experts + redundant ones, one row for each MoE layer
    counted from 0."""
    record = _object(json.loads, text)
    if (record.get("record_type"), record.get("version")) != ("eplb_initial_mapping", 1):
        raise InputError("the record is not an eplb_initial_mapping of version 1")
    slots = record.get("num_slots")
    if slots != server.experts + record.get("num_redundant_experts", -1):
        raise InputError(f"num_slots {slots!r} is not {server.experts} experts plus num_redundant_experts")
    _check_assignments(record, [str(i) for i in range(len(server.moe_layers))], server)


def check_tensorrt(text: str, server: Server) -> None:
    """TensorRT-LLM, `MoeLoadBalancerConfig`: no field that it does not know, at least as many slots as experts, one row
    for each MoE layer by its number in the model."""
    config = _object(yaml.safe_load, text)
    if unknown := sorted(config.keys() - {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}):
        raise InputError(f"field {unknown[0]!r} is not one of the load balancer's configuration")
    _check_assignments(config, list(server.moe_layers), server)


def check_deepseek(text: str, server: Server) -> None:
    """DeepSeek EPLB, result of `rebalance_experts`: the three arrays say the same, -1 pads log2phy at the end."""
    result = _object(json.loads, text)
    phy2log, log2phy, logcnt = (result.get(name, []) for name in ("phy2log", "log2phy", "logcnt"))
    if not len(phy2log) == len(log2phy) == len(logcnt) == len(server.moe_layers):
        raise InputError(f"phy2log, log2phy and logcnt must have {len(server.moe_layers)} layers")
    for layer, row in enumerate(phy2log):
        _check_row(row, layer, len(phy2log[0]), server)
        for expert in range(server.experts):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            padding = [-1] * (len(log2phy[layer][expert]) - len(slots))
            if log2phy[layer][expert] != slots + padding or logcnt[layer][expert] != len(slots):
                raise InputError(f"layer {layer}, expert {expert}: log2phy or logcnt does not agree with phy2log")


def _check_assignments(config: dict[str, Any], layers: list[Any], server: Server) -> None:
    slots, rows = config.get("num_slots"), config.get("initial_global_assignments")
    if not isinstance(slots, int) or slots < server.experts or slots % server.gpus:
        raise InputError(f"num_slots {slots!r} must be at least {server.experts} and divide among {server.gpus} ranks")
    if not isinstance(rows, dict) or sorted(rows) != sorted(layers):
        raise InputError(f"initial_global_assignments must have the layers {layers}")
    for layer, row in rows.items():
        _check_row(row, layer, slots, server)


def _check_row(row: Any, layer: Any, slots: int, server: Server, *, once_a_rank: bool = True) -> None:
    if not isinstance(row, list) or len(row) != slots or slots % server.gpus:
        raise InputError(f"layer {layer}: must list {slots} slots, a multiple of {server.gpus} ranks")
    if not all(type(expert) is int and 0 <= expert < server.experts for expert in row):
        raise InputError(f"layer {layer}: an entry is not a logical expert 0..{server.experts - 1}")
    if missing := sorted(set(range(server.experts)) - set(row)):
        raise InputError(f"layer {layer}: logical expert {missing[0]} is in no slot")
    local = slots // server.gpus
    for rank in range(server.gpus if once_a_rank else 0):
        held: Row = row[rank * local : (rank + 1) * local]
        if len(set(held)) != local:
            raise InputError(f"layer {layer}: rank {rank} holds an expert twice")


def _object(parse: Callable[[str], Any], text: str) -> dict[str, Any]:
    found = parse(text)
    if not isinstance(found, dict):
        raise InputError("the plan is not an object")
    return found
