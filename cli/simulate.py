"""`moesim simulate`: policies on a simulated node, from a recorded trace. Starts without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import Progress

from moesim.backend.offload_options import slots_of
from moesim.cli.options import (
    OutFile,
    execution_options,
    fault_option,
    serving_options,
    workload_options,
    writing,
)
from moesim.cli.picture import load_over_time
from moesim.cli.report import print_results, results_json
from moesim.predictors import RouterSpec
from moesim.sim.eviction import ORACLES
from moesim.sim.execution import Execution
from moesim.sim.faults import Fault
from moesim.sim.log import read_log
from moesim.sim.policies import POLICIES, default_baseline, is_trained, offloading, recipe, unfit
from moesim.sim.profile import load_profile, shipped_profiles
from moesim.sim.quality import load_qualities
from moesim.sim.results import Result, save_results
from moesim.sim.runs import Inputs, run_policies
from moesim.sim.scenario import STACK_OF_PHASE, make_scenario
from moesim.sim.serving import Serving
from moesim.sim.timeline import spans_of
from moesim.sim.timeline import timeline as make_timeline
from moesim.traces import InputError, LoadTable, ModelSpec, Phase, TokenTable, Workload
from moesim.traces.errors import MoesimError
from moesim.traces.spec import PUBLISHED

if TYPE_CHECKING:
    from moesim.traces.store import Trace

INTERRUPTED = 130

file_option = OutFile()


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--policy", required=True, help=f"Comma-separated, or all: {', '.join(POLICIES)}.")
@click.option("--baseline", help="What speedups refer to.  [default: contiguous; with --resident: on-demand]")
@click.option("--profile", required=True, help=f"A file of moesim calibrate, or: {', '.join(shipped_profiles())}.")
@click.option("--gpus", type=int, help="GPUs of the profile to use.  [default: all]")
@workload_options
@click.option("--phase", type=click.Choice([p.name.lower() for p in Phase]), help="[default: encoder, else prefill]")
@click.option("--extra-slots", type=int, default=1, show_default=True, help="Replica slots per GPU and layer.")
@click.option(
    "--resident", metavar="SLOTS",
    help="Slots per GPU and layer where host memory has the rest, a number or a share such as 25%.  [default: all]",
)  # fmt: skip
@click.option("--max-steps", type=click.IntRange(min=1), help="Run only the first steps.")
@click.option(
    "--shapes",
    type=click.Choice(list(PUBLISHED)),
    help="Cost the recorded routing in a model of these widths.  [default: own]",
)
@execution_options
@serving_options
@fault_option
@click.option(
    "--quality",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file of moesim quality: lossy policies get speedups beside it.",
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Policies at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, and nothing else on stdout.")
@click.option("--out", type=file_option, help="Write the results here, for moesim compare; kept on Ctrl-C.")
@click.option("--picture", type=file_option, help="Draw the load of each GPU over time under every policy, PNG.")
@click.option("--timeline", type=file_option, help="Write what happens when for Perfetto or Chrome, JSON.")
@click.option("--event-log", type=file_option, help="Write what happens when, as JSON lines, for moesim explain.")
@click.option("--decision-log", type=file_option, help="Write the policies' decisions, as JSON lines.")
def simulate(
    trace: Path,
    policy: str,
    baseline: str | None,
    profile: str,
    gpus: int | None,
    workload: Workload,
    phase: str | None,
    extra_slots: int,
    resident: str | None,
    max_steps: int | None,
    shapes: str | None,
    execution: Execution,
    serving: Serving | None,
    faults: tuple[Fault, ...],
    quality: Path | None,
    workers: int,
    as_json: bool,
    out: Path | None,
    picture: Path | None,
    timeline: Path | None,
    event_log: Path | None,
    decision_log: Path | None,
) -> None:
    """Simulate policies on the requests of TRACE and print their speedup over a baseline.

    Policies are fitted on one half of the trace's requests and run on the other. The baseline is always run too.

    \b
    moesim simulate mini.moetrace --policy all --profile 8xH100-NVLink
    moesim simulate mini.moetrace --policy all --profile 8xA100-NVLink --gpus 4 --shapes switch-base --dtype bfloat16
    moesim simulate mini.moetrace --policy eplb --profile 8xH100-NVLink --arrivals poisson:500 --ttft-ms 200
    moesim simulate mini.moetrace --policy all --profile 1xRTX4090-PCIe --resident 8 --phase decode --batch-tokens 4
    moesim simulate mini.moetrace --policy fate --profile 1xRTX4090-PCIe --resident 8 --quality quality.json
    moesim simulate mini.moetrace --policy all --profile here.json --gpus 2 --out simulated.json
    """
    baseline = baseline or default_baseline(None if resident is None else 1)
    qualities = load_qualities(quality) if quality else []
    names = policy_names(policy, baseline, offload=resident is not None)
    hardware = load_profile(profile)
    gpus = hardware.gpus if gpus is None else gpus
    hardware.check_gpus(gpus)
    opened = _open(trace)
    spec = opened.spec.with_widths(shapes) if shapes else opened.spec
    spec.sized()
    slots = None if resident is None else slots_of(resident, -(-spec.num_experts // gpus))
    which = Phase[phase.upper()] if phase else default_phase(spec)
    rows, gates = opened.rows(STACK_OF_PHASE[which]), opened.gates(STACK_OF_PHASE[which])
    if policy.strip() == "all":
        router = RouterSpec(num_experts=spec.num_experts, top_k=spec.top_k, gates=gates)
        names = _able(names, rows, router, served=serving is not None)
    if serving and max_steps:
        raise InputError("--max-steps and --arrivals exclude each other: an open loop ends with its --requests")
    scenario = make_scenario(
        spec,
        rows,
        phase=which,
        gpus=gpus,
        workload=workload,
        extra_slots=extra_slots,
        resident=slots,
        node_size=hardware.node_size,
        max_steps=max_steps,
        request_texts=opened.request_texts,
        gates=gates,
        served=serving is not None,
    )
    inputs = Inputs(
        scenario=replace(scenario, model_digest=opened.model_digest),
        profile=hardware,
        execution=execution,
        serving=serving,
        faults=faults,
        keep_steps=picture is not None,
    )
    with ExitStack() as stack:
        wanted = {"events": event_log, "decisions": decision_log}
        if timeline and not event_log:
            wanted["events"] = Path(stack.enter_context(TemporaryDirectory(prefix="moesim-"))) / "events.jsonl"
        logs = {log: path for log, path in wanted.items() if path}
        results = _run_all(names, inputs, logs, workers, out)
        if timeline:
            events = read_log(logs["events"])
            with writing(timeline):
                timeline.write_text(json.dumps(make_timeline(events)), encoding="utf-8")
            results = [replace(result, spans=spans_of(events[result.policy])) for result in results]
            if out:
                _save(results, out)
    if picture:
        load_over_time(results, picture, "Tokens on each GPU, layer after layer")
    if as_json:
        click.echo(json.dumps(results_json(results, baseline, qualities), indent=1))
    else:
        print_results(results, baseline, qualities=qualities)


def _run_all(names: list[str], inputs: Inputs, logs: dict[str, Path], workers: int, out: Path | None) -> list[Result]:
    """All results, each kept as soon as it is there. Raises InputError naming what had finished where one fails."""
    results: list[Result] = []
    try:
        for result in _with_progress(names, inputs, logs, workers):
            results.append(result)
            if out:
                _save(results, out)
    except KeyboardInterrupt:
        click.echo(_interrupted(results, out), err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except MoesimError as error:
        if not results:
            raise
        done = ", ".join(result.policy for result in results)
        kept = f"kept in {out}" if out else "not kept (--out FILE keeps it)"
        raise InputError(f"{names[len(results)]}: {error}; done before and {kept}: {done}") from None
    return results


def _with_progress(names: list[str], inputs: Inputs, logs: dict[str, Path], workers: int) -> Iterator[Result]:
    """Results with a progress bar where stderr is a terminal: steps of each policy, or policies with workers."""
    console = Console(stderr=True)
    steps = len(inputs.scenario.batches) or None
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        together = progress.add_task("policies", total=len(names))
        tasks = {} if workers > 1 else {name: progress.add_task(name, total=steps, start=False) for name in names}

        def tick(name: str, done: int) -> None:
            progress.start_task(tasks[name])
            progress.update(tasks[name], completed=done)

        for result in run_policies(names, inputs, logs=logs, workers=workers, progress=tick if tasks else None):
            progress.advance(together)
            yield result


def policy_names(policy: str, baseline: str, offload: bool = False) -> list[str]:
    """The baseline, then the policies of a comma-separated list, each once; `all` are those that need every expert on a
    GPU or, with `offload`, those that do not. Raises InputError for an unknown name."""
    if policy.strip() == "all":
        asked: Sequence[str] = offloading() if offload else [name for name in POLICIES if name not in offloading()]
    else:
        asked = [name.strip() for name in policy.split(",") if name.strip()]
    names = list(dict.fromkeys([baseline, *asked]))
    for name in names:
        recipe(name)
    if not asked:
        raise InputError(f"--policy names no policy; known: {', '.join(POLICIES)}")
    return names


def _able(names: list[str], rows: TokenTable | LoadTable, router: RouterSpec, served: bool) -> list[str]:
    """Of all policies those that are fitted quickly and on this recording, each once; says which were left out. The
    baseline, which comes first, was asked for and stays."""
    reasons: dict[str, list[str]] = {}
    for name in names[1:]:
        twin = next((other for other in names[: names.index(name)] if recipe(other) is recipe(name)), None)
        why = f"is the same as {twin}" if twin else None
        if why is None and is_trained(name):
            why = "trains a net first, so it is run where it is named"
        if why is None and served and recipe(name).eviction in ORACLES:
            why = "is shown the future, which an open loop does not have yet"
        why = why or unfit(name, rows, router)
        if why is not None:
            reasons.setdefault(why, []).append(name)
    if reasons:
        click.echo("left out: " + "; ".join(f"{', '.join(some)} ({why})" for why, some in reasons.items()), err=True)
    gone = {name for some in reasons.values() for name in some}
    return [name for name in names if name not in gone]


def default_phase(spec: ModelSpec) -> Phase:
    """The encoder where the model has one, else prefill."""
    return Phase.ENCODER if any(stack.name == "encoder" for stack in spec.stacks) else Phase.PREFILL


def _open(path: Path) -> Trace:
    from moesim.traces.store import Trace  # reads safetensors: --help does without

    return Trace.open(path)


def _save(results: list[Result], out: Path) -> None:
    with writing(out):
        save_results(results, out)


def _interrupted(results: list[Result], out: Path | None) -> str:
    if not out:
        return "Interrupted; nothing is kept (--out FILE keeps the policies that are done)."
    if not results:
        return "Interrupted before the first policy was done; nothing is kept."
    return f"Interrupted; kept in {out}: {', '.join(result.policy for result in results)}."
