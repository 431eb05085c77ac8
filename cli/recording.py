"""Where a command gets no trace: texts, recorded with the model that it runs."""

from __future__ import annotations

from pathlib import Path

import click

from moesim.backend.job import Progress
from moesim.traces import InputError

RECORD_TOKENS = 60_000
"""Most tokens that are recorded."""

text_option = click.option(
    "--text",
    multiple=True,
    type=click.Path(path_type=Path),
    help=f"Text to record ({RECORD_TOKENS:,} tokens at most) where there is no --trace.  [default: MODEL/samples]",
)
"""`text: tuple[Path, ...]`."""


def record_texts(
    model: str,
    text: tuple[Path, ...],
    out: Path,
    report: Progress,
    *,
    dtype: str,
    device: str = "cpu",
    lookahead: int = 0,
    router_input: bool = False,
) -> Path:
    """Record the texts (or the model's samples) into the trace `out`. Raises InputError where there are none."""
    from moesim.traces import record as recording
    from moesim.traces.texts import read_texts

    samples = Path(model) / "samples"
    if not text and not samples.is_dir():
        raise InputError(f"nothing to run: give --trace or --text ({samples} does not exist)")
    contents = read_texts(list(text) or [samples])
    loaded, tokenizer = recording.load_model(model, device=device, dtype=dtype)
    return recording.record(
        loaded,
        tokenizer,
        contents,
        out,
        recording.RecordOptions(max_tokens=RECORD_TOKENS, lookahead=lookahead, router_input=router_input),
        source=model,
        progress=lambda done, total: report(done / total, "recording the text"),
    )
