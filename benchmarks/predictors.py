"""Every predictor on the shipped model and on DeepSeek-V2-Lite: tables, picture, JSON; what is run: predictor_plan.py.

python benchmarks/predictors.py --esft DIR               # about an hour on 2 cores; goes on where it was interrupted
python benchmarks/predictors.py --quick --out quick.md   # few steps and epochs, minutes; nothing to conclude from

DIR holds intent.npz, law.npz, summary.npz and translation.npz (topk_ids, topk_weights, seq_lens). Results are kept in
runs/predictors; --again NAME[,NAME] runs those predictors anew, after their code has changed.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from marks import write_part
from predictor_plan import OURS, TASKS, Study, esft_studies, mini_studies, quickened
from predictor_studies import FROZEN, Kept, run_study, settings_of
from predictor_tables import draw, groups_of, series_of, study_text
from rich.console import Console

from moesim.cli import main as moesim
from moesim.sim.prediction import Learning, mean_of
from moesim.traces.store import Trace

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/switch-mini"
QUICK_TOKENS = 16_000
"""Recorded of the shipped model's samples; all of them where it is not quick."""
PHASES = {"": "prefill", "-decode": "decode"}
console = Console(stderr=True)


def main() -> None:
    options = _options()
    folder = ROOT / "runs" / ("predictors-quick" if options.quick else "predictors")
    studies = _studies(options)
    _forget(options, folder)
    traces = _recordings({study.source for study in studies}, options, folder)
    kept = {}
    for study in studies:
        if study.tasks[0].trace in traces:
            done = _run(study, traces, options, folder)
            if done.predictors:
                kept[study.name] = done
        else:
            console.print(f"{study.name}: left out, no recordings (see --esft)")
    _write(kept, options, folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esft", type=Path, help="folder of the four npz files; without it those studies are left out")
    parser.add_argument("--only", choices=["mini", "esft"], help="the studies of one model")
    parser.add_argument("--studies", default="", help="names of those to run, comma-separated  [default: all]")
    parser.add_argument("--predictors", default="", help="those to run, comma-separated  [default: all]")
    parser.add_argument("--report", action="store_true", help="write what is kept so far, run nothing")
    parser.add_argument("--quick", action="store_true", help="few steps and epochs, to see that it runs")
    parser.add_argument("--epochs", type=int, help="of the learned ones on the shipped model  [default: their own]")
    parser.add_argument("--esft-epochs", type=int, help="of the learned ones on ESFT  [default: their own]")
    parser.add_argument("--device", default="auto", help="to train on: auto, cpu, cuda")
    parser.add_argument("--again", default="", help="predictors to run anew, comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/predictors.md", help="markdown with the two marks")
    return parser.parse_args()


def _studies(options: argparse.Namespace) -> list[Study]:
    every = [*mini_studies(), *esft_studies()]
    names = [name for name in options.studies.split(",") if name]
    if unknown := set(names) - {study.name for study in every}:
        raise SystemExit(f"--studies: unknown {', '.join(sorted(unknown))}; known: {', '.join(s.name for s in every)}")
    asked = [s for s in every if options.only in (None, s.source) and (not names or s.name in names)]
    if few := {name for name in options.predictors.split(",") if name}:
        asked = [replace(study, names=tuple(name for name in study.names if name in few)) for study in asked]
    return [quickened(study) for study in asked] if options.quick else asked


def _forget(options: argparse.Namespace, folder: Path) -> None:
    """Remove the trainings of what is to be run anew."""
    for name in filter(None, options.again.split(",")):
        for split in ("request", "alternate", "dataset"):
            for checkpoint in (folder / "training").glob(f"*/{name}-{split}*"):
                checkpoint.unlink()


def _recordings(sources: set[str], options: argparse.Namespace, folder: Path) -> dict[str, Trace]:
    """Name to recording, each made where it is not there yet."""
    wanted: dict[str, list[Any]] = {}
    if "mini" in sources:
        few = ["--max-tokens", QUICK_TOKENS] if options.quick else []
        what = ["record", "--model", MODEL, "--text", MODEL / "samples", "--router-input", "--lookahead", 3]
        wanted["mini"] = [*what, *few]
    if "esft" in sources and options.esft and all((options.esft / f"{name}.npz").exists() for name in TASKS):
        for name in TASKS:
            for ending, phase in PHASES.items():
                what = ["trace", "import", options.esft / f"{name}.npz", "--experts", 64, "--phase", phase]
                wanted[name + ending] = what
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _made(folder / f"{name}.moetrace", command) for name, command in wanted.items()}


def _made(path: Path, command: list[Any]) -> Trace:
    """The recording at `path`, made by a command of moesim if need be; it appears whole or not at all."""
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        moesim([str(word) for word in [*command, "--out", part, "--force"]], standalone_mode=False)
        part.rename(path)
    return Trace.open(path)


def _run(study: Study, traces: dict[str, Trace], options: argparse.Namespace, folder: Path) -> Kept:
    epochs = options.epochs if study.source == "mini" else options.esft_epochs
    epochs = 1 if options.quick and epochs is None else epochs
    # Studies that fit on the same requests share their trainings.
    stack = "encoder" if study.phase.name == "ENCODER" else "decoder"
    checkpoints = folder / "training" / f"{study.source}-{stack}-{epochs if epochs is not None else 'own'}"
    learning = Learning(device=options.device, epochs=epochs, checkpoints=checkpoints)
    kept = Kept.open(folder / f"{study.name}.json", settings_of(study, learning))
    for name in filter(None, options.again.split(",")):
        for gone in (name, name + FROZEN):
            kept.predictors.pop(gone, None)
    begin = perf_counter()
    with console.status(study.name) as status:

        def tell(name: str, done: int, total: int) -> None:
            line = f"{study.name}: {name} ({done} of {total}, {perf_counter() - begin:.0f} s)"
            status.update(line)
            if not console.is_terminal:
                console.print(line)

        if not options.report:
            run_study(study, traces, kept, learning, tell)
    console.print(f"{study.name}: {len(kept.predictors)} predictors, {perf_counter() - begin:.0f} s")
    return kept


def _write(kept: dict[str, Kept], options: argparse.Namespace, folder: Path) -> None:
    picture = options.out.with_suffix(".png")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "device": options.device,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("moesim", "numpy", "torch")}},
    }
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    stated = f"Written on {about['date']} by `benchmarks/predictors.py`; {about['processor']}, {versions}."
    quick = "A quick run: too little to conclude anything.\n\n" if options.quick else ""
    image = f"![Recall and gap closed by predictor]({picture.name})"
    tables = "\n".join(study_text(one) for one in kept.values())
    write_part(options.out, f"{quick}{stated}\n\n{image}\n\n{tables}")
    draw(kept, picture)
    results = folder if options.quick else ROOT / "benchmarks/results"
    path = results / f"{about['date']}-predictors.json"
    told = {**about, "studies": {name: _condensed(one) for name, one in kept.items()}}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    console.print(f"{options.out}, {picture} and {path}", highlight=False, soft_wrap=True)


def _condensed(kept: Kept) -> dict[str, Any]:
    """Settings and the groups' means, by layer only of our own; of streams every step's mean."""
    if kept.settings["stream"]:
        means = {
            name: {key: series_of(kept, name, key) for key in ("recall", "load_error")} for name in kept.predictors
        }
        return {"settings": kept.settings, "streams": _rounded(means)}
    means = {group: mean_of(list(reports.values())) for group, reports in groups_of(kept).items()}
    for mean in means.values():
        for name, told in mean["predictors"].items():
            if name not in OURS:
                for one in told["horizons"].values():
                    one.pop("layers")
    return {"settings": kept.settings, "groups": _rounded(means)}


def _rounded(value: Any) -> Any:
    """With five digits, which is more than any of it is known to; arrays as lists."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
