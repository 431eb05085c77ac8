"""A recording larger than memory should be: imported, verified and summarised as a stream, with its peak memory.

    python benchmarks/trace_scale.py                     # 10 M tokens x 58 layers x top-8 of 256: 4.6 GB of ids
    python benchmarks/trace_scale.py --tokens 500000     # the same, smaller

Every stage is a process of its own, so that its peak memory is its own. Statistics and a bare `numpy.bincount` over
the same shards (reading included in both) take turns in one process; their ratio is what is quoted. Needs twice the
size of the ids on disk, in --dir, and removes it afterwards.
"""

import argparse
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

LAYERS, EXPERTS, TOP_K, REQUEST = 58, 256, 8, 100_000
STAGES = ("import", "verify", "statistics")
TURNS = 3


def make(folder, tokens):
    """Requests as vLLM writes them; a skewed popularity a layer, K different experts a token."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)]).astype(np.uint8)
    for number, begin in enumerate(range(0, tokens, REQUEST)):
        count = min(REQUEST, tokens - begin)
        # Squared uniform numbers prefer low ranks; consecutive ranks from there on are K different experts.
        first = (rng.random((count, LAYERS), np.float32) ** 2 * (EXPERTS - TOP_K)).astype(np.uint8)
        rank = first[:, :, None] + np.arange(TOP_K, dtype=np.uint8)
        np.save(folder / f"request-{number:04d}.npy", ranked[np.arange(LAYERS)[None, :, None], rank])


def stage_import(folder):
    from moesim.traces.formats import ImportOptions
    from moesim.traces.importing import import_recording

    begin = time.perf_counter()
    trace = import_recording(folder / "routed", folder / "t.moetrace", options=ImportOptions(experts=EXPERTS))
    rows = sum(shard.rows for shard in trace.shards)
    return {"seconds": time.perf_counter() - begin, "tokens": rows}


def stage_verify(folder):
    from moesim.traces.store import Trace

    begin = time.perf_counter()
    rows = sum(shard.rows for shard in Trace.open(folder / "t.moetrace").verify())
    return {"seconds": time.perf_counter() - begin, "tokens": rows}


def stage_statistics(folder):
    from moesim.cli.stats import summarise
    from moesim.traces.store import Trace

    trace = Trace.open(folder / "t.moetrace")
    taken = {"statistics": [], "loads only": [], "bincount": []}
    for turn in range(TURNS + 1):
        for name, work in (
            ("statistics", lambda: summarise(trace, "decoder", gpus=(8, 32, 64))),
            ("loads only", lambda: summarise(trace, "decoder", gpus=(8, 32, 64), overlap=False)),
            ("bincount", lambda: bare(trace)),
        ):
            begin = time.perf_counter()
            work()
            if turn:  # the first turn compiles and fills the page cache
                taken[name].append(time.perf_counter() - begin)
    ratios = {
        name: [a / b for a, b in zip(taken[name], taken["bincount"], strict=True)]
        for name in ("statistics", "loads only")
    }
    return {
        "seconds": taken,
        "over_bincount": {name: statistics.median(values) for name, values in ratios.items()},
        "over_bincount_range": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def bare(trace):
    """What anybody would write: one bincount a layer and part."""
    total = np.zeros((LAYERS, EXPERTS), np.int64)
    for part in trace.parts("decoder"):
        for layer in range(LAYERS):
            total[layer] += np.bincount(part.topk_ids[:, layer].ravel(), minlength=EXPERTS)
    return total


def child(stage, folder):
    found = {"import": stage_import, "verify": stage_verify, "statistics": stage_statistics}[stage](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**found, "peak_gib": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        child(args.stage, args.dir)
        return
    folder = Path(tempfile.mkdtemp(prefix="trace-scale-", dir=args.dir))
    try:
        make(folder / "routed", args.tokens)
        report = {
            "tokens": args.tokens,
            "layers": LAYERS,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "ids_bytes": args.tokens * LAYERS * TOP_K,
            "machine": platform.processor() or platform.machine(),
            "versions": {name: version(name) for name in ("moesim", "numpy", "numba", "safetensors")},
        }
        for stage in STAGES:
            command = [sys.executable, __file__, "--stage", stage, "--dir", str(folder)]
            report[stage] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(stage, json.dumps(report[stage]), flush=True)
    finally:
        shutil.rmtree(folder)
    ratio = report["statistics"]["over_bincount"]
    print(f"statistics: {ratio['statistics']:.2f} times a bare bincount, {ratio['loads only']:.2f} without overlaps")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
