"""`moesim trace synth`: made-up routing with asked-for statistics, always labelled synthetic."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from moesim.cli.record import progress_bar
from moesim.traces import InputError, ModelSpec, TokenTable, concat
from moesim.traces.spec import PUBLISHED
from moesim.traces.store import Trace
from moesim.traces.synthetic import NOT_MODELLED, Shape, domains_of_requests, generate, synthetic_spec
from moesim.traces.synthetic_fit import Statistics, fit, measure, not_reached
from moesim.traces.writer import TraceWriter

MEASURED_TOKENS = 1 << 18
"""Tokens of the result, and of the trace that it is made like, that are measured at most."""


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The trace to write, NAME.moetrace.")
@click.option("--like", type=click.Path(path_type=Path), help="Take shape and statistics from this trace.")
@click.option("--experts", type=int, default=64, show_default=True)
@click.option("--layers", type=int, default=12, show_default=True)
@click.option("--top-k", type=int, default=2, show_default=True)
@click.option("--requests", type=int, default=256, show_default=True)
@click.option("--request-tokens", type=int, default=128, show_default=True)
@click.option("--skew", type=float, help="Max / mean expert load of a window.  [default: 3]")
@click.option("--drift", type=float, help="Share of the load that moves between windows, noise included.")
@click.option("--coupling", type=float, help="Accuracy of guessing the next layer's first expert.")
@click.option("--overlap", type=float, help="Share of its experts that a token has in common with the one before.")
@click.option("--domains", type=int, default=1, show_default=True, help="Kinds of requests.")
@click.option("--domain-shift", type=float, help="Distance of a domain's load from that of all, 0 to 1.")
@click.option("--arrival", type=click.Choice(["mixed", "blocks"]), default="mixed", show_default=True)
@click.option("--window-tokens", type=int, default=512, show_default=True, help="Window of skew and drift.")
@click.option("--shapes", type=click.Choice(list(PUBLISHED)), help="Widths of a published model, for the simulator.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing trace.")
@click.option("--json", "as_json", is_flag=True, help="Print targets and what was reached as JSON.")
def synth(
    out: Path,
    like: Path | None,
    skew: float | None,
    drift: float | None,
    coupling: float | None,
    overlap: float | None,
    domain_shift: float | None,
    shapes: str | None,
    seed: int,
    force: bool,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Make up a recording with given skew, drift, domains and structure; prints what it reached and what it lacks.

    What is not asked for is not fitted. With --like, sizes and statistics come from a trace (its first 262,144 tokens),
    except those that are given as options.

    \b
    moesim trace synth --skew 4 --drift 0.2 --out skewed.moetrace
    moesim trace synth --like mini.moetrace --requests 2000 --out longer.moetrace
    moesim trace synth --domains 2 --domain-shift 0.4 --arrival blocks --out shift.moetrace
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another name, or replace it with --force")
    asked = {"drift": drift, "next_layer": coupling, "adjacent": overlap, "domain": domain_shift}
    for name, value in zip(("--drift", "--coupling", "--overlap", "--domain-shift"), asked.values(), strict=True):
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{name} must lie between 0 and 1, got {value:g}")
    if like:
        spec, shape, target = _like(like, sizes, asked, skew)
    else:
        shape = Shape(**sizes)
        spec = synthetic_spec(shape)
        target = Statistics(skew=(3.0 if skew is None else skew,) * shape.layers, **asked)
    spec = spec.with_widths(shapes) if shapes else spec
    report = make_trace(spec, shape, target, seed, out, like, force=force)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(report)


def _like(
    path: Path, sizes: dict[str, Any], asked: dict[str, float | None], skew: float | None
) -> tuple[ModelSpec, Shape, Statistics]:
    """Model, sizes and statistics of a trace; what was given on the command line goes before."""
    given = {name: value for name, value in sizes.items() if _is_given(name)}
    trace = Trace.open(path)
    stack = "decoder" if "decoder" in trace.stacks else trace.stacks[0]
    table = _first_tokens(trace, stack)
    requests = len(set(table.request.tolist()))
    found = {
        "experts": trace.spec.num_experts,
        "layers": table.num_layers,
        "top_k": trace.spec.top_k,
        "requests": requests,
        "request_tokens": max(len(table) // requests, 1),
        "domains": max(len(set(trace.request_texts)), 1),
    }
    fixed = sorted({"experts", "layers", "top_k"} & given.keys())
    if fixed:
        raise InputError(f"--{fixed[0].replace('_', '-')} comes from the trace with --like; leave it out")
    shape = Shape(**{**sizes, **found, **given})
    names = list(trace.request_texts)
    domains = [sorted(set(names)).index(name) for name in names] if shape.domains > 1 and names else None
    measured = measure(table, shape.experts, shape.window_tokens, domains)
    changes = {name: value for name, value in asked.items() if value is not None}
    target = Statistics(
        skew=measured.skew if skew is None else (skew,) * shape.layers,
        **{**{name: getattr(measured, name) for name in asked}, **changes},
    )
    family = f"synthetic:{trace.spec.family}"
    return synthetic_spec(shape, family), shape, target


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def _first_tokens(trace: Trace, stack: str) -> TokenTable:
    parts, tokens = [], 0
    for part in trace.parts(stack):
        parts.append(part)
        tokens += len(part)
        if tokens >= MEASURED_TOKENS:
            break
    return concat(parts).take(slice(MEASURED_TOKENS))


def make_trace(
    spec: ModelSpec, shape: Shape, target: Statistics, seed: int, out: Path, like: Path | None, *, force: bool
) -> dict[str, Any]:
    """Fit the generator to `target` and write what it makes to `out`; a report of what was reached. Raises InputError
    where a statistic cannot be measured."""
    with progress_bar("fitting") as progress:
        knobs = fit(target, shape, seed, progress)
    about = {
        "synthetic": True,
        "generator": {
            "seed": seed,
            "shape": asdict(shape),
            "knobs": asdict(knobs),
            "like": like.name if like else None,
        },
        "not_modelled": list(NOT_MODELLED),
        "versions": {name: version(name) for name in ("moesim", "numpy")},
    }
    domain_R = domains_of_requests(shape, seed)
    kept: list[TokenTable] = []
    done = 0
    with TraceWriter(out, spec, about, overwrite=force) as writer, progress_bar("writing") as progress:
        writer.add_requests([f"domain-{d}" for d in domain_R])
        for part in generate(shape, knobs, seed):
            writer.append("decoder", part)
            if done < MEASURED_TOKENS:
                kept.append(part)
            done += len(part)
            progress(done, shape.tokens)
        domains = domain_R.tolist() if shape.domains > 1 else None
        reached = measure(concat(kept), shape.experts, shape.window_tokens, domains)
        missed = not_reached(target, reached)
        told = {"target": target.to_dict(), "reached": reached.to_dict(), "not_reached": missed}
        writer.provenance.update(told)
    return {"trace": str(out), "tokens": shape.tokens, "window_tokens": shape.window_tokens, **told, **about}


def _print(report: dict[str, Any]) -> None:
    click.echo(f"{report['trace']}: synthetic, {report['tokens']:,} tokens")
    table = Table()
    for column in ("statistic", "target", "reached", ""):
        table.add_column(column, justify="left" if column == "statistic" else "right")
    for name, goal in report["target"].items():
        reached = report["reached"][name]
        verdict = "not fitted" if goal is None else "NOT REACHED" if name in report["not_reached"] else "matched"
        table.add_row(name, _number(goal), _number(reached), verdict)
    Console().print(table)
    click.echo(
        f"windows of {report['window_tokens']} tokens, sampling noise included; matched: within 10%. Not modelled: "
        f"{'; '.join(report['not_modelled'])}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
