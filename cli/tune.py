"""`moesim tune`: the winner under constraints, chosen on some held-out requests and confirmed on others."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moesim.cli.options import execution_options, workload_options
from moesim.cli.report import WIDTH
from moesim.cli.simulate import default_phase
from moesim.sim.execution import Execution
from moesim.sim.policies import POLICIES, default_baseline
from moesim.sim.policies.files import recipe_toml
from moesim.sim.profile import load_profile, shipped_profiles
from moesim.sim.quality import load_qualities
from moesim.sim.scenario import STACK_OF_PHASE, make_scenario
from moesim.sim.sweep_store import trace_digest
from moesim.sim.tune import (
    Candidate,
    Constraints,
    Trial,
    Tuned,
    candidates,
    default_policies,
)
from moesim.sim.tune import tune as choose
from moesim.traces import InputError, Phase, Workload
from moesim.traces.spec import PUBLISHED
from moesim.traces.store import Trace
from moesim.traces.versions import version

SHOWN = 12
"""Candidates in the table; --json has all."""
OF_SIMULATE = ("profile", "gpus", "phase", "shapes", "resident", "batch_tokens", "batch_requests", "batch_recorded",
               "chunked", "shuffle", "split", "dtype", "contention", "tensor_parallel", "micro_batches", "send",
               "copy_dtype", "overlap")  # fmt: skip
"""Options that `moesim simulate` has, too."""
file_option = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--profile", required=True, help=f"A file of moesim calibrate, or: {', '.join(shipped_profiles())}.")
@click.option("--gpus", type=int, help="GPUs of the profile to use.  [default: all]")
@click.option("--policies", help="Comma-separated candidates.  [default: all that machines can run; with --resident: "
              "those for fewer slots than experts]")  # fmt: skip
@click.option("--extra-slots", default="0,1,2", show_default=True, help="Replica slots to try, comma-separated.")
@click.option("--as-named", is_flag=True, help="Try policies only as they are, at no other intervals.")
@workload_options
@click.option("--phase", type=click.Choice([p.name.lower() for p in Phase]), help="[default: encoder, else prefill]")
@click.option("--resident", type=int, help="Slots per GPU and layer where host memory has the rest.  [default: all]")
@click.option("--max-steps", type=click.IntRange(min=1), help="Tune, and confirm, on the first steps only.")
@click.option("--shapes", type=click.Choice(list(PUBLISHED)), help="Cost the routing in these widths.  [default: own]")
@execution_options
@click.option("--memory-gib", type=float, help="Most memory for expert slots on a GPU.")
@click.option("--latency-ms", type=float, help="95% of the steps must take no longer.")
@click.option("--exact/--allow-lossy", default=True, show_default=True, help="Whether results must be the model's.")
@click.option("--quality", type=file_option, help="A file of moesim quality, for lossy policies.")
@click.option("--budget-seconds", type=float, help="Begin no further run after so much time; not reproducible.")
@click.option("--out", type=file_option, help="Write the winner here, a policy file (TOML).")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON, and nothing else on stdout.")
@click.pass_context
def tune(
    ctx: click.Context,
    trace: Path,
    profile: str,
    gpus: int | None,
    policies: str | None,
    extra_slots: str,
    as_named: bool,
    workload: Workload,
    phase: str | None,
    resident: int | None,
    max_steps: int | None,
    shapes: str | None,
    execution: Execution,
    memory_gib: float | None,
    latency_ms: float | None,
    exact: bool,
    quality: Path | None,
    budget_seconds: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose the policy and its settings for TRACE: fitted, tuned and confirmed on three parts of its requests.

    Successive halving in simulated time. Among candidates that cannot be told from the fastest by the spread of
    their steps, the one that moves the fewest bytes wins. The speedup that counts is the confirmed one.

    \b
    moesim tune mini.moetrace --profile 8xH100-NVLink --out winner.toml
    moesim tune mini.moetrace --profile 8xH100-NVLink --gpus 4 --memory-gib 2 --latency-ms 5 --out winner.toml
    moesim tune mini.moetrace --profile 1xRTX4090-PCIe --resident 8 --phase decode --batch-tokens 4
    moesim simulate mini.moetrace --policy winner.toml --profile 8xH100-NVLink
    """
    hardware, opened = load_profile(profile), Trace.open(trace)
    gpus = hardware.gpus if gpus is None else gpus
    hardware.check_gpus(gpus)
    which = Phase[phase.upper()] if phase else default_phase(opened.spec)
    spec = opened.spec.with_widths(shapes) if shapes else opened.spec
    spec.sized()
    names = [one.strip() for one in policies.split(",") if one.strip()] if policies else []
    choice = candidates(names or default_policies(offload=resident is not None), _slots(extra_slots), as_named=as_named)
    scenario = make_scenario(
        spec,
        opened.rows(STACK_OF_PHASE[which]),
        phase=which,
        gpus=gpus,
        workload=workload,
        resident=resident,
        node_size=hardware.node_size,
        request_texts=opened.request_texts,
        gates=opened.gates(STACK_OF_PHASE[which]),
    )
    constraints = Constraints(
        memory_bytes=None if memory_gib is None else round(memory_gib * 2**30),
        latency_s=None if latency_ms is None else latency_ms / 1e3,
        allow_lossy=not exact,
        qualities=tuple(load_qualities(quality)) if quality else (),
    )
    with _progress() as progress:
        tuned = choose(
            scenario,
            hardware,
            choice,
            baseline=default_baseline(resident),
            execution=execution,
            constraints=constraints,
            max_steps=max_steps,
            budget_s=budget_seconds,
            progress=progress,
        )
    found = {
        "trace": trace.name,
        "trace_sha256": trace_digest(trace),
        "profile": hardware.name,
        "profile_kind": hardware.provenance.kind,
        "gpus": gpus,
        "phase": which.name.lower(),
        **scenario.workload.describe(),
        **_numbers(tuned, tuned.winner),
        **{f"{part}_requests": count for part, count in tuned.requests.items()},
        "constraints": _constraints(constraints),
        "moesim": version("moesim"),
    }
    if out:
        write_winner(tuned.winner.candidate, found, out)
    one = tuned.winner.candidate
    charged = one.policy in hardware.decide_s
    command = _command(ctx, trace, one, out if one.changes or not charged else None)
    if as_json:
        everyone = [{**_numbers(tuned, trial), "reason": trial.reason} for trial in tuned.trials]
        told = {"winner": found, "ties": tuned.ties, "cut_short": tuned.cut_short, "command": command}
        click.echo(json.dumps({**told, "steps": tuned.steps, "candidates": everyone}, indent=1))
    else:
        _print(tuned, constraints, command)


def write_winner(candidate: Candidate, found: dict[str, Any], out: Path) -> None:
    """A policy file that says how it was found: `base` and the changed parts; of a user's own policy all parts.

    Raises InputError where it cannot be written, or the policy has parts without a name.
    """
    parts = candidate.recipe()
    if candidate.policy not in POLICIES:
        text = recipe_toml(parts)
    else:
        text = f"base = {json.dumps(candidate.policy)}\n"
        if candidate.changes:
            whole = recipe_toml(parts)
            text += "\n" + whole[whole.index("[rule]") :]
    lines = [f"{name} = {json.dumps(value)}" for name, value in found.items() if value is not None]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n[found]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None


def _slots(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--extra-slots {text!r}: give numbers separated by commas") from None


def _constraints(constraints: Constraints) -> list[str]:
    words = [] if constraints.allow_lossy else ["exact"]
    if constraints.memory_bytes is not None:
        words.append(f"expert slots within {constraints.memory_bytes / 2**30:.4g} GiB a GPU")
    if constraints.latency_s is not None:
        words.append(f"95% of the steps within {1e3 * constraints.latency_s:g} ms")
    return words


def _numbers(tuned: Tuned, trial: Trial) -> dict[str, Any]:
    ran = trial.steps > 0
    return {
        "policy": trial.candidate.policy,
        "extra_slots": trial.candidate.extra_slots,
        "changes": [f"{name} {value}" for name, value in trial.candidate.changes],
        "baseline": tuned.baseline,
        "quality": trial.quality,
        "steps": trial.steps,
        "tuned_speedup": trial.speedup if ran else None,
        "confirmed_speedup": trial.confirmed,
        "tuned_p95_s": trial.latency_p95_s if ran else None,
        "confirmed_p95_s": trial.confirmed_p95_s,
        "moved_bytes": trial.moved_bytes,
        "expert_bytes_per_gpu": trial.memory_bytes,
    }


def _command(ctx: click.Context, trace: Path, winner: Candidate, out: Path | None) -> str:
    """How to simulate the winner on all held-out requests, with the same options; `out` is its file, None where its
    name says all."""
    words = ["moesim", "simulate", str(trace), "--policy", str(out) if out else winner.policy]
    for name in OF_SIMULATE:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            value, option = ctx.params[name], name.replace("_", "-")
            words.append(f"--no-{option}" if value is False else f"--{option}")
            words += [] if isinstance(value, bool) else [str(value)]
    return shlex.join([*words, "--extra-slots", str(winner.extra_slots)])


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("tuning", total=None)

        def tell(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        yield tell


def _print(tuned: Tuned, constraints: Constraints, command: str) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table = Table(title=f"Speedup over {tuned.baseline}, simulated", title_justify="left")
    table.add_column("candidate", overflow="fold")
    for name in ("steps", "tuned", "confirmed", "p95 ms", "MiB/GPU", "moved MiB"):
        table.add_column(name, justify="right")
    lossy = any(trial.quality != "exact" and trial.reason is None for trial in tuned.trials)
    if lossy:
        table.add_column("quality")
    good = [trial for trial in tuned.trials if trial.reason is None]
    shown = _different(good)[:SHOWN]
    for trial in shown:
        bold = "bold" if trial is tuned.winner else None
        table.add_row(*_cells(trial), *([trial.quality] if lossy else []), style=bold)
    console.print(table)
    for line in _footnotes(tuned, constraints, len(good) - len(shown)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(command, style="bold", highlight=False, soft_wrap=True)


def _different(good: list[Trial]) -> list[Trial]:
    """Of candidates of one policy that did the same, only the one with the least memory."""
    found: dict[Any, Trial] = {}
    for trial in sorted(good, key=lambda trial: trial.simplicity()):
        found.setdefault((trial.candidate.policy, trial.speedup, trial.moved_bytes, trial.steps), trial)
    return [trial for trial in good if any(trial is one for one in found.values())]


def _cells(trial: Trial) -> list[str]:
    if not trial.steps:
        return [trial.candidate.name, "0", "-", "-", "-", "-", "-"]
    return [
        trial.candidate.name,
        str(trial.steps),
        f"{trial.speedup:.3f}x",
        "-" if trial.confirmed is None else f"{trial.confirmed:.3f}x",
        f"{1e3 * trial.latency_p95_s:.3f}",
        f"{trial.memory_bytes / 2**20:,.0f}",
        f"{trial.moved_bytes / 2**20:,.1f}",
    ]


def _footnotes(tuned: Tuned, constraints: Constraints, hidden: int) -> list[str]:
    winner, r, s = tuned.winner, tuned.requests, tuned.steps
    assert winner.confirmed is not None, "the winner is confirmed"
    lines = [
        f"winner: {winner.candidate.name}: tuned {winner.speedup:.3f}x, confirmed {winner.confirmed:.3f}x"
        + (f"; quality: {winner.quality}." if winner.quality != "exact" else "."),
        f"fitted on {r['fit']} requests, tuned on {r['tune']} others ({s['tune']} steps), confirmed on {r['confirm']} "
        f"that the choice never saw ({s['confirm']} steps). MiB/GPU: of the expert slots.",
        f"constraints: {', '.join(_constraints(constraints)) or 'none'}.",
    ]
    if tuned.ties:
        others = f" and {len(tuned.ties) - 3} more" if len(tuned.ties) > 3 else ""
        lines.append(
            f"faster by no more than the noise of the steps, and not simpler (bytes moved, then memory): "
            f"{'; '.join(tuned.ties[:3])}{others}."
        )
    if winner.confirmed < 1 < winner.speedup:
        lines.append("NOT CONFIRMED: on the requests that the choice never saw it is slower than the baseline.")
    late = winner.confirmed_p95_s
    if constraints.latency_s is not None and late is not None and late > constraints.latency_s:
        lines.append(f"NOT CONFIRMED: there 95% of its steps take up to {1e3 * late:.3f} ms.")
    if hidden:
        lines.append(f"not shown: {hidden} candidates, slower or with other settings that change nothing (--json).")
    if tuned.cut_short:
        lines.append("cut short by --budget-seconds: not all candidates ran all steps they should have.")
    out: dict[str, list[str]] = {}
    for trial in tuned.trials:
        if trial.reason:
            out.setdefault(trial.reason, []).append(trial.candidate.name)
    return [*lines, *(f"out: {', '.join(names)}: {reason}" for reason, names in out.items())]
