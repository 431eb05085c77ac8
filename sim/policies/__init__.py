"""Policies: compositions of a placement, a predictor, a transfer rule and a dispatch
(recipe.py), named ones (systems.py) and a user's own (files.py); fitted here to a cluster and a recording.
docs/architecture.md says what the parts mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import PREDICTORS, Learned, Predictor, RouterSpec, missing
from moesim.predictors.base import WITHOUT
from moesim.sim.eviction import POOLED
from moesim.sim.policies.files import is_own, own_recipe, recipe_digest
from moesim.sim.policies.placements import OF_TOKENS, balanced_placement, contiguous_placement
from moesim.sim.policies.prefetching import (
    Prefetch,
    PrefetchDeeper,
    PrefetchDraft,
    PrefetchOver,
    PrefetchSequence,
)
from moesim.sim.policies.recipe import Recipe
from moesim.sim.policies.rules import Never, Target
from moesim.sim.policies.systems import POLICIES
from moesim.sim.residency import Cluster, Residency
from moesim.traces import InputError, LoadTable, TokenTable, total_load_LE
from moesim.traces.gates import Gates


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A fitted policy: the same object decides in the simulator and on the device."""

    name: str
    cluster: Cluster
    recipe: Recipe
    predictor: Predictor | None
    placed_LGS: NDArray[np.int32]
    popularity_LE: NDArray[np.int64]
    """[L, E] tokens of each expert in the fitted requests."""

    def start(self) -> Residency:
        """The residency before the first step."""
        residency = Residency(self.cluster)
        residency.place(self.placed_LGS)
        code_LE1 = self.recipe.precision.placed_LE(self.popularity_LE)[:, :, None]
        residency.precision_LEG[:] = np.where(residency.usable_LEG, code_LE1, 0)
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
    parts = recipe(name)
    if parts.placement in OF_TOKENS or parts.precision.needs_weights:
        return True
    return parts.predictor is not None and bool(PREDICTORS[parts.predictor]().needs)


def unfit(name: str, fit_on: TokenTable | LoadTable, router: RouterSpec) -> str | None:
    """Why the named policy cannot be fitted on a recording, in words that follow its name; None where it can."""
    parts = recipe(name)
    if parts.predictor is not None:
        lacks = missing(PREDICTORS[parts.predictor](), fit_on, router)
        if lacks is not None:
            return WITHOUT[lacks]
    if parts.precision.needs_weights and router.top_k > 1 and not _has_weights(fit_on):
        return WITHOUT["weights"]
    return WITHOUT["tokens"] if isinstance(fit_on, LoadTable) and needs_tokens(name) else None


def is_trained(name: str) -> bool:
    """Whether the named policy's predictor is a net, whose training takes minutes on a large recording."""
    return isinstance(PREDICTORS.get(recipe(name).predictor or ""), Learned)


def check_slots(name: str, resident: int | None) -> None:
    """Raise InputError where the named policy needs every expert on a GPU and there are `resident` slots only."""
    if resident is not None and recipe(name).miss is None:
        raise InputError(
            f"policy {name} needs every expert on a GPU; with fewer resident slots use: {', '.join(offloading())}"
        )


def default_baseline(resident: int | None) -> str:
    """What speedups refer to where nobody says: contiguous, or on-demand where not all experts fit."""
    return "contiguous" if resident is None else "on-demand"


def make_policy(
    name: str,
    cluster: Cluster,
    fit_on: TokenTable | LoadTable,
    gates: Gates | None = None,
    *,
    fitted: Predictor | None = None,
) -> Policy:
    """Fit the named policy on recorded requests, which must not be the ones that it is run on.

    `gates`: those of the recorded model, for predictors that look through them. `fitted`: its predictor, where it has
    been fitted on the same requests already (a forecast does not depend on the GPUs). Raises InputError for an unknown
    name, an empty recording, or one that lacks what the predictor needs.
    """
    parts = recipe(name)
    check_slots(name, cluster.resident)
    cluster = replace(cluster, double_buffered=parts.double_buffered, pooled=parts.pooled)
    if len(fit_on) == 0:
        raise InputError("nothing to fit the policy on: the recording needs at least two requests")
    _check_parts(name, parts, cluster, fit_on)
    predictor = fitted
    if predictor is None and parts.predictor:
        predictor = PREDICTORS[parts.predictor]()
        predictor.fit(fit_on, RouterSpec(num_experts=cluster.experts, top_k=cluster.top_k, gates=gates))
    placed = parts.placement(cluster, fit_on)
    return Policy(
        name=name,
        cluster=cluster,
        recipe=parts,
        predictor=predictor,
        placed_LGS=placed,
        popularity_LE=total_load_LE(fit_on, cluster.experts),
    )


def decides_like(policy: Policy, timed: Iterable[str]) -> str | None:
    """The one of the policies `timed` whose decisions take as long as this policy's: itself, or the first named one
    that differs in nothing that a decision has to work out (an own or tuned policy has a name that nobody has timed).
    An eviction of the same kind is preferred. None where there is none."""
    known = [name for name in timed if name in POLICIES or name == policy.name]
    if policy.name in known:
        return policy.name
    mine = policy.recipe

    def alike(name: str) -> bool:
        other = POLICIES[name]
        same = (other.predictor, type(other.rule), other.split, other.routing, other.miss is None)
        return same == (mine.predictor, type(mine.rule), mine.split, mine.routing, mine.miss is None)

    found = [name for name in known if alike(name)]
    closer = [name for name in found if POLICIES[name].eviction == mine.eviction]
    return next(iter([*closer, *found]), None)


def _check_parts(name: str, parts: Recipe, cluster: Cluster, fit_on: TokenTable | LoadTable) -> None:
    """Raise InputError where parts do not go together, or ask for gate weights that were not recorded."""
    if isinstance(parts.rule, Prefetch) and parts.miss is None:
        raise InputError(f"policy {name} prefetches and does not say what to do about what is missing: give it a miss")
    if isinstance(parts.rule, Prefetch) and parts.predictor is None:
        raise InputError(f"policy {name} prefetches what is forecast: give it a predictor")
    if parts.eviction in POOLED and not parts.pooled:
        raise InputError(f"policy {name}: eviction {parts.eviction} is for slots that all layers share: pooled = true")
    if parts.pooled and parts.miss is None:
        raise InputError(f"policy {name}: layers share slots only where the host backs them: give it a miss")
    if parts.precision.needs_weights and cluster.top_k > 1 and not _has_weights(fit_on):
        raise InputError(
            f"policy {name} weighs experts by their gate weights, and this recording has none: record it with them, or "
            "use a policy without, such as hobbit-exact"
        )


def _has_weights(table: TokenTable | LoadTable) -> bool:
    return isinstance(table, TokenTable) and table.topk_weights is not None


__all__ = [
    "POLICIES",
    "Never",
    "Policy",
    "Prefetch",
    "PrefetchDeeper",
    "PrefetchDraft",
    "PrefetchOver",
    "PrefetchSequence",
    "Recipe",
    "Target",
    "balanced_placement",
    "check_slots",
    "contiguous_placement",
    "decides_like",
    "default_baseline",
    "is_trained",
    "make_policy",
    "needs_tokens",
    "offloading",
    "recipe",
    "recipe_digest",
    "unfit",
]
