"""Policies: compositions of a placement, a predictor, a transfer rule and a dispatch
(recipe.py), named ones (systems.py) and a user's own (files.py); fitted here to a cluster and a recording.
docs/architecture.md says what the parts mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import PREDICTORS, Predictor, RouterSpec
from moesim.sim.policies.files import is_own, own_recipe
from moesim.sim.policies.placements import PLACEMENTS, balanced_placement, contiguous_placement
from moesim.sim.policies.recipe import Recipe
from moesim.sim.policies.rules import Never, Periodic, Prefetch, Replicate, Rule, Target
from moesim.sim.policies.systems import POLICIES
from moesim.sim.residency import Cluster, Residency
from moesim.traces import InputError, LoadTable, TokenTable
from moesim.traces.gates import Gates


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


def offloading(names: Sequence[str] = ()) -> list[str]:
    """Those of `names` (all policies where there are none) that run with fewer slots than experts."""
    return [name for name in names or POLICIES if recipe(name).miss is not None]


def recipe(name: str) -> Recipe:
    """The registered recipe of that name, or a user's own: a TOML file, or `package.module:factory`.

    Raises InputError listing the known names, or saying what is wrong in which line of the file.
    """
    if name in POLICIES:
        return POLICIES[name]
    if is_own(name):
        return own_recipe(name)
    raise InputError(
        f"unknown policy {name!r}; known: {', '.join(POLICIES)}; or a file such as my.toml, or package.module:factory"
    )


def needs_tokens(name: str) -> bool:
    """Whether the named policy must know what every token chose, so that a recording of loads is not enough."""
    predictor = recipe(name).predictor
    return predictor is not None and bool(PREDICTORS[predictor]().needs)


def make_policy(name: str, cluster: Cluster, fit_on: TokenTable | LoadTable, gates: Gates | None = None) -> Policy:
    """Fit the named policy on recorded requests, which must not be the ones that it is run on.

    `gates`: those of the recorded model, for predictors that look through them. Raises InputError for an unknown name,
    an empty recording, or one that lacks what the predictor needs.
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
        predictor.fit(fit_on, RouterSpec(num_experts=cluster.experts, top_k=cluster.top_k, gates=gates))
    placed = parts.placement(cluster, fit_on)
    return Policy(name=name, cluster=cluster, recipe=parts, predictor=predictor, placed_LGS=placed)


__all__ = [
    "PLACEMENTS",
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
