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
    multiple=True,
    type=click.Path(path_type=Path),
    help="UTF-8 text file, a folder of .txt files, or - for standard input; several may follow, as in --text *.txt.",
)
@click.argument("more_texts", metavar="[TEXT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--dataset",
    "datasets",
    metavar="NAME[:CONFIG]",
    multiple=True,
    help="Hugging Face data set, or a .json, .jsonl, .csv, .parquet or .txt file or a folder of them; streamed.",
)
@click.option("--dataset-split", default="train", show_default=True, help="Split of the data sets.")
@click.option("--dataset-column", default="text", show_default=True, help="Column that holds the text.")
@click.option("--dataset-revision", help="Branch, tag or commit of the data sets.")
@click.option("--dataset-documents", default=1000, show_default=True, help="Most documents to take of a data set.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The trace to write, NAME.moetrace.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--batch", default=16, show_default=True, help="Requests in one forward pass.")
@click.option("--max-tokens", type=int, help="Most encoder and prompt tokens to record, over all texts alike.")
@click.option(
    "--encoder-tokens",
    type=int,
    help="Encoder tokens of a request; only for models that have an encoder.  [default: 128]",
)
@click.option(
    "--prefill-tokens",
    type=int,
    help="Prompt tokens of a request.  [default: 32 after an encoder, 128 in a decoder-only model]",
)
@click.option("--generate", default=0, show_default=True, help="Tokens that the model generates for a request.")
@click.option("--lookahead", default=2, show_default=True, help="Following gates to ask at each layer.")
@click.option("--router-input", is_flag=True, help="Record what the routers were given, too, to train predictors on.")
@click.option("--force", is_flag=True, help="Replace an existing trace.")
@click.option("--json", "as_json", is_flag=True, help="Print what was recorded as JSON.")
def record(
    model: str,
    texts: tuple[Path, ...],
    more_texts: tuple[Path, ...],
    datasets: tuple[str, ...],
    dataset_split: str,
    dataset_column: str,
    dataset_revision: str | None,
    dataset_documents: int,
    out: Path,
    device: str,
    dtype: str,
    batch: int,
    max_tokens: int | None,
    encoder_tokens: int | None,
    prefill_tokens: int | None,
    generate: int,
    lookahead: int,
    router_input: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Record which experts the routers chose for every token: encoder, prefill and decode steps.

    Knows Switch, NLLB-MoE, Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and -V3, gpt-oss and Granite-MoE models. A
    recording that is interrupted keeps what it has written; the model's output is not changed by a single bit.

    \b
    moesim record --model models/switch-mini --text models/switch-mini/samples --out mini.moetrace
    moesim record --model google/switch-base-128 --text a.txt b.txt --generate 16 --out base.moetrace
    cat *.md | moesim record --model allenai/OLMoE-1B-7B-0924 --text - --dtype bfloat16 --out olmoe.moetrace
    moesim record --model Qwen/Qwen3-30B-A3B --dataset openai/gsm8k:main --dataset-column question --out qwen.moetrace
    """
    from moesim.traces import record as recording
    from moesim.traces.texts import check_names, read_dataset, read_texts

    options = recording.RecordOptions(
        encoder_tokens=encoder_tokens,
        prefill_tokens=prefill_tokens,
        generate=generate,
        batch=batch,
        max_tokens=max_tokens,
        lookahead=lookahead,
        router_input=router_input,
    )
    if not (texts or more_texts or datasets):
        raise InputError("nothing to record: give --text or --dataset")
    contents = read_texts([*texts, *more_texts]) + [
        read_dataset(
            name, split=dataset_split, column=dataset_column, revision=dataset_revision, limit=dataset_documents
        )
        for name in datasets
    ]
    check_names(contents)
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
    caveats = trace.provenance["caveats"]
    for caveat in caveats:
        click.echo(f"Warning: {caveat}.", err=True)
    if as_json:
        told = {"trace": str(out), "requests": len(trace.request_texts), "counts": trace.counts(), "caveats": caveats}
        click.echo(json.dumps(told))
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
def progress_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr, only on a terminal; yields a callback that takes (tokens done, in all where that is known)."""
    columns = (TextColumn(what), BarColumn(), _Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
