"""`moesim simulate`: policies on a simulated node, from a recorded trace. Starts without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

import click
from rich.console import Console
from rich.progress import Progress, TaskID

from moesim.cli.options import workload_options
from moesim.cli.picture import load_over_time
from moesim.cli.report import print_results, results_json
from moesim.sim.contention import Contention
from moesim.sim.engine import simulate as run_simulation
from moesim.sim.policies import POLICIES, make_policy, needs_tokens, recipe
from moesim.sim.profile import HardwareProfile, load_profile, shipped_profiles
from moesim.sim.results import Result, save_results
from moesim.sim.scenario import STACK_OF_PHASE, Scenario, make_scenario
from moesim.sim.timeline import timeline as make_timeline
from moesim.traces import InputError, ModelSpec, Phase, Workload
from moesim.traces.spec import DTYPE_BYTES, PUBLISHED

if TYPE_CHECKING:
    from moesim.traces.store import Trace

INTERRUPTED = 130

file_option = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--policy", required=True, help=f"Comma-separated, or all: {', '.join(POLICIES)}.")
@click.option("--baseline", default="contiguous", show_default=True, help="Policy that every speedup refers to.")
@click.option("--profile", required=True, help=f"A file of moesim calibrate, or: {', '.join(shipped_profiles())}.")
@click.option("--gpus", type=int, help="GPUs of the profile to use.  [default: all]")
@workload_options
@click.option("--phase", type=click.Choice([p.name.lower() for p in Phase]), help="[default: encoder, else prefill]")
@click.option("--extra-slots", type=int, default=1, show_default=True, help="Replica slots per GPU and layer.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Run only the first steps.")
@click.option("--dtype", type=click.Choice(list(DTYPE_BYTES)), help="Weights and activations.  [default: as recorded]")
@click.option(
    "--shapes",
    type=click.Choice(list(PUBLISHED)),
    help="Cost the recorded routing in a model of these widths.  [default: own]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, and nothing else on stdout.")
@click.option("--out", type=file_option, help="Write the results here, for moesim compare; kept on Ctrl-C.")
@click.option("--picture", type=file_option, help="Draw the load of each GPU over time under every policy, PNG.")
@click.option(
    "--contention",
    type=click.Choice(get_args(Contention)),
    default="none",
    show_default=True,
    help="Copies and all-to-alls on the same wires: ignore each other, copies pause, both get half.",
)
@click.option("--timeline", type=file_option, help="Write what happens when for Perfetto or Chrome, JSON.")
@click.option("--event-log", type=file_option, help="Write what happens when, as JSON lines.")
@click.option("--decision-log", type=file_option, help="Write the policies' decisions, as JSON lines.")
def simulate(
    trace: Path,
    policy: str,
    baseline: str,
    profile: str,
    gpus: int | None,
    workload: Workload,
    phase: str | None,
    extra_slots: int,
    max_steps: int | None,
    dtype: str | None,
    shapes: str | None,
    as_json: bool,
    out: Path | None,
    picture: Path | None,
    contention: Contention,
    timeline: Path | None,
    event_log: Path | None,
    decision_log: Path | None,
) -> None:
    """Simulate policies on the requests of TRACE and print their speedup over a baseline.

    Policies are fitted on one half of the trace's requests and run on the other. The baseline is always run too.

    \b
    moesim simulate mini.moetrace --policy all --profile 8xH100-NVLink
    moesim simulate mini.moetrace --policy all --profile 8xA100-NVLink --gpus 4 --shapes switch-base --dtype bfloat16
    moesim simulate mini.moetrace --policy eplb --profile here.json --gpus 2 --phase decode --json
    moesim simulate mini.moetrace --policy all --profile here.json --gpus 2 --out simulated.json
    """
    names = policy_names(policy, baseline)
    hardware = load_profile(profile)
    gpus = hardware.gpus if gpus is None else gpus
    hardware.check_gpus(gpus)
    opened = _open(trace)
    if policy.strip() == "all" and opened.kind == "loads":
        names = _content_with_loads(names)
    spec = opened.spec.with_widths(shapes) if shapes else opened.spec
    spec.sized()
    which = Phase[phase.upper()] if phase else default_phase(spec)
    scenario = make_scenario(
        spec,
        opened.rows(STACK_OF_PHASE[which]),
        phase=which,
        gpus=gpus,
        workload=workload,
        extra_slots=extra_slots,
        max_steps=max_steps,
        request_texts=opened.request_texts,
    )
    results: list[Result] = []
    happened: dict[str, list[dict[str, Any]]] | None = {} if timeline else None
    with ExitStack() as stack:
        events, decisions, drawn = (stack.enter_context(_opened(path)) for path in (event_log, decision_log, timeline))
        try:
            for result in _run_all(names, scenario, hardware, dtype, contention, events, decisions, happened):
                results.append(result)
                if out:
                    _save(results, out)
        except KeyboardInterrupt:
            click.echo(_interrupted(results, out), err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        if drawn and happened is not None:
            json.dump(make_timeline(happened), drawn)
    if picture:
        load_over_time(results, picture, "Tokens on each GPU, layer after layer")
    if as_json:
        click.echo(json.dumps(results_json(results, baseline), indent=1))
    else:
        print_results(results, baseline)


def policy_names(policy: str, baseline: str) -> list[str]:
    """The baseline, then the policies of a comma-separated list (or all), each once. Raises InputError for an unknown
    name."""
    asked = list(POLICIES) if policy.strip() == "all" else [name.strip() for name in policy.split(",") if name.strip()]
    names = list(dict.fromkeys([baseline, *asked]))
    for name in names:
        recipe(name)
    if not asked:
        raise InputError(f"--policy names no policy; known: {', '.join(POLICIES)}")
    return names


def _content_with_loads(names: list[str]) -> list[str]:
    """Those of `names` that need no tokens; says which were left out."""
    left_out = [name for name in names if needs_tokens(name)]
    click.echo(f"left out, as the trace holds loads and no tokens: {', '.join(left_out)}", err=True)
    return [name for name in names if name not in left_out]


def default_phase(spec: ModelSpec) -> Phase:
    """The encoder where the model has one, else prefill."""
    return Phase.ENCODER if any(stack.name == "encoder" for stack in spec.stacks) else Phase.PREFILL


def _open(path: Path) -> Trace:
    from moesim.traces.store import Trace  # reads safetensors: --help does without

    return Trace.open(path)


def _run_all(
    names: list[str],
    scenario: Scenario,
    hardware: HardwareProfile,
    dtype: str | None,
    contention: Contention,
    events: TextIO | None,
    decisions: TextIO | None,
    kept: dict[str, list[dict[str, Any]]] | None,
) -> Iterator[Result]:
    """Simulate one policy after the other, with a progress bar where stderr is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        for name in names:
            task = progress.add_task(name, total=len(scenario.batches))
            happened: list[dict[str, Any]] | None = [] if events or kept is not None else None
            result = run_simulation(
                scenario,
                make_policy(name, scenario.cluster, scenario.fit),
                hardware,
                sink=partial(_write, decisions, name) if decisions else None,
                dtype=dtype,
                contention=contention,
                event_log=happened,
                progress=partial(_tick, progress, task),
            )
            for event in (happened or ()) if events else ():
                _write(events, name, event)
            if kept is not None and happened is not None:
                kept[name] = happened
            yield result


def _tick(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def _write(file: TextIO | None, policy: str, record: dict[str, Any]) -> None:
    assert file is not None, "only called where there is a log"
    file.write(json.dumps({"policy": policy, **record}, sort_keys=True, separators=(",", ":")) + "\n")


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        yield file


def _save(results: list[Result], out: Path) -> None:
    try:
        save_results(results, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None


def _interrupted(results: list[Result], out: Path | None) -> str:
    if not out:
        return "Interrupted; nothing is kept (--out FILE keeps the policies that are done)."
    if not results:
        return "Interrupted before the first policy was done; nothing is kept."
    return f"Interrupted; kept in {out}: {', '.join(result.policy for result in results)}."
