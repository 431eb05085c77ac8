"""`moesim trace export`: recordings for other tools, and plans that servers load."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moesim.cli.options import workload_options
from moesim.cli.simulate import default_phase
from moesim.sim.plans import PLAN_FORMATS, Plan, make_plan, plan_text
from moesim.sim.policies import POLICIES
from moesim.sim.scenario import STACK_OF_PHASE, unsplit_scenario
from moesim.traces import InputError, Phase, Workload
from moesim.traces.formats import FORMATS
from moesim.traces.store import Trace

WRITABLE = [name for name, known in FORMATS.items() if known.write]


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--format", "format_", required=True, type=click.Choice([*WRITABLE, *PLAN_FORMATS]))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file or folder to write.")
@click.option("--stack", type=click.Choice(["encoder", "decoder"]), help="[default: the only one, else decoder]")
@click.option("--policy", help=f"Plans: whose residency. One of: {', '.join(POLICIES)}; oracles have no plan.")
@click.option("--gpus", type=int, help="Plans: expert-parallel ranks.")
@click.option("--extra-slots", type=int, default=1, show_default=True, help="Plans: redundant experts per GPU.")
@click.option("--phase", type=click.Choice([p.name.lower() for p in Phase]), help="[default: encoder, else prefill]")
@workload_options
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    trace: Path,
    format_: str,
    out: Path,
    stack: str | None,
    policy: str | None,
    gpus: int | None,
    extra_slots: int,
    phase: str | None,
    workload: Workload,
    force: bool,
    as_json: bool,
) -> None:
    """Write TRACE in the format of another tool, or the plan of a policy for a server.

    A plan is what the policy would have resident after running the whole recording (nothing is scored, so nothing is
    held out); it is checked by the server's own rules before it is written.

    \b
    moesim trace export mini.moetrace --format parquet --out mini.parquet
    moesim trace export mini.moetrace --format sglang-plan --policy eplb --gpus 8 --out plan.json
    moesim trace export mini.moetrace --format tensorrt-plan --policy balanced --gpus 4 --extra-slots 2 --out plan.yaml
    """
    opened = Trace.open(trace)
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another name, or replace it with --force")
    if format_ in PLAN_FORMATS:
        plan = _plan(opened, format_, policy, gpus, extra_slots, phase, workload)
        _replace(out, plan_text(plan, format_))
        report = {"slots": plan.slots, "redundant": plan.redundant, "gpus": plan.gpus, "policy": policy}
        hint = PLAN_FORMATS[format_].hint.format(path=out, redundant=plan.redundant, gpus=plan.gpus)
        lines = [f"{out}: {plan.slots} slots a layer on {plan.gpus} GPUs, {plan.redundant} of them redundant", hint]
    else:
        name = _stack(opened, stack)
        _export(opened, format_, name, out, force=force)
        report, lines = {"stack": name}, [f"{out}: {name} of {trace} as {format_}"]
    click.echo(json.dumps({"out": str(out), "format": format_, **report}) if as_json else "\n".join(lines))


def _plan(
    opened: Trace,
    format_: str,
    policy: str | None,
    gpus: int | None,
    extra_slots: int,
    phase: str | None,
    workload: Workload,
) -> Plan:
    if policy is None or gpus is None:
        raise InputError(f"--format {format_} needs --policy and --gpus")
    which = Phase[phase.upper()] if phase else default_phase(opened.spec)
    scenario = unsplit_scenario(
        opened.spec,
        opened.rows(STACK_OF_PHASE[which]),
        phase=which,
        gpus=gpus,
        workload=workload,
        extra_slots=extra_slots,
    )
    return make_plan(policy, scenario)


def _stack(opened: Trace, asked: str | None) -> str:
    if asked is not None or len(opened.stacks) == 1:
        return asked or opened.stacks[0]
    return "decoder"


def _export(opened: Trace, format_: str, stack: str, out: Path, *, force: bool) -> None:
    """Write beside `out`, then put it in its place: what was there stays until the new one is whole."""
    write = FORMATS[format_].write
    assert write is not None, "one of WRITABLE"
    out.parent.mkdir(parents=True, exist_ok=True)
    if not (force and out.exists()):
        write(opened, stack, out)
        return
    if out.is_dir():
        raise InputError(f"{out} is a folder, and folders are not replaced; choose another name")
    beside = out.with_name(f"{out.stem}.partial{out.suffix}")
    beside.unlink(missing_ok=True)
    write(opened, stack, beside)
    beside.replace(out)


def _replace(out: Path, text: str) -> None:
    temporary = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
