"""The planner beside a plain numpy version of the published EPLB, and what each part of a decision takes.

python benchmarks/planner.py [--out FILE.json]

A decision stands on the critical path of a layer, whose experts run for some 100 us on a fast GPU, so the times bound
what a policy may cost. Compilation is not in them. Everything is timed once a turn; quote the ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
from scipy.optimize import linprog

from moesim.sim.dispatch import exact_split, send_matrix
from moesim.sim.planner import busiest_L, contiguous, held, plan, replicas

LAYERS, EXPERTS, GPUS, SLOTS = 58, 256, 32, 9
POWER = 0.8
TURNS = 15
LP_CASES = 200
SHAPES = [("switch-base-128, 8 GPUs", 128, 8), ("deepseek-v3, 32 GPUs", 256, 32), ("switch-mini, 2 ranks", 32, 2)]


def published_eplb(load_E, gpus, slots):
    """The flat algorithm as its description has it: replicate the expert with the largest load per replica until all
    slots are used, then pack the replicas, heaviest first, onto the lightest GPU with a free slot. Nothing keeps two
    replicas of an expert from the same GPU."""
    copies_E = np.ones(len(load_E), np.int64)
    for _ in range(gpus * slots - len(load_E)):
        copies_E[np.argmax(load_E / copies_E)] += 1
    expert_X = np.repeat(np.arange(len(load_E)), copies_E)
    part_X = (load_E / copies_E)[expert_X]
    placed, used, load_G = np.full((gpus, slots), -1), np.zeros(gpus, int), np.zeros(gpus)
    for x in np.argsort(-part_X, kind="stable"):
        gpu = int(np.argmin(np.where(used < slots, load_G, np.inf)))
        placed[gpu, used[gpu]] = expert_X[x]
        used[gpu] += 1
        load_G[gpu] += part_X[x]
    return placed


def even_balance(load_LE, placed_LGS):
    """Mean over layers of mean / max of the GPU loads, every replica taking an equal part."""
    found = []
    for load_E, placed_GS in zip(load_LE, placed_LGS, strict=True):
        part_E = load_E / np.bincount(placed_GS[placed_GS >= 0], minlength=len(load_E))
        load_G = np.where(placed_GS >= 0, part_E[placed_GS], 0).sum(axis=1)
        found.append(load_G.mean() / load_G.max())
    return float(np.mean(found))


def duplicates(placed_LGS):
    """Slots that hold an expert which another slot of the same GPU holds, too."""
    return sum(len(row) - len(set(row)) for placed_GS in placed_LGS.tolist() for row in placed_GS)


def zipf(rng, layers, experts):
    share = 1 / np.arange(1, experts + 1) ** POWER
    return np.stack([rng.permutation(share / share.sum()) for _ in range(layers)])


def turns(functions, count=TURNS):
    """Name to seconds of each turn; every function once a turn, after one that is not counted."""
    seconds = {name: [] for name in functions}
    for turn in range(count + 1):
        for name, function in functions.items():
            begin = perf_counter()
            function()
            if turn:
                seconds[name].append(perf_counter() - begin)
    return seconds


def layouts(rng):
    """Both planners on the same loads, in the same turns; and few copies after the loads of a quarter have changed."""
    load = zipf(rng, LAYERS, EXPERTS)
    published = np.stack([published_eplb(load_E, GPUS, SLOTS) for load_E in load])
    ours = plan(load, GPUS, SLOTS)
    drifted = load.copy()
    for load_E in drifted:
        some = rng.choice(EXPERTS, EXPERTS // 4, replace=False)
        load_E[np.sort(some)] = load_E[some]
    eight = plan(drifted, GPUS, SLOTS, ours.placed_LGS, moves=8)
    seconds = turns(
        {
            "published EPLB": lambda: [published_eplb(load_E, GPUS, SLOTS) for load_E in load],
            "plan": lambda: plan(load, GPUS, SLOTS),
            "8 copies": lambda: plan(drifted, GPUS, SLOTS, ours.placed_LGS, moves=8),
        },
        count=5,
    )
    mean_L = drifted.sum(axis=1) / GPUS
    return {
        "case": f"{LAYERS} x {EXPERTS} -> {GPUS * SLOTS} slots on {GPUS} GPUs, Zipf {POWER}",
        "ms": {name: quartiles(np.array(one) * 1e3) for name, one in seconds.items()},
        "ms_fastest": {name: min(one) * 1e3 for name, one in seconds.items()},
        "balancedness": {"published EPLB": even_balance(load, published), "plan": even_balance(load, ours.placed_LGS)},
        "duplicates": {"published EPLB": duplicates(published), "plan": duplicates(ours.placed_LGS)},
        "drifted": {
            "before": float((mean_L / busiest_L(drifted, held(ours.placed_LGS, EXPERTS))).mean()),
            "8 copies": float((mean_L / busiest_L(drifted, eight.usable_LEG)).mean()),
        },
    }


def against_lp(rng):
    """Exact dispatch of random token counts over layouts with 64 slots more, against the linear program's optimum."""
    excess = []
    for _ in range(LP_CASES):
        load = zipf(rng, 1, EXPERTS)
        planned = plan(load, GPUS, SLOTS + 1)
        tokens = rng.multinomial(65536, rng.dirichlet(load[0] * 200))
        most = planned.dispatch(0, tokens).sum(axis=0).max()
        excess.append(most / lp_optimum(tokens, planned.usable_LEG[0]) - 1)
    return {"cases": LP_CASES, "slots": GPUS * (SLOTS + 1), "worst_excess": max(excess), "mean": float(np.mean(excess))}


def lp_optimum(load_E, usable_EG):
    """The lowest busiest GPU, tokens divisible."""
    pairs = np.argwhere(usable_EG)
    width = len(pairs) + 1
    rows, sums = np.zeros((usable_EG.shape[1], width)), np.zeros((len(load_E), width))
    rows[pairs[:, 1], np.arange(len(pairs))], rows[:, -1] = 1, -1
    sums[pairs[:, 0], np.arange(len(pairs))] = 1
    cost = np.append(np.zeros(len(pairs)), 1.0)
    return linprog(cost, A_ub=rows, b_ub=np.zeros(len(rows)), A_eq=sums, b_eq=load_E, method="highs").fun


def decision(rng, experts, gpus):
    """Microseconds of the parts of one layer's decision."""
    home = held(contiguous(experts, gpus, -(-experts // gpus))[None], experts)[0]
    load = rng.multinomial(4096, zipf(rng, 1, experts)[0])
    usable = home.copy()
    for expert, gpu in replicas(load.astype(float), home, np.zeros_like(home), 1):
        usable[expert, gpu] = True
    counts = np.stack([rng.multinomial(n, np.ones(gpus) / gpus) for n in load], axis=1)
    split = exact_split(load, usable)
    seconds = turns(
        {
            "replicas": lambda: replicas(load.astype(float), home, np.zeros_like(home), 1),
            "exact_split": lambda: exact_split(load, usable),
            "send_matrix": lambda: send_matrix(counts, split),
        },
        count=40,
    )
    return {name: quartiles(np.array(one) * 1e6) for name, one in seconds.items()}


def quartiles(values):
    return [float(np.percentile(values, q)) for q in (25, 50, 75)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    told = {
        "benchmark": "planner",
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("moesim", "numpy", "numba")},
        "layouts": layouts(rng),
        "against_lp": against_lp(rng),
        "us_a_layer": {name: decision(rng, experts, gpus) for name, experts, gpus in SHAPES},
    }
    text = json.dumps(told, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
