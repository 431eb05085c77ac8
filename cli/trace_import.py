"""`moesim trace import` and `moesim trace concat`: recordings of other systems, and several recordings in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moesim.cli.record import progress_bar
from moesim.traces import Phase
from moesim.traces.formats import FORMATS, ImportOptions
from moesim.traces.importing import import_recording
from moesim.traces.joining import concat_traces
from moesim.traces.store import Trace

READABLE = [name for name, known in FORMATS.items() if known.read]


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The trace to write, NAME.moetrace.")
@click.option("--format", "format_", type=click.Choice(READABLE), help="[default: recognised by content]")
@click.option("--model", help="The recorded model: hub id, or folder with its config.json. Gives shapes and widths.")
@click.option("--experts", type=click.IntRange(1, 65_535), help="Experts of a layer, where the file does not say.")
@click.option("--layers", type=click.IntRange(1), help="Layers in a flat buffer, where the file does not say.")
@click.option("--top-k", type=click.IntRange(1), help="Experts per token, where the file does not say.")
@click.option(
    "--phase",
    type=click.Choice([p.name.lower() for p in Phase]),
    default="prefill",
    show_default=True,
    help="Of tokens that do not say it.",
)
@click.option("--stack", type=click.Choice(["encoder", "decoder"]), help="[default: what the file says, else decoder]")
@click.option(
    "--physical-map",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Physical to logical experts [L, P] (.npy, .pt, .json), for ids that are physical and come without it.",
)
@click.option("--keep-warmup", is_flag=True, help="Keep rows that look like warm-up, profiling or padding.")
@click.option("--force", is_flag=True, help="Replace an existing trace.")
@click.option("--json", "as_json", is_flag=True, help="Print what was imported as JSON.")
def import_command(
    path: Path,
    out: Path,
    format_: str | None,
    model: str | None,
    experts: int | None,
    layers: int | None,
    top_k: int | None,
    phase: str,
    stack: str | None,
    physical_map: Path | None,
    keep_warmup: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Import the recording of another system, a file or a folder, as a trace.

    Rows that are no traffic (warm-up, profiling, padding) are dropped and counted. Nothing in a file is executed.
    Formats, recognised by content: see moesim trace formats.

    \b
    moesim trace import expert_distribution_recorder_1717.pt --out sglang.moetrace
    moesim trace import routed_experts/ --model Qwen/Qwen3-30B-A3B --out vllm.moetrace
    moesim trace import esft/law.npz --experts 64 --out law.moetrace --json
    """
    options = ImportOptions(
        spec=_model_spec(model) if model else None,
        experts=experts,
        layers=layers,
        top_k=top_k,
        phase=Phase[phase.upper()],
        stack=stack,
        physical_to_logical=physical_map,
    )
    with progress_bar("importing") as progress:
        trace = import_recording(
            path,
            out,
            format=format_,
            options=options,
            keep_warmup=keep_warmup,
            overwrite=force,
            progress=progress,
        )
    click.echo(json.dumps(_report(trace)) if as_json else "\n".join(_lines(trace)))


@click.command()
@click.argument("paths", metavar="TRACE TRACE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The trace to write, NAME.moetrace.")
@click.option("--force", is_flag=True, help="Replace an existing trace.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def concat(paths: tuple[Path, ...], out: Path, force: bool, as_json: bool) -> None:
    """Put recordings of one router one after the other: a shift of the workload.

    Requests whose text has no name get that of their trace, so that moesim simulate --split dataset:NAME tells them
    apart; --split time fits on the first half.

    \b
    moesim trace concat law.moetrace code.moetrace --out shift.moetrace
    moesim simulate shift.moetrace --policy all --profile 8xH100-NVLink --split dataset:code --shapes deepseek-v2-lite
    """
    with progress_bar("joining") as progress:
        trace, left_out = concat_traces(list(paths), out, overwrite=force, progress=progress)
    if as_json:
        click.echo(json.dumps({"trace": str(out), "counts": trace.counts(), "left_out": left_out}))
        return
    click.echo(f"{out}: {_rows(trace)} of {len(paths)} traces")
    if left_out:
        click.echo(f"left out, as not every trace has it: {', '.join(left_out)}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def formats(as_json: bool) -> None:
    """List the formats that moesim trace import reads and moesim trace export writes.

    \b
    moesim trace formats
    """
    listed = {
        f.name: {"summary": f.summary, "import": f.read is not None, "export": f.write is not None}
        for f in FORMATS.values()
    }
    if as_json:
        click.echo(json.dumps(listed, indent=1))
        return
    for name, about in listed.items():
        does = " and ".join(verb for verb in ("import", "export") if about[verb])
        click.echo(f"{name:16} {about['summary']} ({does})")


def _model_spec(name: str) -> Any:
    from moesim.traces.adapters import load_spec  # transformers takes seconds to import

    return load_spec(name)


def _report(trace: Trace) -> dict[str, Any]:
    return {
        "trace": str(trace.path),
        "kind": trace.kind,
        "spec": trace.spec.to_dict(),
        "counts": trace.counts(),
        "requests": len(trace.request_texts) or None,
        "import": trace.provenance["import"],
    }


def _rows(trace: Trace) -> str:
    what = "rows of loads" if trace.kind == "loads" else "tokens"
    return ", ".join(f"{count:,} {phase} {what}" for c in trace.counts().values() for phase, count in c.items())


def _lines(trace: Trace) -> list[str]:
    spec, about = trace.spec, trace.provenance["import"]
    layers = sum(len(stack.moe_layers) for stack in spec.stacks)
    lines = [
        f"{trace.path}: {_rows(trace)}; {layers} MoE layers x {spec.num_experts} experts, top-{spec.top_k}, from "
        f"{about['format']}"
    ]
    cleaning = about["cleaning"]
    for what, count in cleaning["found"].items():
        if count:
            did = "dropped" if what in cleaning["dropped"] else "kept"
            lines.append(f"{what}: {count:,} of {cleaning['rows']:,} rows ({cleaning['shares'][what]:.1%}), {did}")
    lines += [f"{name}: {note}" for name, note in about["notes"].items()]
    if spec.widths is None:
        lines.append("the model's widths are not known: simulate with --shapes, or import with --model")
    return lines
