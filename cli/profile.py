"""`moesim profile`: what the cost model knows of a node, and whether a file of one's own is sound."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from moesim.sim.curves import EXPERT_RULE, MESSAGE_RULE, MessageCurve
from moesim.sim.profile import HardwareProfile, load_profile, shipped_profiles

UNITS = {
    "_flops_per_s": (1e12, "TFLOP/s"),
    "_bytes_per_s": (1e9, "GB/s"),
    "_bytes": (1e9, "GB"),
    "_s": (1e-6, "µs"),
}
"""Ending of a field's name to scale and unit, longest first."""
NOISE = 0.1
"""Share by which a measured time may be off before `check` warns."""


@click.group()
def profile() -> None:
    """Look at hardware profiles and check files of your own.

    \b
    moesim profile list
    moesim profile show 8xH100-NVLink
    moesim profile check here.json
    """


@profile.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def list_profiles(as_json: bool) -> None:
    """List the profiles that come with moesim.

    \b
    moesim profile list
    """
    profiles = [load_profile(name) for name in shipped_profiles()]
    if as_json:
        click.echo(json.dumps([{"name": p.name, "gpus": p.gpus, **asdict(p.provenance)} for p in profiles], indent=1))
        return
    table = Table(title="Shipped profiles: data sheets plus stated assumptions, nothing measured", title_justify="left")
    for column in ("name", "GPUs", "memory GB", "HBM GB/s", "bfloat16 TFLOP/s", "GPU to GPU GB/s", "host GB/s"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    for p in profiles:
        rates = (p.gpu.hbm_bytes_per_s / 1e9, p.gpu.matmul_flops_per_s["bfloat16"] / 1e12)
        p2p = f"{p.links.p2p.bytes_per_s / 1e9:,.0f}" if p.links.p2p else "-"
        host = f"{p.links.host.bytes_per_s / 1e9:,.0f}"
        table.add_row(
            p.name, str(p.gpus), f"{p.gpu.memory_bytes / 1e9:,.0f}", *(f"{rate:,.0f}" for rate in rates), p2p, host
        )
    _console().print(table)


@profile.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show(name: str, as_json: bool) -> None:
    """Print every number of a profile with its unit, and where the numbers come from.

    \b
    moesim profile show 8xH100-NVLink
    moesim profile show here.json --json
    """
    found = load_profile(name)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    about = found.provenance
    table = Table(title=f"{found.name}: {found.gpus} x {about.device}", title_justify="left")
    table.add_column("field", no_wrap=True)
    table.add_column("value", justify="right")
    for field, value in _fields({"gpu": asdict(found.gpu), "links": asdict(found.links), "decide_s": found.decide_s}):
        table.add_row(field, value)
    messages = _message_curves(found)
    for field, curve in messages.items():
        table.add_row(field, curve.range_text())
    for i, experts in enumerate(found.gpu.expert_curves):
        table.add_row(f"gpu.expert_curves[{i}]", experts.range_text())
    console = _console()
    console.print(table)
    lines = [f"{about.kind}, {about.date}", *about.sources, about.notes]
    if messages:
        lines.append(f"message curves go before latency, rate and efficiency: {MESSAGE_RULE}")
    if found.gpu.expert_curves:
        lines.append(f"expert curves go before the formula for experts of their shape and dtype: {EXPERT_RULE}")
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@profile.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def check(path: str, as_json: bool) -> None:
    """Check a profile: every field there, of its type and in its range. Exit code 2 at the first problem.

    Warns of what a sound profile may lack.

    \b
    moesim profile check here.json
    """
    found = load_profile(path)
    warnings = _warnings(found)
    if as_json:
        click.echo(json.dumps({"profile": found.name, "kind": found.provenance.kind, "warnings": warnings}))
        return
    click.echo(f"{path}: sound ({found.provenance.kind}, {found.gpus} GPUs)")
    for warning in warnings:
        click.echo(f"warning: {warning}")


def _warnings(found: HardwareProfile) -> list[str]:
    warnings = []
    if not found.decide_s:
        warnings.append("decide_s is empty: every policy is simulated as if it decided in no time")
    if found.measured and not found.provenance.versions:
        warnings.append("provenance.versions is empty: nobody can tell what was measured")
    if found.gpus > 1 and found.links.p2p is None:
        warnings.append("links.p2p is null: copies between GPUs share the host link's root")
    for field, curve in _message_curves(found).items():
        if _falls(curve.seconds):
            warnings.append(f"{field}: a longer message took over {NOISE:.0%} less time than a shorter one")
    for i, experts in enumerate(found.gpu.expert_curves):
        if any(map(_falls, [*experts.seconds, *zip(*experts.seconds, strict=True)])):
            warnings.append(f"gpu.expert_curves[{i}]: more work took over {NOISE:.0%} less time than less work")
    return warnings


def _falls(seconds: tuple[float, ...]) -> bool:
    """Whether times of growing work fall by more than noise explains."""
    return any(after < (1 - NOISE) * before for before, after in pairwise(seconds))


def _message_curves(found: HardwareProfile) -> dict[str, MessageCurve]:
    """Dotted name of the field to its curve, for the links that have one."""
    links = found.links
    named = {"p2p": links.p2p, "host": links.host, "all_to_all": links.all_to_all, "network": links.network}
    return {f"links.{name}.curve": link.curve for name, link in named.items() if link and link.curve}


def _fields(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value with its unit) of every number outside curves."""
    for name, value in record.items():
        if name in ("curve", "expert_curves"):
            continue
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif value is None:
            yield f"{prefix}{name}", "none"
        else:
            yield f"{prefix}{name}", _with_unit(f"{prefix}{name}", value)


def _with_unit(field: str, value: float) -> str:
    for part in reversed(field.split(".")):
        for ending, (scale, unit) in UNITS.items():
            if f"_{part}".endswith(ending):
                return f"{value / scale:,.6g} {unit}"
    return f"{value:g}"


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    return console
