"""Every published system on real routing: what it claims, what moesim finds under comparable conditions, and whether
the ordering that it reports comes out. Writes docs/systems.md, a picture, and JSON; what is run: systems_plan.py.

python benchmarks/systems.py --esft DIR          # some ten minutes on 2 cores; goes on where it was interrupted
python benchmarks/systems.py --quick --out q.md  # a few steps of everything, to see that it runs

DIR holds intent.npz, law.npz, summary.npz and translation.npz (topk_ids, topk_weights, seq_lens). Results are kept in
runs/systems; --again forgets them.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from copy import deepcopy
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from systems_claims import CLAIMS
from systems_plan import CASES, TRACES, Case
from systems_report import report

from moesim.cli import main as moesim
from moesim.predictors import Predictor
from moesim.sim.engine import simulate
from moesim.sim.policies import make_policy, recipe
from moesim.sim.profile import load_profile
from moesim.sim.scenario import STACK_OF_PHASE, make_scenario
from moesim.traces.errors import MoesimError
from moesim.traces.store import Trace

ROOT = Path(__file__).parents[1]
console = Console(stderr=True)


def main() -> None:
    options = _options()
    folder = ROOT / "runs" / ("systems-quick" if options.quick else "systems")
    folder.mkdir(parents=True, exist_ok=True)
    found = {case.name: _case(case, options, folder) for case in CASES if options.esft or "esft" not in case.name}
    about = {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("moesim", "numpy", "simpy")}},
        "quick": options.quick,
    }
    quality = json.loads(options.quality.read_text(encoding="utf-8")) if options.quality else None
    report(options.out, about, found, CLAIMS, quality)
    results = folder if options.quick else ROOT / "benchmarks/results"
    path = results / f"{about['date']}-systems.json"
    path.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{options.out} and {path}", highlight=False, soft_wrap=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esft", type=Path, help="folder of the four npz files; without it those cases are left out")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--again", action="store_true", help="run everything anew")
    newest = max((ROOT / "benchmarks/results").glob("*-quality.json"), default=None)
    parser.add_argument("--quality", type=Path, default=newest, help="JSON of moesim quality  [default: newest]")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/systems.md")
    return parser.parse_args()


def _case(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The case's results: per recording and policy seconds and what explains them, or why there are none."""
    path = folder / f"{case.name}.json"
    settings = {**case.describe(), "steps": 3 if options.quick else case.max_steps}
    kept: dict[str, Any] = {"settings": settings, "runs": {}}
    if path.exists() and not options.again:
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = told if told["settings"] == settings else kept
    for name in case.traces:
        runs = kept["runs"].setdefault(name, {})
        missing = [policy for policy in case.policies if policy not in runs]
        if not missing:
            continue
        for policy, told in _runs(case, _recording(name, options, folder), missing, settings["steps"]):
            console.print(f"{case.name}, {name}: {policy} {told.get('total_s', told.get('why'))}", highlight=False)
            runs[policy] = told
            path.write_text(json.dumps(kept), encoding="utf-8")
    return kept


def _runs(case: Case, trace: Trace, policies: list[str], steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = trace.spec.with_widths(case.shapes) if case.shapes else trace.spec
    stack = STACK_OF_PHASE[case.phase]
    scenario = make_scenario(
        spec,
        trace.rows(stack),
        phase=case.phase,
        gpus=case.gpus,
        workload=case.workload,
        extra_slots=case.extra_slots,
        resident=case.resident,
        max_steps=steps,
        request_texts=trace.request_texts,
        gates=trace.gates(stack),
    )
    profile = load_profile(case.profile)
    fitted: dict[str, Predictor] = {}
    for policy in policies:
        predictor = recipe(policy).predictor
        try:
            made = make_policy(
                policy, scenario.cluster, scenario.fit, scenario.gates, fitted=deepcopy(fitted.get(predictor or ""))
            )
            if predictor and made.predictor:
                fitted.setdefault(predictor, deepcopy(made.predictor))
            result = simulate(scenario, made, profile, execution=case.execution)
        except MoesimError as error:
            yield policy, {"why": str(error)}
            continue
        metrics = result.totals.metrics()
        kept = ("balancedness_mean_of_ratios", "moved_bytes", "hidden_bytes", "time_shares")
        yield (
            policy,
            {
                "total_s": result.total_s,
                "steps": metrics["steps"],
                "tokens": metrics["tokens"],
                **{name: metrics[name] for name in kept},
                "scores": result.scores,
                **({"cache": metrics["cache"]} if "cache" in metrics else {}),
            },
        )


def _recording(name: str, options: argparse.Namespace, folder: Path) -> Trace:
    """The recording, made by a command of moesim where it is not there yet; it appears whole or not at all."""
    path = folder / f"{name}.moetrace"
    if not path.exists():
        for word in TRACES[name]:  # a recording made of others
            if word.startswith("{runs}/"):
                _recording(Path(word).stem, options, folder)
        part = path.with_name(f"part-{path.name}")
        command = [word.format(esft=options.esft, root=ROOT, runs=folder) for word in TRACES[name]]
        moesim([*command, "--out", str(part), "--force"], standalone_mode=False)
        part.rename(path)
    return Trace.open(path)


if __name__ == "__main__":
    main()
