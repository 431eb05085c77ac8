"""Named policies: compositions of a placement, a predictor, a transfer rule and a dispatch. This is the one place where
a policy is registered; the command line derives its choices from it.

Adding one is one entry of `POLICIES`; docs/architecture.md says what the parts mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import PREDICTORS, Predictor, RouterSpec
from moesim.sim.dispatch import Split, even_split, exact_split
from moesim.sim.planner import contiguous, pack
from moesim.sim.policies.rules import Never, Periodic, Prefetch, Replicate, Rule, Target
from moesim.sim.residency import EMPTY, Cluster, Residency
from moesim.traces import InputError, LoadTable, TokenTable, total_load_LE

Placement = Callable[[Cluster, NDArray[np.int64]], NDArray[np.int32]]
"""(cluster, fitted load_LE) -> experts [L, G, layer_slots], EMPTY in the replica slots."""

Miss = Literal["wait", "cpu"]
NEVER = Never()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The parts of a policy, before it is fitted to a cluster and a recording."""

    summary: str
    placement: Placement
    predictor: str | None = None
    rule: Rule = NEVER
    split: Split = exact_split
    simulated_only: bool = False
    """True for bounds that no machine can reach, and for what the real executor does not have yet."""
    double_buffered: bool = False
    """Replicas of all layers share two buffers, see `Cluster`."""
    miss: Miss | None = None
    """What to do about an expert that is on no GPU: None where all are; wait for its copy, or run it on the host's CPU
    where that is faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A fitted policy: the same object decides in the simulator and on the device."""

    name: str
    cluster: Cluster
    recipe: Recipe
    predictor: Predictor | None
    placed_LGS: NDArray[np.int32]

    def start(self) -> Residency:
        """The residency before the first step."""
        residency = Residency(self.cluster)
        residency.place(self.placed_LGS)
        return residency


def contiguous_placement(cluster: Cluster, _load_LE: NDArray[np.int64]) -> NDArray[np.int32]:
    """Experts in order of their number, whatever their load."""
    one = contiguous(cluster.experts, cluster.gpus, cluster.layer_slots)
    return np.broadcast_to(one, (cluster.layers, *one.shape))


def balanced_placement(cluster: Cluster, load_LE: NDArray[np.int64]) -> NDArray[np.int32]:
    """Experts packed by the load of the fitted requests, each once."""
    placed = np.full((cluster.layers, cluster.gpus, cluster.layer_slots), EMPTY, np.int32)
    for layer, load_E in enumerate(load_LE):
        placed[layer, :, : cluster.home_slots] = pack(
            load_E.astype(float), np.arange(cluster.experts), cluster.gpus, cluster.home_slots
        )
    return placed


def resident_placement(cluster: Cluster, load_LE: NDArray[np.int64]) -> NDArray[np.int32]:
    """On each GPU those of its experts that had the largest load, as many as there are slots."""
    placed = np.full((cluster.layers, cluster.gpus, cluster.layer_slots), EMPTY, np.int32)
    home_E = np.array([cluster.home_gpu(expert) for expert in range(cluster.experts)])
    for layer, load_E in enumerate(load_LE):
        for gpu in range(cluster.gpus):
            mine = np.flatnonzero(home_E == gpu)
            hottest = mine[np.argsort(-load_E[mine], kind="stable")][: cluster.layer_slots]
            placed[layer, gpu, : len(hottest)] = hottest
    return placed


POLICIES: dict[str, Recipe] = {
    "contiguous": Recipe(
        summary="experts in order, no replicas: static expert parallelism", placement=contiguous_placement
    ),
    "balanced": Recipe(summary="experts packed by recorded load, no replicas", placement=balanced_placement),
    "eplb": Recipe(
        summary="every 8 steps replicate and pack by the last 16 steps' load, copies block (DeepSeek EPLB)",
        placement=balanced_placement,
        predictor="window",
        rule=Periodic(interval=8),
        split=even_split,
    ),
    "predictive-layer": Recipe(
        summary="replicate the next layer's hot experts, forecast from this layer's true routing",
        placement=balanced_placement,
        predictor="markov",
        rule=Replicate(next_batch=False),
    ),
    "predictive-buffered": Recipe(
        summary="predictive-layer in two buffers that all layers share, so that replicas take memory once (PROBE)",
        placement=balanced_placement,
        predictor="markov",
        rule=Replicate(next_batch=False),
        double_buffered=True,
        simulated_only=True,
    ),
    "predictive-batch": Recipe(
        summary="replicate the next batch's hot experts, forecast from queued tokens (arXiv 2605.11537, true router)",
        placement=balanced_placement,
        predictor="token-table",
        rule=Replicate(next_batch=True),
    ),
    "oracle-batch": Recipe(
        summary="predictive-batch with a perfect forecast; copies still take their time",
        placement=balanced_placement,
        predictor="oracle",
        rule=Replicate(next_batch=True),
    ),
    "oracle": Recipe(
        summary="perfect forecast and copies that cost nothing: what forecasting can gain, in the simulator only",
        placement=balanced_placement,
        predictor="oracle",
        rule=Replicate(next_batch=False, free=True),
        simulated_only=True,
    ),
    "on-demand": Recipe(
        summary="slots for some experts only, the rest in host memory: copied when needed, least recently used goes",
        placement=resident_placement,
        miss="wait",
        simulated_only=True,
    ),
    "on-demand-cpu": Recipe(
        summary="on-demand, but a missing expert runs on the CPU where that is faster than its copy (Fiddler)",
        placement=resident_placement,
        miss="cpu",
        simulated_only=True,
    ),
    "prefetch-layer": Recipe(
        summary="on-demand, and what the next layer is forecast to need is copied before it is asked for",
        placement=resident_placement,
        predictor="markov",
        rule=Prefetch(),
        miss="wait",
        simulated_only=True,
    ),
}


def offloading(names: Sequence[str] = ()) -> list[str]:
    """Those of `names` (all policies where there are none) that run with fewer slots than experts."""
    return [name for name in names or POLICIES if recipe(name).miss is not None]


def recipe(name: str) -> Recipe:
    """The registered recipe. Raises InputError listing the known names."""
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]


def needs_tokens(name: str) -> bool:
    """Whether the named policy must know what every token chose, so that a recording of loads is not enough."""
    predictor = recipe(name).predictor
    return predictor is not None and bool(PREDICTORS[predictor]().needs)


def make_policy(name: str, cluster: Cluster, fit_on: TokenTable | LoadTable) -> Policy:
    """Fit the named policy on recorded requests, which must not be the ones that it is run on.

    Raises InputError for an unknown name, an empty recording, or loads where the policy needs tokens.
    """
    parts = recipe(name)
    if cluster.resident is not None and parts.miss is None:
        raise InputError(
            f"policy {name} needs every expert on a GPU; with fewer resident slots use: {', '.join(offloading())}"
        )
    cluster = replace(cluster, double_buffered=parts.double_buffered)
    if len(fit_on) == 0:
        raise InputError("nothing to fit the policy on: the recording needs at least two requests")
    predictor = PREDICTORS[parts.predictor]() if parts.predictor else None
    if predictor is not None:
        predictor.fit(fit_on, RouterSpec(num_experts=cluster.experts, top_k=cluster.top_k))
    placed = parts.placement(cluster, total_load_LE(fit_on, cluster.experts))
    return Policy(name=name, cluster=cluster, recipe=parts, predictor=predictor, placed_LGS=placed)


__all__ = [
    "POLICIES",
    "Never",
    "Periodic",
    "Policy",
    "Prefetch",
    "Recipe",
    "Replicate",
    "Rule",
    "Target",
    "balanced_placement",
    "contiguous_placement",
    "make_policy",
    "needs_tokens",
    "offloading",
    "recipe",
]
