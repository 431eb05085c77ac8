"""The simulator's word once more on what the benchmark of partitions measured, with the cost model as it is now.

    python benchmarks/gpu/partitions_again.py gpu.json [--out again.json]

Fits every profile anew to the calibration's samples, which the report holds, simulates all cases and prints simulated
beside measured speedups. Needs no GPU: this is how a term of the cost model is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from partitions import fidelity
from partitions_inputs import CASES, POLICIES, SMALL_CASES

from moesim.backend.partition_fit import PartitionRates, PhaseSamples, fit_partitions
from moesim.sim.profile import FORMAT, VERSION, HardwareProfile, load_profile
from moesim.traces import ModelSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="what run_all.py wrote, or its partitions.json")
    parser.add_argument("--out", type=Path, help="write the entries here")
    args = parser.parse_args()
    told = json.loads(args.report.read_text(encoding="utf-8"))
    entries: dict[str, Any] = told["sections"]["partitions"]["entries"] if "sections" in told else told["entries"]
    spec = ModelSpec.from_dict(next(row["spec"] for name, row in entries.items() if name.startswith("setup/")))
    cases = [case for case in (*CASES, *SMALL_CASES) if f"{case.name}/{POLICIES[-1]}" in entries]
    dtype = next(row["dtype"] for name, row in entries.items() if name.startswith("setup/"))
    profiles = {case: profile_of(entries[f"profile/{case.name}"], spec, dtype) for case in cases}
    measured = {case: {name: entries[f"{case.name}/{name}"]["seconds"] for name in POLICIES} for case in cases}
    made: dict[str, Any] = {}

    def report(name: str, numbers: dict[str, Any]) -> None:
        made[name] = numbers
        print(line(name, numbers))

    fidelity(report, spec, profiles, measured, dtype, min(8, os.cpu_count() or 1))
    if args.out:
        args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def profile_of(entry: dict[str, Any], spec: ModelSpec, dtype: str) -> HardwareProfile:
    """The measured profile with its device fitted anew."""
    samples, rates = PhaseSamples.from_dict(entry["raw"]), PartitionRates.from_dict(entry["raw"])
    gpu, error = fit_partitions(samples, rates, spec, spec.stack("encoder"), dtype)
    print(f"{entry['profile']['name']}: median error of the fit {error['experts']:.1%}, tile {gpu.tile_rows}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps({"format": FORMAT, "version": VERSION, **entry["profile"]}), encoding="utf-8")
        return replace(load_profile(path), gpu=gpu)


def line(name: str, numbers: dict[str, Any]) -> str:
    """Simulated beside measured, of one run or of all."""
    if "errors" not in numbers:
        return ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())
    pairs = ((what, numbers[f"{what}_simulated"], numbers[f"{what}_measured"]) for what in ("experts", "step"))
    told = "   ".join(f"{what} {sim:.3f} / {real:.3f} ({sim / real - 1:+.1%})" for what, sim, real in pairs)
    return f"{name.removeprefix('fidelity/'):<60} {told}"


if __name__ == "__main__":
    main()
