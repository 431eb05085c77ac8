"""`moesim demo`: the whole pipeline on the shipped model, as the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path

import click
from rich.console import Console

from moesim.cli.picture import load_over_time
from moesim.sim.policies import POLICIES
from moesim.sim.results import Result, load_results
from moesim.traces import InputError

BASELINE = "contiguous"
CLUSTER = "8xH100-NVLink"
OTHERS = 4
"""Policies that are run on this machine beside the winner and the baseline."""


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default="models/switch-mini", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/demo", show_default=True, help="Folder for all files."
)
@click.option("--ranks", type=click.IntRange(1), default=2, show_default=True, help="Processes of the real run.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--max-tokens", type=click.IntRange(1000), default=60_000, show_default=True, help="Tokens to record.")
@click.option("--batch-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of one step.")
@click.pass_context
def demo(
    ctx: click.Context, model: Path, out: Path, ranks: int, device: str, max_tokens: int, batch_tokens: int
) -> None:
    """Record, calibrate, tune, simulate, run and compare on the shipped model; leave everything in --out.

    \b
    moesim demo
    moesim demo --out runs/mine --ranks 4 --batch-tokens 4096
    """
    console = Console()
    samples = model / "samples"
    if not samples.is_dir():
        raise InputError(f"{samples}: no such folder; run the demo in a checkout of moesim, or name one with --model")
    trace, profile = out / "trace.moetrace", out / "profile.json"
    chosen, simulated, measured = out / "winner.toml", out / "simulated.json", out / "measured.json"
    window = ["--batch-tokens", str(batch_tokens)]

    def step(title: str, *arguments: object) -> None:
        console.rule(title, align="left")
        words = [str(argument) for argument in arguments]
        console.print(f"$ moesim {shlex.join(words)}", style="bold", highlight=False, soft_wrap=True)
        assert ctx.parent is not None
        if code := ctx.parent.command.main(words, prog_name="moesim", standalone_mode=False):
            ctx.exit(code)

    step(
        "1. Record the router on held-out text",
        *("record", "--model", model, "--text", samples, "--out", trace, "--force"),
        *("--max-tokens", max_tokens, "--generate", 4),
    )
    step("2. Check the recording", "trace", "verify", trace)
    step(
        "3. What would eight H100 do? (spec-sheet profile, simulated only)",
        *("simulate", trace, "--policy", "all", "--profile", CLUSTER, "--gpus", 8, *window),
        *("--out", out / "simulated-8xH100.json"),
    )
    step("4. Measure this machine", "calibrate", model, "--ranks", ranks, "--device", device, "--out", profile)
    step(
        "5. Choose for this machine: tuned on some held-out requests, confirmed on others",
        *("tune", trace, "--profile", profile, "--gpus", ranks, *window, "--extra-slots", 1, "--as-named"),
        *("--out", chosen),
    )
    step(
        "6. Simulate this machine",
        *("simulate", trace, "--policy", "all", "--profile", profile, "--gpus", ranks, *window, "--out", simulated),
    )
    winner = tomllib.loads(chosen.read_text(encoding="utf-8"))["found"]["policy"]
    step(
        f"7. Run the winner, {winner}, others and the baseline on this machine",
        *("run-gpu", model, "--trace", trace, "--policy", ",".join(order(load_results(simulated), winner))),
        *("--ranks", ranks, "--device", device, *window),
        *("--out", measured),
    )
    step("8. Simulated beside measured", "compare", simulated, measured, "--out", out / "comparison.json")
    picture = draw(load_results(measured), winner, out)
    console.print(f"\nAll files are in {out}; the picture is {picture}.", highlight=False)


def order(results: list[Result], winner: str) -> list[str]:
    """The winner, then the fastest others that can be run and do not know the future, as many as are soon run; the
    baseline is run anyway."""
    fair = [r for r in results if not POLICIES[r.policy].clairvoyant and not POLICIES[r.policy].simulated_only]
    names = [result.policy for result in sorted(fair, key=lambda result: result.total_s)]
    others = [name for name in names if name not in (BASELINE, winner)]
    return [winner, *others[:OTHERS]]


def draw(results: list[Result], winner: str, out: Path) -> Path:
    """The picture of baseline and winner (once, where they are the same), and beside it the winner's name for
    scripts."""
    chosen = [result for name in dict.fromkeys([BASELINE, winner]) for result in results if result.policy == name]
    path = out / "load.png"
    load_over_time(chosen, path, "Tokens on each GPU, layer after layer")
    (out / "winner.json").write_text(json.dumps({"winner": winner, "baseline": BASELINE}) + "\n", encoding="utf-8")
    return path
