"""The pipeline on real GPUs, one rank a GPU: record, calibrate, simulate, run, compare, and equality with Hugging Face.

    python benchmarks/gpu/end_to_end.py --out FOLDER [--device cuda] [--ranks N] [--model models/switch-mini]

Leaves FOLDER/end_to_end.json with device, driver, versions and date beside every number. With one GPU there is one
rank: then it shows that everything runs and is right there, and what a step costs, but no speedup.
Rehearse with `--device cpu --ranks 2`. Needs the installed package and nothing from a network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import environment

HERE = Path(__file__).parent
MOESIM = [sys.executable, "-c", "from moesim.cli import main; main()"]
POLICIES = "balanced,eplb,predictive-layer,predictive-batch,oracle-batch"


def run(words: list[str], log: list[dict[str, Any]]) -> str:
    """One command; its output and how long it took go into the log. Raises CalledProcessError where it fails."""
    print("$", " ".join(words[len(MOESIM) :] if words[: len(MOESIM)] == MOESIM else words[1:]), flush=True)
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    log.append(
        {"seconds": round(time.perf_counter() - start, 1), "exit": done.returncode, "stderr": done.stderr[-2000:]}
    )
    print(done.stdout, flush=True)
    if done.returncode:
        print(done.stderr, flush=True)
        raise subprocess.CalledProcessError(done.returncode, words[-1])
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--model", type=Path, default=HERE.parents[1] / "models/switch-mini")
    parser.add_argument("--max-tokens", default="100000")
    parser.add_argument("--batch-tokens", nargs="+", default=["2048", "8192"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("Error: --device cuda: torch sees no CUDA device here; rehearse with --device cpu --ranks 2")
    ranks = str(args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2))
    args.out.mkdir(parents=True, exist_ok=True)
    trace, profile = args.out / "trace.moetrace", args.out / "profile.json"
    model, device, log = str(args.model), ["--device", args.device], []
    report: dict[str, Any] = {"benchmark": "end_to_end", "machine": environment(args.device), "ranks": int(ranks)}

    record = ["--text", f"{model}/samples", "--out", str(trace), "--max-tokens", args.max_tokens, "--force"]
    run([*MOESIM, "record", "--model", model, *record, *device], log)
    run([*MOESIM, "calibrate", model, "--ranks", ranks, *device, "--out", str(profile)], log)
    report["profile"] = json.loads(profile.read_text(encoding="utf-8"))
    comparisons = []
    for tokens in args.batch_tokens:
        simulated, measured = (str(args.out / f"{kind}-{tokens}.json") for kind in ("simulated", "measured"))
        same = ["--policy", POLICIES, "--batch-tokens", tokens]
        there, here = ["--profile", str(profile), "--gpus", ranks], ["--ranks", ranks, *device]
        run([*MOESIM, "simulate", str(trace), *same, *there, "--out", simulated], log)
        run([*MOESIM, "run-gpu", model, "--trace", str(trace), *same, *here, "--out", measured], log)
        comparisons.append(json.loads(run([*MOESIM, "compare", simulated, measured, "--json"], log)))
    report["comparisons"] = comparisons
    equality = args.out / "equality.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    run([*torchrun, str(HERE / "equality.py"), model, str(trace), args.device, str(equality)], log)
    report["equality_with_hugging_face"] = json.loads(equality.read_text(encoding="utf-8"))
    report["commands"] = log
    (args.out / "end_to_end.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "end_to_end", **report["equality_with_hugging_face"]}))


if __name__ == "__main__":
    main()
