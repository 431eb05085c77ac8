"""When expert replicas pay: speedup over tokens a step, simulated and from the cost model; regimes.py writes it down.

Compared are `oracle` (perfect replicas, free copies) and `balanced` (the same home placement without replicas), so that
nothing but the replicas differs. Routing is made up, every token has one expert. Letters: E experts, G GPUs, h = E / G
experts at home on a GPU, r replica slots a GPU, T tokens a step, p_e the share of the tokens that expert e gets.

Where the speedup of the expert phase passes 1, derived from `cost.expert_seconds`: a layer lasts as long as its slowest
GPU, launch + max(distinct x weights / HBM, tiled rows x FLOPs a row / rate). Dividing by the FLOPs time of a row,

    ridge = (weights / HBM) / (FLOPs a row / rate)    rows that take as long as reading an expert once
    time  = launch + max(ridge x distinct, rows)      in rows; the launch is paid either way

Mean field: expert e has n = T p_e tokens. It is read with probability d(n) = 1 - exp(-n), and its tokens rounded up to
whole tiles are rows(n) = max(tile d, n + tile d / 2), half a tile being lost on average. D is the sum of d over a GPU.

    balanced(T) = max over GPUs of max(ridge D, sum of rows(T p_e))
    oracle(T)   = max(u (D + r), T / G + (D + r) tile / 2)    with u = max(ridge, tile)

The oracle's slowest GPU reads r experts more, each of which is at least one tile; else its tokens are level. The mean
field's crossover is the last T at which the sums of both over the layers are equal. In closed form: let every expert be
read (D = h) and one hot expert with share p set the pace, the others of its GPU being one tile each. Then

    T p + tile / 2 + (h - 1) tile = (h + r) u    so    T = ((h + r) u - (h - 1/2) tile) / p

It falls as the HBM rate rises, until ridge = tile, and then stays; falls as skew (p) rises; rises with E (h rises, and
p falls). Left out by the mean field: the spread of the loads around their means, replicas that fill less than a tile,
and how far a greedy planner is from perfectly level. The closed form moreover takes the mean of p over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from rich.console import Console
from rich.progress import Progress

from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.policies import make_policy
from moesim.sim.profile import HardwareProfile, load_profile
from moesim.sim.scenario import Scenario, make_scenario
from moesim.traces import ModelSpec, Phase, TokenTable, Workload, concat
from moesim.traces.synthetic import Knobs, Shape, generate, synthetic_spec

PROFILE, WIDTHS, DTYPE, GPUS = "8xH100-NVLink", "switch-base", "bfloat16", 8
REQUEST_TOKENS = 2
"""So short that even the smallest step keeps all ranks busy; attention over long contexts is not the subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is varied; the defaults are the base case."""

    hbm: float = 1.0
    """Factor on the profile's HBM bandwidth."""
    sigma: float = 1.5
    """Spread of the experts' log popularity."""
    experts: int = 64
    extra: int = 1

    def name(self) -> str:
        """For the table."""
        changed = {
            f"HBM x{self.hbm:g}": self.hbm != 1,
            f"sigma {self.sigma:g}": self.sigma != 1.5,
            f"E = {self.experts}": self.experts != 64,
            f"{self.extra} extra slots": self.extra != 1,
        }
        return ", ".join(text for text, is_changed in changed.items() if is_changed) or "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is simulated."""

    sweep: tuple[int, ...]
    """Tokens a step."""
    bisections: int
    """Further points between the two where the speedup passes 1."""
    layers: int
    """Each has a popularity of its own, of the same spread."""
    most_steps: int


FULL = Size(sweep=tuple(2**i for i in range(4, 16)), bisections=3, layers=8, most_steps=24)
QUICK = Size(sweep=(256, 4096), bisections=0, layers=1, most_steps=2)
PANELS: dict[str, tuple[Case, ...]] = {
    "HBM bandwidth": tuple(Case(hbm=f) for f in (0.25, 1.0, 2.0, 4.0)),
    "skew": tuple(Case(sigma=s) for s in (0.5, 1.0, 1.5, 2.0)),
    "number of experts": tuple(Case(experts=e) for e in (32, 64, 128, 256)),
}
OTHERS = (Case(extra=2),)
LABELS: dict[str, Callable[[Case], str]] = {
    "HBM bandwidth": lambda case: f"x{case.hbm:g}",
    "skew": lambda case: f"sigma {case.sigma:g}",
    "number of experts": lambda case: f"E = {case.experts}",
}
Point = tuple[float, float]
"""Speedup of the expert phase, and of the whole step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found for a case. Crossovers are tokens a step, None where there is none in the sweep."""

    case: Case
    points: dict[int, Point]
    hottest: float
    """Share of the hottest expert, mean over the layers."""
    experts: float | None
    step: float | None
    falling: float | None
    """Where the expert phase's speedup falls below 1 from above, at few tokens."""
    mean_field: float | None
    closed: float

    def lowest(self) -> tuple[float, int]:
        """The lowest speedup of the expert phase, and at how many tokens."""
        return min((speedup, tokens) for tokens, (speedup, _) in self.points.items())


def shape_of(experts: int, size: Size) -> Shape:
    """Enough tokens for two of the largest steps to fit on and two to run."""
    return Shape(
        experts=experts,
        layers=size.layers,
        top_k=1,
        requests=4 * max(size.sweep) // REQUEST_TOKENS,
        request_tokens=REQUEST_TOKENS,
        window_tokens=1 << 14,
    )


def spec_of(experts: int, size: Size) -> ModelSpec:
    return synthetic_spec(shape_of(experts, size)).with_widths(WIDTHS)


@lru_cache(maxsize=2)
def recording(experts: int, sigma: float, size: Size) -> TokenTable:
    """Made-up routing; the same popularity, but for its spread, at every sigma."""
    return concat(list(generate(shape_of(experts, size), Knobs(sigma_L=(sigma,) * size.layers), 0)))


def node_of(case: Case) -> HardwareProfile:
    node = load_profile(PROFILE)
    return replace(node, gpu=replace(node.gpu, hbm_bytes_per_s=node.gpu.hbm_bytes_per_s * case.hbm))


def scene_of(case: Case, tokens: int, size: Size) -> Scenario:
    return make_scenario(
        spec_of(case.experts, size),
        recording(case.experts, case.sigma, size),
        phase=Phase.PREFILL,
        gpus=GPUS,
        workload=Workload(batch=tokens, split="alternate"),
        extra_slots=case.extra,
        # Few tokens need many steps until their speedup is smooth.
        max_steps=max(2, min(size.most_steps, 8192 // tokens)),
    )


def speedup(case: Case, tokens: int, size: Size) -> Point:
    """Time of `balanced` over time of `oracle`, simulated."""
    scene, node = scene_of(case, tokens, size), node_of(case)
    plain, replicated = (
        simulate(
            scene, make_policy(name, scene.cluster, scene.fit), node, execution=Execution(dtype=DTYPE), keep_steps=False
        )
        for name in ("balanced", "oracle")
    )
    return plain.phase_s()["experts"] / replicated.phase_s()["experts"], plain.total_s / replicated.total_s


def passes(at: dict[int, float], *, rising: bool = True) -> tuple[int, int] | None:
    """The last two neighbours between which the speedup passes 1 upwards, or the first where it does so downwards."""
    pairs = list(zip(sorted(at), sorted(at)[1:], strict=False))
    if rising:
        found = [(a, b) for a, b in pairs if at[a] <= 1 < at[b]]
        return found[-1] if found else None
    return next(((a, b) for a, b in pairs if at[a] > 1 >= at[b]), None)


def crossover(at: dict[int, float], *, rising: bool = True) -> float | None:
    """Tokens at which the speedup is 1, interpolated in the logarithm of the tokens."""
    pair = passes(at, rising=rising)
    if pair is None:
        return None
    a, b = pair
    return float(a * (b / a) ** ((1 - at[a]) / (at[b] - at[a])))


def ridge_rows(case: Case) -> tuple[float, int]:
    """(rows whose FLOPs take as long as reading an expert once, rows of a tile)."""
    gpu, spec = node_of(case).gpu, spec_of(case.experts, QUICK)
    read, compute = spec.expert_bytes(DTYPE) / gpu.hbm_rate, 2 * spec.expert_params() / gpu.matmul_rate(DTYPE)
    return read / compute, gpu.tile_rows


def closed_form(case: Case, hottest: float) -> float:
    """The module docstring's T for a hot expert with the share `hottest`."""
    ridge, tile = ridge_rows(case)
    home = -(-case.experts // GPUS)
    return ((home + case.extra) * max(ridge, tile) - (home - 0.5) * tile) / hottest


def shares(scene: Scenario) -> np.ndarray:
    """[L, E] share of the executed tokens that each expert gets."""
    layers, experts = scene.cluster.layers, scene.cluster.experts
    return np.stack([np.bincount(scene.run.topk_ids[:, i, 0], minlength=experts) for i in range(layers)]) / len(
        scene.run
    )


def mean_field(case: Case, scene: Scenario) -> float | None:
    """The module docstring's crossover of the sums over the layers, on a fine grid of T."""
    ridge, tile = ridge_rows(case)
    placed_LGS = make_policy("balanced", scene.cluster, scene.fit).placed_LGS
    share_LGS = np.take_along_axis(shares(scene)[:, None, :], np.maximum(placed_LGS, 0), axis=2) * (placed_LGS >= 0)
    at = {}
    for tokens in np.unique(np.geomspace(256, 1 << 17, 400).astype(int)).tolist():
        n_LGS = tokens * share_LGS
        d_LGS = 1 - np.exp(-n_LGS)
        rows_LG = np.maximum(tile * d_LGS, n_LGS + tile * d_LGS / 2).sum(axis=2)
        distinct_LG = d_LGS.sum(axis=2)
        balanced_L = np.maximum(ridge * distinct_LG, rows_LG).max(axis=1)
        most_L = distinct_LG.max(axis=1) + case.extra
        oracle_L = np.maximum(max(ridge, tile) * most_L, tokens / GPUS + most_L * tile / 2)
        at[tokens] = float(balanced_L.sum() / oracle_L.sum())
    return crossover(at)


def examine(case: Case, size: Size, done: Callable[[], None] = lambda: None) -> Row:
    """Sweep, refine where the speedup passes 1, and set the formulas beside it."""
    points = {}
    for tokens in size.sweep:
        points[tokens] = speedup(case, tokens, size)
        done()
    for _ in range(size.bisections):
        if pair := passes({t: p[0] for t, p in points.items()}):
            middle = 2 * round(math.sqrt(pair[0] * pair[1]) / 2)
            points[middle] = speedup(case, middle, size)
        done()
    experts, step = ({t: p[i] for t, p in points.items()} for i in (0, 1))
    scene = scene_of(case, max(size.sweep), size)
    hottest = float(shares(scene).max(axis=1).mean())
    return Row(
        case=case,
        points=dict(sorted(points.items())),
        hottest=hottest,
        experts=crossover(experts),
        step=crossover(step),
        falling=crossover(experts, rising=False),
        mean_field=mean_field(case, scene),
        closed=closed_form(case, hottest),
    )


def examine_all(size: Size) -> dict[Case, Row]:
    """Every case once, with a progress bar on stderr."""
    cases = list(dict.fromkeys([Case(), *(c for panel in PANELS.values() for c in panel), *OTHERS]))
    rows = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("simulating", total=len(cases) * (len(size.sweep) + size.bisections))
        for case in sorted(cases, key=lambda c: (c.experts, c.sigma)):  # one recording after the other
            progress.update(task, description=case.name())
            rows[case] = examine(case, size, lambda: progress.advance(task))
    return {case: rows[case] for case in cases}
