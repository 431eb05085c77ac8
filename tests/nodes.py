"""A node with round numbers, a rule that does as it is told, and a recording that fits them: schedules by hand."""

from dataclasses import replace

import numpy as np

from helpers import make_spec, with_router_inputs
from moesim.predictors import PREDICTORS, RouterSpec
from moesim.sim.policies import Policy, Recipe, Target, contiguous_placement, is_trained, make_policy
from moesim.sim.profile import Attention, Cpu, Gpu, HardwareProfile, HostLink, Link, Links, Provenance
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, StackSpec, TokenTable, Workload, held_out

MS = 1e-3
P2P = Link(latency_s=0.5 * MS, bytes_per_s=1.024e6)
"""An expert of the test model (4096 bytes) takes 4.5 ms."""


def node(
    *,
    p2p=P2P,
    shared_by=1,
    hbm=1e18,
    gpus=8,
    decide_s=None,
    a2a=None,
    launch=0.25 * MS,
    memory=2**30,
    network=None,
    gpus_per_node=None,
    cpu_memory=2**30,
    storage=None,
):
    """2048 FLOPs (a token in an expert of the test model) a millisecond, a token's vector (64 bytes) a millisecond.
    The host computes a quarter as fast."""
    return HardwareProfile(
        name="test",
        provenance=Provenance(kind="spec-sheet", device="none", date="-"),
        gpus=gpus,
        gpu=Gpu(
            memory_bytes=memory,
            hbm_bytes_per_s=hbm,
            matmul_flops_per_s={"float32": 2.048e6},
            tile_rows=1,
            launch_s=launch,
            expert_s=0.0,
            attention=Attention(launch_s=0.0, efficiency=1.0),
        ),
        links=Links(
            p2p=p2p,
            host=HostLink(latency_s=0.5 * MS, bytes_per_s=1.024e6, shared_by=shared_by),
            all_to_all=a2a or Link(latency_s=1 * MS, bytes_per_s=64e3),
            network=network,
            storage=storage,
        ),
        gpus_per_node=gpus_per_node,
        cpu=Cpu(memory_bytes=cpu_memory, bytes_per_s=1e12, flops_per_s=0.512e6),
        decide_s=decide_s or {},
    )


class Scripted:
    """A rule that issues given transfers at given (step, point), whatever is forecast."""

    def __init__(self, moves):
        self.moves = moves
        self.at = None

    def targets(self, step, point, layers):
        self.at = (step, point)
        return [Target(layer=0)] if self.at in self.moves else ()

    def transfers(self, target, forecast, residency):
        return self.moves[self.at]


def scripted(scene, moves):
    parts = Recipe(summary="", placement=contiguous_placement, predictor="frequency", rule=Scripted(moves))
    made = make_policy("predictive-batch", scene.cluster, scene.fit)
    placed = contiguous_placement(scene.cluster, scene.fit)
    return Policy(
        name="scripted",
        cluster=scene.cluster,
        recipe=parts,
        predictor=made.predictor,
        placed_LGS=np.array(placed),
        popularity_LE=made.popularity_LE,
    )


def quick_policy(name, scene):
    """The named policy, fitted; Markov's forecasts stand in for a net's, whose training would take too long."""
    fitted = None
    if is_trained(name):
        fitted = PREDICTORS["markov"]()
        fitted.fit(scene.fit, RouterSpec(num_experts=scene.cluster.experts, top_k=scene.cluster.top_k))
    return make_policy(name, scene.cluster, scene.fit, scene.gates, fitted=fitted)


def decoding(table, resident, *, gpus=1, batch=1):
    """Decode steps of a recording of three layers, router inputs and gates made up, with so many slots a layer."""
    table, gates = with_router_inputs(table)
    decoder = make_spec(stacks=(StackSpec(name="decoder", num_layers=3, moe_layers=(0, 1, 2)),))
    return make_scenario(
        replace(decoder, top_k=table.topk_ids.shape[2]),
        table,
        phase=Phase.DECODE,
        gpus=gpus,
        workload=Workload(batch=batch),
        resident=resident,
        gates=gates,
    )


def two_layers(gpus=2, steps=1, extra_slots=1, phase=Phase.ENCODER):
    """As many experts as GPUs, a request of 4 tokens on each GPU. Layer 0: every token stays on its GPU; layer 1: all
    tokens go to expert 0."""
    executed = np.flatnonzero(held_out(np.arange(8 * gpus * steps, dtype=np.int32)))[: gpus * steps]
    requests = int(executed[-1]) + 1
    request = np.repeat(np.arange(requests, dtype=np.int32), 4)
    T = len(request)
    place = np.searchsorted(executed, request)  # of each executed request among the executed ones
    ids = np.zeros((T, 2, 1), np.uint8)
    ids[:, 0, 0] = place % gpus
    table = TokenTable(
        topk_ids=ids,
        topk_weights=np.ones((T, 2, 1), np.float16),
        dropped=np.zeros((T, 2), bool),
        token_id=np.zeros(T, np.int32),
        request=request,
        position=np.tile(np.arange(4), requests).astype(np.int32),
        step=np.zeros(T, np.int32),
        phase=np.full(T, phase, np.uint8),
    )
    spec = make_spec(2, gpus)
    return make_scenario(
        spec, table, phase=phase, gpus=gpus, workload=Workload(batch=4 * gpus), extra_slots=extra_slots
    )
