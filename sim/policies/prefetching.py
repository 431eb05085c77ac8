"""Prefetch rules, for slots that the host's memory backs: which experts should be on their GPU before their layer has
routed. A rule names experts, the cache (offload.py) finds their slots. It sees forecasts, never the truth.

Decision points are those of rules.py. Shape letters: T tokens, K experts per token, E experts, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.predictors import Forecast
from moesim.sim.policies.rules import Target
from moesim.sim.residency import Cluster
from moesim.traces.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """After layer l has routed, what the next `depth` layers are forecast to need, the nearest first.

    By forecast load, as many experts as are expected to be needed (a token alone brings its K likeliest) and have slots
    for the layer on their GPU. Source: the rule that offloading systems share (Pre-gated
    MoE, arXiv 2308.12066; MoE-Infinity, arXiv 2401.14361).
    """

    depth: int = 1
    least: float = 0.0
    """Forecast tokens below which an expert is not worth a copy: of a single token, the chance that it is chosen."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise InputError(f"depth must be at least 1, got {self.depth}")

    def targets(self, step: int, point: int, layers: int) -> Sequence[Target]:
        """The next layers of the running step."""
        return [Target(layer=layer) for layer in range(point, min(point + self.depth, layers))]

    def experts(self, target: Target, forecast: Forecast, cluster: Cluster) -> list[int]:
        """Those that should be on their GPU when the target routes, the most wanted first."""
        return likeliest(forecast, cluster, self.least)

    def enough(self, moves: int) -> bool:
        """Whether, after so many copies for one target, later targets of the decision are left alone."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchDeeper(Prefetch):
    """As `Prefetch`, but for one layer at a time: the next that lacks something, at most `depth` layers ahead. Where
    the nearest layers have all that is forecast for them, the link works for later ones. Source: HOBBIT (arXiv
    2411.01433), stacked gating: deeper while the predicted experts are cached."""

    depth: int = 4

    def enough(self, moves: int) -> bool:
        """After the first layer that lacked something."""
        return moves > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchOver(Prefetch):
    """As `Prefetch`, but more experts than a token has: those above a percentile of each token's chances, so 75 brings
    a quarter of the experts. Source: Fate (arXiv 2502.12224), over-fetching. Deviation: at most as many experts of a
    token as its forecast names, where it names any."""

    percentile: float = 75.0

    def __post_init__(self) -> None:
        Prefetch.__post_init__(self)
        if not 0 <= self.percentile < 100:
            raise InputError(f"percentile must lie in 0 .. 100, got {self.percentile}")

    def experts(self, target: Target, forecast: Forecast, cluster: Cluster) -> list[int]:
        """Likeliest first."""
        each = max(round(cluster.experts * (1 - self.percentile / 100)), cluster.top_k)
        if forecast.inclusion is None:
            return likeliest(forecast, cluster, self.least, each)
        if forecast.topk is not None:
            each = min(each, max(forecast.topk.shape[1], cluster.top_k))
        top_TX = np.argsort(-forecast.inclusion, axis=1, kind="stable")[:, :each]
        named_E = np.zeros(cluster.experts, np.bool_)
        named_E[top_TX] = True
        return [e for e in likeliest(forecast, cluster, self.least, int(named_E.sum())) if named_E[e]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchDraft(Prefetch):
    """Once a step, after layer `after` has routed, for all layers up to a cutoff: the largest number of layers l with
    l * K * copy_s <= draft_s and l * K experts in a GPU's slots.

    Source: SP-MoE (arXiv 2510.10302), whose draft model runs `draft_s` before the target does and whose copy of an
    expert takes `copy_s`; both are measured there and parameters here, in seconds.
    """

    draft_s: float = 0.02
    copy_s: float = 0.0005
    after: int = 0

    def __post_init__(self) -> None:
        Prefetch.__post_init__(self)
        if not 0 <= self.draft_s < math.inf:
            raise InputError(f"draft_s must be a finite time that is not negative, got {self.draft_s}")
        if not 0 < self.copy_s < math.inf:
            raise InputError(f"copy_s must be a finite time above 0, got {self.copy_s}")
        if self.after < 0:
            raise InputError(f"after must be a layer, 0 or more, got {self.after}")

    def targets(self, step: int, point: int, layers: int) -> Sequence[Target]:
        """All later layers at one point; `experts` names none beyond the cutoff."""
        return [Target(layer=layer) for layer in range(point, layers)] if point == self.after + 1 else ()

    def cutoff(self, cluster: Cluster) -> int:
        """Layers for which experts are copied ahead."""
        in_time = int(self.draft_s / self.copy_s * (1 + 1e-12)) // cluster.top_k
        return min(in_time, cluster.gpu_slots // cluster.top_k, cluster.layers)

    def experts(self, target: Target, forecast: Forecast, cluster: Cluster) -> list[int]:
        """None beyond the cutoff."""
        return likeliest(forecast, cluster, self.least) if target.layer - self.after <= self.cutoff(cluster) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchSequence(Prefetch):
    """After every layer, what all layers that are left are forecast to need; on the link nearer layers go first, then
    likelier experts. Source: MoE-Infinity (arXiv 2401.14361). Deviation: there chance and nearness are multiplied."""

    depth: int = 1 << 16


def likeliest(forecast: Forecast, cluster: Cluster, least: float = 0.0, most: int | None = None) -> list[int]:
    """The experts with a forecast load of at least `least`, the largest first: at most `most`, or as many as are
    expected to be needed, and of no GPU more than it has slots for the layer."""
    load_E = forecast.load
    most = max(round(expected_needs(forecast)), 1) if most is None else most
    room_G = np.full(cluster.gpus, cluster.gpu_slots if cluster.pooled else cluster.layer_slots)
    found: list[int] = []
    for expert in np.argsort(-load_E, kind="stable").tolist():
        if load_E[expert] <= 0 or load_E[expert] < least or len(found) == most:
            break
        gpu = cluster.home_gpu(expert)
        if room_G[gpu]:
            room_G[gpu] -= 1
            found.append(expert)
    return found


def expected_needs(forecast: Forecast) -> float:
    """Distinct experts that are expected to have tokens, tokens taken as independent: K where there is one token. Where
    nothing is said of single tokens, at most: each expert counts with its load, up to 1."""
    if forecast.inclusion is None:
        return float(np.minimum(forecast.load, 1).sum())
    return float((1 - np.prod(1 - np.minimum(forecast.inclusion, 1), axis=0, dtype=np.float64)).sum())
