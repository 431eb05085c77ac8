"""Time of one decision: forecast, replicas, exact split, sends, for Switch- and DeepSeek-like shapes.

Prints microseconds a layer (median and quartiles over layers) and one JSON line. A decision stands on the critical path
of a layer, whose experts run for some 100 us on a fast GPU, so these numbers bound what a policy may cost.
"""

from __future__ import annotations

import json
import platform
import time

import numpy as np

from moesim.sim.dispatch import exact_split, send_matrix
from moesim.sim.planner import contiguous, eplb, replicas

SHAPES = [
    ("switch-base-128, 8 GPUs", 128, 8, 1),
    ("deepseek-v3, 32 GPUs", 256, 32, 1),
    ("switch-mini, 2 ranks", 32, 2, 1),
]


def one_hot(placed_GS, experts):
    held = np.zeros((experts, len(placed_GS)), bool)
    gpu, slot = np.nonzero(placed_GS >= 0)
    held[placed_GS[gpu, slot], gpu] = True
    return held


def timed(function, repeats=40):
    """Microseconds of `repeats` calls, sorted; the first call, which warms up, is left out."""
    out = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        function(i)
        out.append(1e6 * (time.perf_counter() - start))
    return sorted(out[1:])


def main() -> None:
    rows = []
    for name, experts, gpus, extra in SHAPES:
        rng = np.random.default_rng(0)
        zipf = 1 / np.arange(1, experts + 1) ** 0.8
        loads = [rng.multinomial(4096, rng.permutation(zipf) / zipf.sum()) for _ in range(64)]
        home = one_hot(contiguous(experts, gpus, -(-experts // gpus)), experts)
        none = np.zeros_like(home)
        held = []
        for load in loads:
            pairs = replicas(load.astype(float), home, none, extra)
            with_replicas = home.copy()
            for expert, gpu in pairs:
                with_replicas[expert, gpu] = True
            held.append(with_replicas)
        counts = [np.stack([rng.multinomial(n, np.ones(gpus) / gpus) for n in load], axis=1) for load in loads]
        splits = [exact_split(load, usable) for load, usable in zip(loads, held, strict=True)]
        # Each lambda is called at once, within its own turn of the loop: B023 does not apply.
        parts = {
            "replicas": timed(lambda i: replicas(loads[i].astype(float), home, none, extra)),  # noqa: B023
            "exact_split": timed(lambda i: exact_split(loads[i], held[i])),  # noqa: B023
            "send_matrix": timed(lambda i: send_matrix(counts[i], splits[i])),  # noqa: B023
            "eplb": timed(lambda i: eplb(loads[i].astype(float), gpus, home.sum(0).max() + extra), 10),  # noqa: B023
        }
        balance = np.mean([split.sum(0).mean() / split.sum(0).max() for split in splits])
        for part, us in parts.items():
            q25, q50, q75 = np.percentile(us, [25, 50, 75])
            rows.append({"shape": name, "part": part, "us_p25": q25, "us_p50": q50, "us_p75": q75})
            print(f"{name:26} {part:12} {q50:9.0f} us a layer ({q25:.0f} .. {q75:.0f})")
        print(f"{name:26} balancedness with replicas {balance:.4f}")
    print(json.dumps({"benchmark": "planner", "machine": platform.machine(), "numpy": np.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
