"""Turns the knobs of the generator until made-up routing has the statistics that were asked for.

One statistic a knob: max/mean of each layer (sigma), drift between windows (drift), accuracy of guessing the next layer
(coupling), adjacent-token overlap (repeat), distance between domains (shift). All are measured on a pilot as `moesim
trace stats` does, sampling noise included, and each knob is bisected in turn; since they touch each other, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.overlap import OverlapSummary
from moesim.traces.statistics import LoadSummary
from moesim.traces.synthetic import Knobs, Shape, domains_of_requests, generate
from moesim.traces.tokens import TokenTable, concat, load_LE

PILOT_WINDOWS, PILOT_TOKENS = 16, 1 << 14
BISECTIONS, ROUNDS = 8, 2
SIGMA_MOST = 6.0
TOLERANCE = 0.1
"""Relative deviation from a target above which it counts as not reached."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What the generator can be fitted to; means over windows. None: not asked for, or not measurable."""

    skew: tuple[float, ...]
    """[L] max / mean expert load."""
    drift: float | None = None
    """Share of the load that moves from one window to the next, mean of the layers; sampling noise included."""
    next_layer: float | None = None
    """Accuracy of guessing the next layer's first expert by the most frequent follower, mean of the layers."""
    adjacent: float | None = None
    """Share of a token's experts that the token before it chose, too, mean of the layers."""
    domain: float | None = None
    """Half the absolute difference between a domain's shares and those of all tokens, mean of domains and layers."""

    def to_dict(self) -> dict[str, float | None]:
        """Means, for tables and the manifest."""
        return {
            "max/mean": float(np.mean(self.skew)),
            "drift": self.drift,
            "next layer": self.next_layer,
            "adjacent": self.adjacent,
            "domain distance": self.domain,
        }


def measure(table: TokenTable, experts: int, window_tokens: int, domain_R: Sequence[int] | None = None) -> Statistics:
    """The statistics of recorded or made-up routing; `domain_R` is the domain of each request, None where all are of
    one. Raises InputError where the table is empty."""
    if not len(table):
        raise InputError("there are no tokens to measure")
    _, L, K = table.topk_ids.shape
    loads, between = LoadSummary(L, experts, K, window=window_tokens), OverlapSummary(L, experts)
    loads.add(table)
    between.add(table)
    layers = loads.finish()
    drifts = [layer.drift for layer in layers if layer.drift is not None]
    try:
        overlaps = between.finish(loads.total_LE)
    except InputError:
        overlaps = []  # no two tokens of a request are neighbours
    guessed = [o.next_layer for o in overlaps if o.next_layer is not None]
    return Statistics(
        skew=tuple(layer.max_over_mean for layer in layers),
        drift=_mean(drifts),
        next_layer=_mean(guessed),
        adjacent=_mean([o.adjacent_tokens for o in overlaps]),
        domain=None if domain_R is None else _domain_distance(table, experts, np.asarray(domain_R)),
    )


def fit(target: Statistics, shape: Shape, seed: int, progress: Callable[[int, int], None] | None = None) -> Knobs:
    """Knobs with which a pilot comes as close to `target` as the generator can.

    Raises InputError for a skew that K distinct experts cannot have.
    """
    most = shape.experts / shape.top_k
    if max(target.skew) > most or min(target.skew) < 1:
        raise InputError(
            f"a max/mean of {max(target.skew):g} cannot be: with {shape.experts} experts and top-{shape.top_k} it lies "
            f"between 1 and {most:g}"
        )
    pilot = _pilot_shape(shape)
    knobs = Knobs(sigma_L=(1.0,) * shape.layers)
    scalars = [
        (knob, goal)
        for knob, goal in (
            ("repeat", target.adjacent),
            ("coupling", target.next_layer),
            ("shift", target.domain if shape.domains > 1 else None),
            ("drift", target.drift),
        )
        if goal is not None
    ]
    total, done = ROUNDS * (1 + len(scalars)) * BISECTIONS, 0

    def found(tried: Knobs) -> Statistics:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)
        return _measured(pilot, tried, seed)

    for _ in range(ROUNDS):
        knobs = _fit_sigma(knobs, np.array(target.skew), found)
        for knob, goal in scalars:
            knobs = _fit_scalar(knobs, knob, goal, found)
    return knobs


def _fit_sigma(knobs: Knobs, goal_L: Floats, found: Callable[[Knobs], Statistics]) -> Knobs:
    """Bisect the spread of all layers at once: a layer's skew hardly depends on the other layers' spread."""
    low_L, high_L = np.zeros(len(goal_L)), np.full(len(goal_L), SIGMA_MOST)
    for _ in range(BISECTIONS):
        middle_L = (low_L + high_L) / 2
        less_L = np.array(found(replace(knobs, sigma_L=tuple(middle_L.tolist()))).skew) < goal_L
        low_L, high_L = np.where(less_L, middle_L, low_L), np.where(less_L, high_L, middle_L)
    return replace(knobs, sigma_L=tuple(((low_L + high_L) / 2).tolist()))


_STATISTIC = {"repeat": "adjacent", "coupling": "next_layer", "shift": "domain", "drift": "drift"}


def _fit_scalar(knobs: Knobs, knob: str, goal: float, found: Callable[[Knobs], Statistics]) -> Knobs:
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        value = getattr(found(_turned(knobs, knob, middle)), _STATISTIC[knob])
        low, high = (middle, high) if value is None or value < goal else (low, middle)
    # What even the smallest step overshoots is noise, or structure that comes with another knob: leave it at none.
    return _turned(knobs, knob, 0.0 if high == 0.5**BISECTIONS else (low + high) / 2)


def _turned(knobs: Knobs, knob: str, value: float) -> Knobs:
    changes: dict[str, Any] = {knob: value}
    return replace(knobs, **changes)


def _pilot_shape(shape: Shape) -> Shape:
    """As many requests as make enough windows, no more than there will be."""
    tokens = min(max(PILOT_WINDOWS * shape.window_tokens, 1 << 13), max(PILOT_TOKENS, 4 * shape.window_tokens))
    requests = min(max(-(-tokens // shape.request_tokens), shape.domains, 2), shape.requests)
    return replace(shape, requests=requests)


def _measured(shape: Shape, knobs: Knobs, seed: int) -> Statistics:
    domains = domains_of_requests(shape, seed).tolist() if shape.domains > 1 else None
    return measure(concat(list(generate(shape, knobs, seed))), shape.experts, shape.window_tokens, domains)


def _domain_distance(table: TokenTable, experts: int, domain_R: NDArray[np.integer]) -> float | None:
    domain_T = domain_R[table.request]
    found = [load_LE(table.topk_ids[domain_T == d], experts) for d in np.unique(domain_T)]
    share_DLE = np.stack([load / load.sum(axis=1, keepdims=True) for load in found])
    all_LE = np.sum(found, axis=0)
    share_LE = all_LE / all_LE.sum(axis=1, keepdims=True)
    return float(np.abs(share_DLE - share_LE).sum(axis=2).mean() / 2) if len(found) > 1 else None


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return float(np.mean(listed)) if listed else None


def not_reached(target: Statistics, reached: Statistics) -> list[str]:
    """Names of the statistics that miss their target by more than TOLERANCE."""
    wanted, got = target.to_dict(), reached.to_dict()
    return [
        name
        for name, goal in wanted.items()
        if goal is not None and (value := got[name]) is not None and abs(value - goal) > TOLERANCE * max(goal, 0.05)
    ]
