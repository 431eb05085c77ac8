"""Options that several commands share, or that belong together: a command gets each group as one object."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click

from moesim.backend.hub import model_folder
from moesim.sim.arrivals import FORMS, parse_arrivals
from moesim.sim.execution import COPY_BYTES, Contention, Execution, Send
from moesim.sim.faults import parse_fault
from moesim.sim.serving import Serving
from moesim.traces import InputError, Workload
from moesim.traces.spec import DTYPE_BYTES
from moesim.traces.workload import SPLITS


class ModelArgument(click.Path):
    """A model's folder, or its id on the hub, which is fetched; the command gets a folder."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The folder. Raises InputError where there is none."""
        return super().convert(model_folder(str(value)), param, ctx)


class OutFile(click.Path):
    """A file to write whose folder is made, so that nothing is lost at the end of a long run."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Raises InputError where nothing can be written there."""
        path = Path(str(super().convert(value, param, ctx)))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InputError(f"{path}: cannot be written (Permission denied)")
        return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing `path` becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


MODEL = ModelArgument(path_type=Path)
DEFAULT_TOKENS = 2048
Command = Callable[..., Any]
Make = Callable[..., Any]


def option_group(name: str, options: list[Callable[[Command], Command]], make: Make) -> Callable[[Command], Command]:
    """A decorator that adds `options` to a command, which gets what `make` makes of their values as `name`."""
    from inspect import signature

    takes = list(signature(make).parameters)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def grouped(*args: Any, **given: Any) -> Any:
            made = make(**{key: given.pop(key) for key in takes})
            return command(*args, **{name: made}, **given)

        for option in reversed(options):
            option(grouped)
        return grouped

    return decorate


def _workload(
    batch_tokens: int | None,
    batch_requests: int | None,
    batch_recorded: bool,
    chunked: bool,
    shuffle: int | None,
    split: str,
) -> Workload:
    asked = {"--batch-tokens": batch_tokens is not None, "--batch-requests": batch_requests is not None}
    given = [name for name, there in {**asked, "--batch-recorded": batch_recorded}.items() if there]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
    if batch_recorded:
        return Workload(unit="recorded", shuffle=shuffle, split=split, chunked=chunked)
    if batch_requests is not None:
        return Workload(batch=batch_requests, unit="requests", shuffle=shuffle, split=split, chunked=chunked)
    tokens = DEFAULT_TOKENS if batch_tokens is None else batch_tokens
    return Workload(batch=tokens, shuffle=shuffle, split=split, chunked=chunked)


workload_options = option_group(
    "workload",
    [
        click.option(
            "--batch-tokens",
            type=int,
            help=f"Tokens a step; in decode: requests in flight.  [default: {DEFAULT_TOKENS}]",
        ),
        click.option("--batch-requests", type=int, help="Requests a step, instead of a number of tokens."),
        click.option("--chunked", is_flag=True, help="Cut requests so that steps are exactly full (chunked prefill)."),
        click.option("--batch-recorded", is_flag=True, help="Keep the steps of the recording."),
        click.option("--shuffle", type=int, metavar="SEED", help="Seeded random order.  [default: order of arrival]"),
        click.option(
            "--split",
            default=SPLITS[0],
            show_default=True,
            help=f"What to fit on and what to run: {', '.join(SPLITS)} (run NAME, fit on the others).",
        ),
    ],
    _workload,
)
"""How a recording becomes steps: `workload: Workload`."""


def _execution(
    dtype: str | None,
    contention: Contention,
    tensor_parallel: int,
    micro_batches: int,
    overlap: bool,
    send: Send,
    copy_dtype: str | None,
) -> Execution:
    return Execution(
        dtype=dtype,
        contention=contention,
        tensor_parallel=tensor_parallel,
        micro_batches=micro_batches,
        overlap=overlap,
        send=send,
        copy_dtype=copy_dtype,
    )


execution_options = option_group(
    "execution",
    [
        click.option(
            "--dtype", type=click.Choice(list(DTYPE_BYTES)), help="Weights and activations.  [default: as recorded]"
        ),
        click.option(
            "--contention",
            type=click.Choice(get_args(Contention)),
            default="none",
            show_default=True,
            help="Copies and all-to-alls on the same wires: ignore each other, copies pause, both get half.",
        ),
        click.option(
            "--tensor-parallel",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="GPUs that share attention and dense layers; 1 is data-parallel attention.",
        ),
        click.option(
            "--micro-batches", type=click.IntRange(min=1), default=1, show_default=True, help="Parts of every step."
        ),
        click.option(
            "--overlap/--no-overlap",
            default=True,
            show_default=True,
            help="Micro-batches in flight together, one computing while another communicates.",
        ),
        click.option(
            "--send",
            type=click.Choice(get_args(Send)),
            default="per-expert",
            show_default=True,
            help="How often a token is sent: for each expert, once to a GPU, once to a node (DeepEP).",
        ),
        click.option(
            "--copy-dtype",
            type=click.Choice(list(COPY_BYTES)),
            help="Copy experts in fewer bits; results are then not exact.  [default: as the weights]",
        ),
    ],
    _execution,
)
"""How the model is executed: `execution: Execution`."""


def _serving(
    arrivals: str | None,
    requests: int | None,
    seed: int,
    max_running: int,
    ttft_ms: float | None,
    tpot_ms: float | None,
) -> Serving | None:
    if arrivals is None:
        if requests is not None or ttft_ms is not None or tpot_ms is not None:
            raise InputError(f"--requests, --ttft-ms and --tpot-ms belong to an open loop: give --arrivals, {FORMS}")
        return None
    return Serving(
        arrivals=parse_arrivals(arrivals),
        requests=requests,
        seed=seed,
        max_running=max_running,
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
    )


serving_options = option_group(
    "serving",
    [
        click.option(
            "--arrivals", help=f"Requests come by themselves: {FORMS}.  [default: each step follows the last]"
        ),
        click.option("--requests", type=click.IntRange(min=1), help="How many come, in turn.  [default: each once]"),
        click.option("--seed", type=int, default=0, show_default=True, help="Of random arrivals."),
        click.option(
            "--max-running", type=click.IntRange(min=1), default=1024, show_default=True, help="Requests in flight."
        ),
        click.option("--ttft-ms", type=float, help="Target of the time to the first token, for the goodput."),
        click.option("--tpot-ms", type=float, help="Target of the time per further token, for the goodput."),
    ],
    _serving,
)
"""An open loop: `serving: Serving | None`."""

fault_option = click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="WHAT@SECONDS",
    callback=lambda _context, _option, texts: tuple(parse_fault(text) for text in texts),
    help="gpu:3:dies@0.5, gpu:2:x0.5@0.1, link:network:x0.25@1; may be given again.",
)
