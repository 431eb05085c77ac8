"""`moesim run-gpu`: policies on real devices, or on CPU ranks, with the same inputs and in one run."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from moesim.backend.hub import model_digest
from moesim.backend.job import DTYPES, Job, check_options, model_config
from moesim.backend.job import Progress as Report
from moesim.backend.launch import check_device, launch, under_torchrun
from moesim.backend.offload_options import Offloading
from moesim.cli import run_offload
from moesim.cli.options import MODEL, OutFile, workload_options, writing
from moesim.cli.recording import record_texts, text_option
from moesim.cli.report import how_measured, print_results, results_json
from moesim.cli.run_partitions import Partitions, partition_options, run_partitions
from moesim.cli.run_partitions import footnote as partition_footnote
from moesim.sim.policies import POLICIES, default_baseline, recipe
from moesim.sim.quality import load_qualities
from moesim.sim.results import Result, load_results, save_results
from moesim.sim.scenario import STACK_OF_PHASE
from moesim.sim.timeline import span_timeline
from moesim.traces import InputError, MoesimError, Phase, Workload

RUNNABLE = [name for name, parts in POLICIES.items() if not parts.simulated_only]
DEFAULT_RANKS = 2

file_option = OutFile()


@click.command("run-gpu")
@click.argument("model", required=False, type=MODEL)
@click.option(
    "--policy",
    required=True,
    help=f"Comma-separated, or all: {', '.join(RUNNABLE)}. With --resident: {', '.join(run_offload.RUNNABLE)}.",
)
@click.option("--baseline", help="What speedups refer to.  [default: contiguous; with --resident: on-demand]")
@click.option("--ranks", type=int, help="Processes, one a GPU or core.  [default: 2; under torchrun its own number]")
@partition_options
@run_offload.offload_options
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--trace", type=click.Path(path_type=Path), help="Requests to run, recorded from the same model.")
@text_option
@workload_options
@click.option(
    "--phase", type=click.Choice([p.name.lower() for p in Phase]), default="encoder", show_default=True,
    help="decode: with --resident only; prefill: without it.",
)  # fmt: skip
@click.option("--extra-slots", type=int, default=1, show_default=True, help="Replica slots per GPU and layer.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Run only the first steps.")
@click.option("--repeats", type=int, default=3, show_default=True, help="Counted passes over all steps per policy.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Passes before them that are not counted.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option(
    "--quality",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file of moesim quality: lossy policies get speedups beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, and nothing else on stdout.")
@click.option("--out", type=file_option, help="Write the results here, for moesim compare.")
@click.option("--decision-log", type=file_option, help="Write the policies' decisions, as JSON lines.")
@click.option("--timeline", type=file_option, help="Write what happened when for Perfetto or Chrome, JSON.")
def run_gpu(
    model: Path | None,
    policy: str,
    baseline: str | None,
    ranks: int | None,
    parts: Partitions,
    offloading: Offloading | None,
    device: str,
    trace: Path | None,
    text: tuple[Path, ...],
    workload: Workload,
    phase: str,
    extra_slots: int,
    max_steps: int | None,
    repeats: int,
    warmup: int,
    dtype: str,
    quality: Path | None,
    as_json: bool,
    out: Path | None,
    decision_log: Path | None,
    timeline: Path | None,
) -> None:
    """Run policies with the Switch model MODEL, a folder or hub id, expert-parallel over ranks, and print speedups.

    Policies are fitted on one half of the trace's requests and run on the other. The baseline is always run too, and
    all policies take turns in the same processes, so that the ratios come from one run. Starts its ranks itself, or
    joins those of torchrun. The median repeat is reported; every rank holds the whole model in host memory.
    With --partitions one process splits one device instead, and partitions stand for GPUs. With --resident experts lie
    in host memory and one device has slots for some of them; contiguous is then everything on the device.

    \b
    moesim run-gpu models/switch-mini --policy predictive-batch --ranks 2
    moesim run-gpu models/switch-mini --trace mini.moetrace --policy all --ranks 4 --device cuda --out measured.json
    moesim run-gpu models/switch-mini --policy predictive-batch --partitions 2
    moesim run-gpu models/switch-mini --policy lfu,prefetch-ridge,contiguous --resident 25%
    moesim run-gpu models/switch-mini --trace mini.moetrace --policy lfu --resident 8 --phase decode --batch-tokens 4
    moesim run-gpu --random switch-base-8 --trace routing.moetrace --routing replay --policy eplb --partitions 4
    torchrun --nproc-per-node 2 --no-python moesim run-gpu models/switch-mini --trace mini.moetrace --policy eplb
    """
    size = parts.as_ranks(ranks) or (1 if offloading else _ranks(ranks))
    parts.prepare()
    baseline = baseline or default_baseline(1 if offloading else None)
    qualities = load_qualities(quality) if quality else []
    with tempfile.TemporaryDirectory(prefix="moesim-run-") as folder:
        job = Job(
            kind="run",
            folder=folder,
            model=str(model or ""),
            ranks=size,
            device="cpu",
            dtype=dtype,
            trace=str(trace or ""),
            phase=phase,
            policies=policy_names(policy, baseline, run_offload.RUNNABLE if offloading else RUNNABLE),
            workload=workload,
            extra_slots=extra_slots,
            max_steps=max_steps,
            repeats=repeats,
            warmup=warmup,
            decisions=decision_log is not None,
            timeline=timeline is not None,
            partitions=parts.count,
            random=parts.random,
            routing=parts.routing,
        )
        if offloading:
            run_offload.check(job, ranks)
        else:
            check_options(job)
        results = _run(replace(job, device=check_device(device, size)), text, offloading)
        if results is None:
            return
        _keep(job, results, out, decision_log)
        write_timeline(results, timeline)
    if as_json:
        click.echo(json.dumps(results_json(results, baseline, qualities), indent=1))
    else:
        print_results(results, baseline, qualities=qualities)
        click.echo(_footnote(results[0]))


def _run(job: Job, text: tuple[Path, ...], offloading: Offloading | None) -> list[Result] | None:
    """The results, or None in a rank of torchrun that has nothing to print."""
    if under_torchrun():
        if not job.trace:
            raise InputError("under torchrun give --trace: the ranks cannot all record")
        return _join(job)
    with tempfile.TemporaryDirectory(prefix="moesim-trace-") as recorded, progress_bar() as report:
        if not job.trace:
            trace = record_texts(job.model, text, Path(recorded) / "run.moetrace", report, dtype=job.dtype)
            job = replace(job, trace=str(trace))
        else:
            _check_trace(job)
        if offloading:
            return run_offload.run(job, offloading, report)
        if job.partitions:
            return run_partitions(job, report)
        launch(job, report)
    return load_results(job.result_file)


def _join(job: Job) -> list[Result] | None:
    """Be one of torchrun's ranks. On an error the process ends at once: a thread that waits for a rank that is gone
    would keep it alive."""
    from moesim.backend import ranks as groups
    from moesim.backend.failures import in_one_line
    from moesim.backend.session import run_policies

    try:
        with in_one_line():
            ranks = groups.join(job.device)
            results = run_policies(job, ranks)
            groups.leave()
    except MoesimError as error:
        click.echo("Error: " + " ".join(str(error).split()), err=True)
        sys.stderr.flush()
        os._exit(2)
    return results if ranks.rank == 0 else None


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on stderr where that is a terminal; yields the function that moves it."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("starting ranks", total=1.0)

        def report(done: float, what: str) -> None:
            progress.update(task, completed=done, description=what)

        yield report


def _ranks(asked: int | None) -> int:
    if not under_torchrun():
        return DEFAULT_RANKS if asked is None else asked
    world = int(os.environ["WORLD_SIZE"])
    if asked not in (None, world):
        raise InputError(f"--ranks {asked}, but torchrun started {world} ranks: leave --ranks out")
    return world


def policy_names(policy: str, baseline: str, runnable: list[str]) -> tuple[str, ...]:
    """The baseline and those asked for, each once. Raises InputError where there are none or one is unknown."""
    asked = runnable if policy.strip() == "all" else [name.strip() for name in policy.split(",") if name.strip()]
    if not asked:
        raise InputError(f"--policy names no policy; known: {', '.join(runnable)}")
    for name in (baseline, *asked):
        recipe(name)
    return tuple(dict.fromkeys([baseline, *asked]))


def _check_trace(job: Job) -> None:
    """Raise InputError before any rank starts where there is no trace or it was recorded with another model."""
    from moesim.traces.store import Trace

    trace = Trace.open(Path(job.trace))
    spec = trace.spec
    if job.routing == "replay":
        return  # any model with as many experts and layers will do, which is checked when it is there
    config = model_config(Path(job.model))
    spec.stack(STACK_OF_PHASE[Phase[job.phase.upper()]])
    of_trace = {**asdict(spec.sized()), **spec.to_dict()}
    for name in ("d_model", "d_ff", "num_experts", "vocab_size"):
        if of_trace[name] != config.get(name):
            raise InputError(
                f"{job.trace} was recorded with another model: its {name} is {of_trace[name]}, that of {job.model} is "
                f"{config.get(name)}; record this model"
            )
    if trace.model_digest not in ("", model_digest(Path(job.model))):
        raise InputError(f"{job.trace} was recorded with other weights than those in {job.model}; record this model")


def _keep(job: Job, results: list[Result], out: Path | None, decision_log: Path | None) -> None:
    if out:
        with writing(out):
            save_results(results, out)
    if decision_log:
        with writing(decision_log), decision_log.open("w", encoding="utf-8") as file:
            for name in job.policies:
                for line in job.decision_file(name).read_text(encoding="utf-8").splitlines():
                    decision = {"policy": name, **json.loads(line)}
                    file.write(json.dumps(decision, sort_keys=True, separators=(",", ":")) + "\n")


def write_timeline(results: list[Result], path: Path | None) -> None:
    """A process for each policy, for Perfetto. Raises InputError where it cannot be written."""
    if path:
        with writing(path):
            path.write_text(json.dumps(span_timeline({r.policy: r.spans for r in results})), encoding="utf-8")


def _footnote(result: Result) -> str:
    c = result.config
    if c.get("executor") == "offload":
        return run_offload.footnote(c)
    if "partitions" in c:
        return partition_footnote(c)
    return (
        f"measured: {c['ranks']} {c['device']} ranks on {c['device_name']} ({c['backend']}, threads a rank: "
        f"{c['threads_per_rank']}), {how_measured(c)}"
    )
