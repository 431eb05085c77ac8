"""A small random Switch model, its recording, and policies fitted to it, for tests of the offload executor."""

import copy
from functools import cache

import cases
import torch

from moesim.backend.offload import Offload
from moesim.sim.policies import POLICIES, Policy, Recipe, make_policy
from moesim.sim.residency import Cluster
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload

CPU = torch.device("cpu")
RESIDENT = 3


@cache
def tables():
    """Stack to what a recorder would have written."""
    model = cases.tiny_model()
    encoder, _ = cases.recorded(copy.deepcopy(model), False)
    decoder, _ = cases.recorded(copy.deepcopy(model), True)
    return {"encoder": encoder, "decoder": decoder}


def scenario_of(stack, resident=RESIDENT, batch=cases.BATCH_TOKENS):
    return make_scenario(
        cases.spec_of(cases.tiny_model()),
        tables()[stack],
        phase=Phase.ENCODER if stack == "encoder" else Phase.PREFILL,
        gpus=1,
        workload=Workload(batch=batch),
        extra_slots=0,
        resident=resident,
    )


def cluster_of(table, resident=RESIDENT):
    return Cluster(layers=table.num_layers, experts=cases.EXPERTS, gpus=1, extra_slots=0, top_k=1, resident=resident)


def fitted(name, stack, resident=RESIDENT):
    """A named policy, or one of a recipe, fitted to the whole recording of the stack."""
    table = tables()[stack]
    if isinstance(name, Recipe):
        POLICIES["under test"] = name
        try:
            return make_policy("under test", cluster_of(table, resident), table)
        finally:
            del POLICIES["under test"]
    return make_policy(name, cluster_of(table, resident), table)


def offloaded(dtype=torch.float64, **options):
    """(reference model, the same one offloaded, its two executors)."""
    model = cases.tiny_model().to(dtype)
    there = copy.deepcopy(model)
    return model, there, {stack: Offload(there, stack, CPU, **options) for stack in ("encoder", "decoder")}


def begin(offloads, policy, resident=RESIDENT, **options):
    for stack, offload in offloads.items():
        made = policy if isinstance(policy, Policy) else fitted(policy, stack, resident)
        offload.start(made, cheaper=lambda tokens: tokens <= 2, **options)


def finish(offloads):
    for offload in offloads.values():
        offload.finish()


def batch(seed=1):
    """Three texts for the encoder, one of them short, one so long that experts are full; and what the decoder reads."""
    rng = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(1, 96, (3, 60), generator=rng)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 15:] = mask_BS[2, 40:] = 0
    return {
        "input_ids": ids_BS,
        "attention_mask": mask_BS,
        "decoder_input_ids": torch.randint(1, 96, (3, 30), generator=rng),
    }
