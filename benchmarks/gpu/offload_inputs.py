"""What the offload benchmark runs: scenarios of made-up routing, and policies to compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from offload_trace import switch_like

from moesim.sim.policies import POLICIES, Policy, Recipe, make_policy
from moesim.sim.policies.prefetching import PrefetchDeeper, PrefetchSequence
from moesim.sim.residency import Cluster
from moesim.sim.scenario import Scenario
from moesim.traces import Phase, Workload
from moesim.traces.workload import batches

ON_DEMAND = POLICIES["on-demand"]
GATES = replace(
    ON_DEMAND,
    predictor="stacked-gate",
    rule=PrefetchDeeper(depth=3, least=0.3),
    eviction="next-use",
    summary="what later gates say of the inputs so far, the nearest layer that lacks something",
)
RECIPES: dict[str, Recipe] = {
    "lru": ON_DEMAND,
    "next-use": replace(ON_DEMAND, eviction="next-use", summary="evict by the fitted frequency and distance"),
    "prefetch-gates": GATES,
    "prefetch-sure": replace(
        GATES,
        rule=PrefetchDeeper(depth=3, least=0.7),
        summary="the same, likely experts only: where slots are few a wrong copy costs a right one",
    ),
    "prefetch-tokens": replace(
        ON_DEMAND,
        predictor="token-table",
        rule=PrefetchSequence(least=0.4),
        eviction="lfu",
        summary="at the step's start, what its token ids make likely in all layers; LFU",
    ),
    "oracle": POLICIES["oracle-prefetch"],
    "belady": POLICIES["belady"],
    "resident": POLICIES["contiguous"],
}
"""By the name in the report. All compute what the router chose; oracle and belady are shown the future."""


def scenario_of(
    spec: Any, phase: Phase, batch: int, *, requests: int, length: int, fit_requests: int, seed: int
) -> Scenario:
    """Steps of `batch` tokens (decode: requests) of made-up routing, fitted on other requests of the same model."""
    stack = spec.stack("encoder" if phase is Phase.ENCODER else "decoder")
    layers, experts = len(stack.moe_layers), spec.num_experts
    sizes = {"layers": layers, "experts": experts, "phase": phase}
    run = switch_like(requests, length, seed=seed, **sizes)
    workload = Workload(batch=batch)
    steps = [one for one in batches(run, workload, phase) if len(one.tokens) == batch]
    return Scenario(
        spec=spec,
        phase=phase,
        cluster=Cluster(layers=layers, experts=experts, gpus=1, extra_slots=0, top_k=1),
        workload=workload,
        fit=switch_like(fit_requests, length, seed=seed + 1000, **sizes),
        run=run,
        batches=tuple(steps),
    )


def policy_of(name: str, scenario: Scenario, resident: int | None) -> Policy:
    """The recipe `name` fitted to the scenario, with so many slots a layer. A predictor is fitted once a scenario:
    none of these learns while it is used."""
    recipe = RECIPES[name]
    cluster = replace(scenario.cluster, resident=resident if recipe.miss else None)
    registered, key = f"bench-{name}", (id(scenario.fit), recipe.predictor)
    POLICIES[registered] = recipe
    try:
        made = make_policy(registered, cluster, scenario.fit, fitted=_FITTED.get(key, (None, None))[0])
    finally:
        del POLICIES[registered]
    _FITTED[key] = (made.predictor, scenario.fit)  # the recording is kept, or its id could be another's
    return replace(made, name=name)


_FITTED: dict[tuple[int, str | None], tuple[Any, Any]] = {}
