"""Plans for serving systems: which logical expert lies in which physical slot, as a policy would have it.

A policy runs through a recording (in no time: every copy arrives at once), and what is resident then is what a server
should load. Slots that the policy leaves empty get the expert with the most load per copy. What is written is checked
by each system's own rules, plan_checks.py, before anybody gets it.
Shape letters: L MoE layers, E logical experts, P = G x S physical slots, G GPUs; slots of a GPU are neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import yaml
from numpy.typing import NDArray

from moesim.sim.driver import Driver
from moesim.sim.plan_checks import Server, check_deepseek, check_sglang, check_tensorrt, check_vllm
from moesim.sim.policies import make_policy, recipe
from moesim.sim.residency import EMPTY, Residency
from moesim.sim.scenario import Scenario
from moesim.traces import InputError, total_load_LE

LEAST_STEPS = 16
"""A shorter recording is repeated, so that policies that act every few steps have acted."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A physical-to-logical map of every MoE layer."""

    physical_LP: Ints
    """[L, P] logical expert in each slot."""
    experts: int
    gpus: int
    moe_layers: tuple[int, ...]
    """[L] numbers of the MoE layers in the model."""
    num_layers: int
    """All layers of the model's stack."""

    @property
    def slots(self) -> int:
        """P, over all GPUs."""
        return int(self.physical_LP.shape[1])

    @property
    def redundant(self) -> int:
        """Slots beyond one for every expert: what servers call the number of redundant experts."""
        return self.slots - self.experts


def make_plan(policy: str, scenario: Scenario) -> Plan:
    """What `policy` would have resident after the scenario's steps.

    Raises InputError for an oracle (it would be fitted to traffic that a server has not seen), a policy that
    lays nothing out or cannot be fitted on the recording, or more slots on a GPU than there are experts.
    """
    if recipe(policy).predictor == "oracle":
        raise InputError(f"policy {policy!r} is shown the future: no server can follow its plan; choose another")
    if recipe(policy).double_buffered:
        raise InputError(f"policy {policy!r} brings replicas anew for every layer: it has no plan to write down")
    if recipe(policy).miss is not None:
        raise InputError(f"policy {policy!r} is for slots that do not hold every expert: it has no plan to write down")
    if scenario.cluster.layer_slots > scenario.cluster.experts:
        raise InputError(
            f"{scenario.cluster.layer_slots} slots a GPU and layer for {scenario.cluster.experts} experts: an expert "
            "would be twice on a GPU; use fewer extra slots"
        )
    residency = _resident_after(policy, scenario)
    load_LE = total_load_LE(scenario.fit, scenario.cluster.experts)
    layers = [_filled(residency.experts_GS(layer), load_E) for layer, load_E in enumerate(load_LE)]
    stack = scenario.spec.stack(scenario.stack)
    return Plan(
        physical_LP=np.stack(layers),
        experts=scenario.cluster.experts,
        gpus=scenario.cluster.gpus,
        moe_layers=stack.moe_layers,
        num_layers=stack.num_layers,
    )


def _resident_after(policy: str, scenario: Scenario) -> Residency:
    driver = Driver(make_policy(policy, scenario.cluster, scenario.fit, scenario.gates))
    steps = list(scenario.steps())
    for step in islice(cycle(steps), max(len(steps), LEAST_STEPS)):
        moves = driver.begin_step(step.tokens, queued=step.queued)
        for layer in range(scenario.cluster.layers):
            for transfer in moves:
                driver.arrived(transfer)
            moves = driver.routed(step.layer(layer))
        for transfer in moves:
            driver.arrived(transfer)
        driver.end_step()
    return driver.residency


def _filled(experts_GS: NDArray[np.int32], load_E: Ints) -> Ints:
    """[P] the slots of one layer, empty ones filled one by one with the most load per copy that the GPU lacks."""
    slots_GS = experts_GS.astype(np.int64)
    copies_E = np.bincount(slots_GS[slots_GS != EMPTY], minlength=len(load_E))
    for gpu, slot in np.argwhere(slots_GS == EMPTY):
        worth_E = load_E / copies_E
        worth_E[slots_GS[gpu][slots_GS[gpu] != EMPTY]] = -1.0
        slots_GS[gpu, slot] = int(np.argmax(worth_E))
        copies_E[slots_GS[gpu, slot]] += 1
    return slots_GS.ravel()


def sglang_plan(plan: Plan) -> str:
    """JSON for SGLang's --init-expert-location: one row for every layer of the model.

    SGLang numbers all layers; those without experts get its trivial row (slot p holds p modulo E), which nothing reads.
    """
    rows_LP = np.tile(np.arange(plan.slots) % plan.experts, (plan.num_layers, 1))
    rows_LP[list(plan.moe_layers)] = plan.physical_LP
    return json.dumps({"physical_to_logical_map": rows_LP.tolist()}) + "\n"


def vllm_plan(plan: Plan) -> str:
    """One JSON line, record type eplb_initial_mapping; layers are numbered among the MoE layers (vLLM PR 41141)."""
    record = {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": plan.redundant,
        "num_slots": plan.slots,
        "initial_global_assignments": {str(i): row.tolist() for i, row in enumerate(plan.physical_LP)},
    }
    return json.dumps(record) + "\n"


def tensorrt_plan(plan: Plan) -> str:
    """YAML for TensorRT-LLM's MoE load balancer; layers have their numbers in the model.

    Its configuration class refuses fields that it does not know, so ep_size stands in a comment.
    """
    config = {
        "num_slots": plan.slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(zip(plan.moe_layers, plan.physical_LP.tolist(), strict=True)),
    }
    text: str = yaml.safe_dump(config, default_flow_style=None, width=1 << 20, sort_keys=False)
    return f"# ep_size: {plan.gpus}\n{text}"


def deepseek_plan(plan: Plan) -> str:
    """JSON of DeepSeek EPLB's result: phy2log [L, P], log2phy [L, E, X] padded with -1, logcnt [L, E]."""
    count_LE = np.stack([np.bincount(row, minlength=plan.experts) for row in plan.physical_LP])
    log2phy_LEX = np.full((*count_LE.shape, int(count_LE.max())), -1, np.int64)
    for layer, row in enumerate(plan.physical_LP):
        for expert in range(plan.experts):
            where = np.flatnonzero(row == expert)
            log2phy_LEX[layer, expert, : len(where)] = where
    arrays = {"phy2log": plan.physical_LP, "log2phy": log2phy_LEX, "logcnt": count_LE}
    return json.dumps({name: array.tolist() for name, array in arrays.items()}) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFormat:
    """A file that a serving system loads."""

    summary: str
    write: Callable[[Plan], str]
    check: Callable[[str, Server], None]
    hint: str
    """How the server is told; `redundant`, `gpus` and `path` are filled in."""


PLAN_FORMATS: dict[str, PlanFormat] = {
    "sglang-plan": PlanFormat(
        summary="SGLang: JSON for --init-expert-location",
        write=sglang_plan,
        check=check_sglang,
        hint="--init-expert-location {path} --ep-num-redundant-experts {redundant} --ep-size {gpus}",
    ),
    "vllm-plan": PlanFormat(
        summary="vLLM: an eplb_initial_mapping record, JSON lines",
        write=vllm_plan,
        check=check_vllm,
        hint="num_redundant_experts {redundant} in --eplb-config, {gpus} expert-parallel ranks",
    ),
    "tensorrt-plan": PlanFormat(
        summary="TensorRT-LLM: YAML of the MoE load balancer",
        write=tensorrt_plan,
        check=check_tensorrt,
        hint="moe_config: load_balancer: {path}, with --ep {gpus}",
    ),
    "deepseek-plan": PlanFormat(
        summary="DeepSeek EPLB: phy2log, log2phy, logcnt as JSON",
        write=deepseek_plan,
        check=check_deepseek,
        hint="{gpus} GPUs, {redundant} redundant experts",
    ),
}


def plan_text(plan: Plan, name: str) -> str:
    """The file of format `name`, checked by the rules of the system that loads it."""
    server = Server(experts=plan.experts, gpus=plan.gpus, num_layers=plan.num_layers, moe_layers=plan.moe_layers)
    text = PLAN_FORMATS[name].write(plan)
    PLAN_FORMATS[name].check(text, server)
    return text
