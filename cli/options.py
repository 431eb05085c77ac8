"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from moesim.traces import InputError, Workload
from moesim.traces.workload import SPLITS

DEFAULT_TOKENS = 2048
Command = Callable[..., Any]


def workload_options(command: Command) -> Command:
    """Options that say how a recording becomes steps; the command gets them as one `workload: Workload`."""

    @wraps(command)
    def with_workload(
        *args: Any,
        batch_tokens: int | None,
        batch_requests: int | None,
        batch_recorded: bool,
        shuffle: int | None,
        split: str,
        **others: Any,
    ) -> Any:
        workload = _workload(batch_tokens, batch_requests, batch_recorded, shuffle, split)
        return command(*args, workload=workload, **others)

    for option in reversed(_OPTIONS):
        option(with_workload)
    return with_workload


_OPTIONS = [
    click.option(
        "--batch-tokens", type=int, help=f"Tokens a step; in decode: requests in flight.  [default: {DEFAULT_TOKENS}]"
    ),
    click.option("--batch-requests", type=int, help="Requests a step, instead of a number of tokens."),
    click.option("--batch-recorded", is_flag=True, help="Keep the steps of the recording."),
    click.option("--shuffle", type=int, metavar="SEED", help="Seeded random order.  [default: order of arrival]"),
    click.option(
        "--split",
        default=SPLITS[0],
        show_default=True,
        help=f"What to fit on and what to run: {', '.join(SPLITS)} (run NAME, fit on the others).",
    ),
]


def _workload(tokens: int | None, requests: int | None, recorded: bool, shuffle: int | None, split: str) -> Workload:
    asked = {"--batch-tokens": tokens is not None, "--batch-requests": requests is not None}
    given = [name for name, there in {**asked, "--batch-recorded": recorded}.items() if there]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
    if recorded:
        return Workload(unit="recorded", shuffle=shuffle, split=split)
    if requests is not None:
        return Workload(batch=requests, unit="requests", shuffle=shuffle, split=split)
    return Workload(batch=DEFAULT_TOKENS if tokens is None else tokens, shuffle=shuffle, split=split)
