"""`moesim quality`: what policies that change what is computed cost in quality, against the exact model."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moesim.backend.job import DTYPES, model_config
from moesim.backend.offload_options import slots_of
from moesim.cli.options import MODEL, OutFile
from moesim.cli.recording import record_texts, text_option
from moesim.sim.execution import COPY_BYTES
from moesim.sim.policies import POLICIES, check_slots, recipe
from moesim.sim.quality import FORMAT, Quality, save_qualities
from moesim.traces import InputError
from moesim.traces.workload import SPLITS

LOSSY = [name for name, parts in POLICIES.items() if parts.lossy]


@click.command()
@click.argument("model", type=MODEL)
@click.option("--policy", required=True, help=f"Comma-separated, or lossy: {', '.join(LOSSY)}.")
@click.option("--trace", type=click.Path(path_type=Path), help="Requests to fit on and to run, of the same model.")
@text_option
@click.option(
    "--resident", metavar="SLOTS",
    help="Slots a layer, a number or a share such as 25%; host memory has the rest.  [default: all]",
)  # fmt: skip
@click.option(
    "--phase",
    type=click.Choice(["prefill", "decode"]),
    default="prefill",
    show_default=True,
    help="Feed the decoder its tokens in one pass, or one by one.",
)
@click.option("--batch-requests", type=click.IntRange(min=1), default=1, show_default=True, help="Requests a step.")
@click.option("--max-requests", type=click.IntRange(min=1), help="Run only the first held-out requests.")
@click.option(
    "--split", default=SPLITS[0], show_default=True, help="What to fit on and what to run, as in moesim simulate."
)
@click.option("--copy-dtype", type=click.Choice(list(COPY_BYTES)), help="Copy experts in fewer bits.")
@click.option(
    "--gate",
    type=click.Choice(["fixed", "router"]),
    default="fixed",
    show_default=True,
    help="What multiplies a predicted expert: one factor a layer, or what the router would have said.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON, and nothing else on stdout.")
@click.option("--out", type=OutFile(), help="Write them, for simulate --quality.")
def quality(
    model: Path,
    policy: str,
    trace: Path | None,
    text: tuple[Path, ...],
    resident: str | None,
    phase: str,
    batch_requests: int,
    max_requests: int | None,
    split: str,
    copy_dtype: str | None,
    gate: str,
    seed: int,
    dtype: str,
    device: str,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure loss, agreement and output error of policies on the Switch model MODEL (folder or hub id), against the
    same model without them.

    Policies are fitted on one half of the requests and run on the other, with real weights, copies and slots, on one
    device. The decoder continues what the encoder has read; the loss is that of the next token. Exact policies may be
    named, too: they show what rounding alone does.

    \b
    moesim quality models/switch-mini --trace mini.moetrace --policy hobbit --resident 8 --out quality.json
    moesim quality models/switch-mini --policy on-demand --copy-dtype int4 --resident 8 --phase decode
    moesim simulate mini.moetrace --policy hobbit --profile 1xRTX4090-PCIe --resident 8 --quality quality.json
    """
    experts = int(model_config(model).get("num_experts", 0))
    slots = None if resident is None else slots_of(resident, experts)
    names = _policies(policy, slots)
    from moesim.backend.quality import Settings
    from moesim.traces.record import pick_device

    settings = Settings(
        policies=names,
        resident=slots,
        phase=phase,
        batch=batch_requests,
        max_requests=max_requests,
        split=split,
        copy_dtype=copy_dtype,
        gate=gate,
        seed=seed,
        dtype=dtype,
        device=pick_device(device),
    )
    found = _measured(model, trace, text, settings)
    if out:
        save_qualities(found, out)
    if as_json:
        click.echo(json.dumps({"format": FORMAT, "entries": [asdict(one) for one in found]}, indent=1))
    else:
        _print(found)


def _policies(policy: str, resident: int | None) -> tuple[str, ...]:
    """Those asked for; `lossy` means the inexact ones that run with so many slots. Raises InputError before anything is
    measured."""
    if policy.strip() == "lossy":
        return tuple(name for name in LOSSY if (resident is not None) == (recipe(name).miss is not None))
    asked = tuple(dict.fromkeys(name.strip() for name in policy.split(",") if name.strip()))
    if not asked:
        raise InputError(f"--policy names no policy; known: {', '.join(POLICIES)}")
    for name in asked:
        check_slots(name, resident)
    return asked


def _measured(model: Path, trace: Path | None, text: tuple[Path, ...], settings: Any) -> list[Quality]:
    from moesim.backend.quality import measure
    from moesim.traces.store import Trace

    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="moesim-quality-") as folder,
        Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("", total=1.0)

        def tell(what: str, done: float) -> None:
            progress.update(task, description=what, completed=done)

        path = trace or record_texts(
            str(model),
            text,
            Path(folder) / "quality.moetrace",
            lambda done, what: tell(what, done),
            dtype=settings.dtype,
            device=settings.device,
            lookahead=3,
            router_input=True,
        )
        return measure(model, Trace.open(path), settings, tell)


def _print(found: list[Quality]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    first = found[0]
    table = Table(title="Quality against the exact model", title_justify="left")
    table.add_column("policy", no_wrap=True)
    for column in ("loss", "change", "top-1", "output error", "rounded", "skipped", "replaced", "wrong"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        shares = [_share(one, name) for name in ("rounded", "skipped", "substituted", "mispredicted")]
        table.add_row(
            one.policy,
            f"{one.loss:.4f}",
            f"{one.loss - one.exact_loss:+.4f} ± {one.loss_error:.4f}",
            f"{one.top1_agreement:.2%}",
            f"{one.output_error:.2%}",
            *shares,
        )
    console.print(table)
    c = first.config
    slots = "every expert on the device" if first.resident is None else f"{first.resident} slots a layer"
    copies = f", copies in {first.copy_dtype}" if first.copy_dtype else ""
    lines = [
        f"loss: nats a token of the continuation, of the exact model {first.exact_loss:.4f}; change ± standard error "
        "over requests. top-1: output tokens whose likeliest next token is the exact model's. output error: of the "
        "decoder's last hidden states, relative. rounded, skipped, replaced, wrong (a predicted expert ran that is not "
        "the router's): shares of the (token, expert) pairs, mean over the layers of both stacks.",
        f"measured: {c['requests']} held-out requests of {c['trace']} ({c['decoder_tokens']:,} decoder tokens), split "
        f"by {c['split']}, {c['batch_requests']} a step, {first.phase}, {slots}{copies}; {c['dtype']} on "
        f"{c['device_name']}, seed {c['seed']}.",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _share(one: Quality, name: str) -> str:
    layers = [share for stack in one.shares.values() for share in stack[name]]
    return f"{sum(layers) / len(layers):.1%}"
