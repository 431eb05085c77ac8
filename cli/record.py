"""`moesim record`: a model's router on real text, into a trace."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from moesim.traces import InputError
from moesim.traces.store import MANIFEST, Trace


@click.command()
@click.option("--model", required=True, help="Hugging Face hub id, or a local folder.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="UTF-8 text file, or a folder of .txt files; several may follow, as in --text *.txt.",
)
@click.argument("more_texts", metavar="[TEXT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The trace to write, NAME.moetrace.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--batch", default=16, show_default=True, help="Requests in one forward pass.")
@click.option("--max-tokens", type=int, help="Most encoder and prompt tokens to record, over all texts alike.")
@click.option("--encoder-tokens", default=128, show_default=True, help="Encoder tokens of a request.")
@click.option("--prefill-tokens", default=32, show_default=True, help="Decoder prompt tokens of a request.")
@click.option("--generate", default=0, show_default=True, help="Tokens that the model generates for a request.")
@click.option("--lookahead", default=2, show_default=True, help="Following gates to ask at each layer.")
@click.option("--force", is_flag=True, help="Replace an existing trace.")
@click.option("--json", "as_json", is_flag=True, help="Print what was recorded as JSON.")
def record(
    model: str,
    texts: tuple[Path, ...],
    more_texts: tuple[Path, ...],
    out: Path,
    device: str,
    dtype: str,
    batch: int,
    max_tokens: int | None,
    encoder_tokens: int,
    prefill_tokens: int,
    generate: int,
    lookahead: int,
    force: bool,
    as_json: bool,
) -> None:
    """Record which expert the router chose for every token: encoder, decoder prefill and decode steps.

    A recording that is interrupted keeps what it has written; the model's output is not changed by a single bit.

    \b
    moesim record --model models/switch-mini --text models/switch-mini/samples --out mini.moetrace
    moesim record --model google/switch-base-128 --text a.txt b.txt --generate 16 --out base.moetrace
    """
    from moesim.traces import record as recording

    options = recording.RecordOptions(
        encoder_tokens=encoder_tokens,
        prefill_tokens=prefill_tokens,
        generate=generate,
        batch=batch,
        max_tokens=max_tokens,
        lookahead=lookahead,
    )
    contents = recording.read_texts([*texts, *more_texts])
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another name, or replace it with --force")
    loaded, tokenizer = recording.load_model(model, device=recording.pick_device(device), dtype=dtype)
    try:
        with progress_bar("recording") as progress:
            recording.record(
                loaded, tokenizer, contents, out, options, source=model, overwrite=force, progress=progress
            )
    except KeyboardInterrupt:
        click.echo(_summary(Trace.open(out)) if (out / MANIFEST).exists() else "nothing was recorded yet", err=True)
        raise
    trace = Trace.open(out)
    if as_json:
        click.echo(json.dumps({"trace": str(out), "requests": len(trace.request_texts), "counts": trace.counts()}))
        return
    click.echo(_summary(trace))


def _summary(trace: Trace) -> str:
    parts = [f"{n:,} {phase}" for phases in trace.counts().values() for phase, n in phases.items()]
    return f"{trace.path}: {len(trace.request_texts)} requests, tokens: {', '.join(parts)}"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Tokens a second, once it is known."""
        return Text("" if task.speed is None else f"{task.speed:,.0f} tokens/s")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, only on a terminal; yields a callback that takes (tokens done, in all)."""
    columns = (TextColumn(what), BarColumn(), _Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
