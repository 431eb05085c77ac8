"""`moesim policy`: the named policies, and what each is composed of."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from moesim.sim.policies import POLICIES, offloading, recipe
from moesim.sim.policies.files import recipe_toml


@click.group()
def policy() -> None:
    """List the policies, or show what one is composed of.

    \b
    moesim policy list
    moesim policy show predictive-layer
    moesim policy show predictive-layer > mine.toml    # change it, then: moesim simulate ... --policy mine.toml
    """


@policy.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else on stdout.")
def list_policies(as_json: bool) -> None:
    """All named policies, with what they do.

    \b
    moesim policy list
    """
    told = {
        name: {"summary": one.summary, "offloads": one.miss is not None, "simulated_only": one.simulated_only}
        for name, one in POLICIES.items()
    }
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    offload = offloading()
    table = Table(box=None)
    for column in ("policy", "what it does"):
        table.add_column(column, overflow="fold")
    for name in sorted(POLICIES, key=lambda name: name in offload):
        table.add_row(name, POLICIES[name].summary)
    Console().print(table)


@policy.command()
@click.argument("name")
def show(name: str) -> None:
    """The parts of NAME (a policy, a .toml file, or package.module:factory) as TOML that --policy accepts.

    \b
    moesim policy show eplb
    moesim policy show eplb > mine.toml
    """
    found = recipe(name)
    if found.deviations:
        click.echo("".join(f"# {line}\n" for line in found.deviations.splitlines()), nl=False)
    click.echo(recipe_toml(found), nl=False)
