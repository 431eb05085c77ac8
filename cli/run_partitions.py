"""Partitions of one device in place of ranks: options and runs of `moesim run-gpu` and `moesim calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from moesim.backend.job import Job, Progress
from moesim.backend.launch import under_torchrun
from moesim.cli.options import option_group
from moesim.cli.report import how_measured
from moesim.sim.profile import HardwareProfile
from moesim.sim.results import Result
from moesim.traces import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitions:
    """What the options say."""

    count: int
    """0: ranks."""
    random: str
    routing: str

    def as_ranks(self, ranks: int | None) -> int:
        """1 where a device is split, so that one process runs; 0 where not. Raises InputError for both at once."""
        if self.count and ranks is not None:
            raise InputError("--partitions splits one device in one process: leave --ranks out")
        if self.count and under_torchrun():
            raise InputError("--partitions splits one device in one process: run it without torchrun")
        return int(bool(self.count))

    def prepare(self) -> None:
        """To be called before anything looks for GPUs, which makes the driver read its environment."""
        if self.count:
            from moesim.backend.green import prepare

            prepare()


def _run(partitions: int | None, random: str, routing: str) -> Partitions:
    return Partitions(count=partitions or 0, random=random, routing=routing)


def _calibrate(partitions: int | None, random: str) -> Partitions:
    return Partitions(count=partitions or 0, random=random, routing="model")


_COUNT = click.option(
    "--partitions",
    type=click.IntRange(min=1),
    help="Split one device into so many: groups of its multiprocessors (CPU: threads), in place of ranks.",
)
_RANDOM = click.option(
    "--random",
    default="",
    metavar="NAME",
    help="In place of MODEL: random weights of a published one, say switch-base-128.",
)
_ROUTING = click.option(
    "--routing",
    type=click.Choice(["model", "replay"]),
    default="model",
    show_default=True,
    help="The model's own router, or what was recorded, forced on every layer.",
)
partition_options = option_group("parts", [_COUNT, _RANDOM, _ROUTING], _run)
"""`parts: Partitions`."""
calibration_options = option_group("parts", [_COUNT, _RANDOM], _calibrate)
"""The same where routing is made up."""


def run_partitions(job: Job, report: Progress) -> list[Result]:
    """Run the job's policies in this process."""
    from moesim.backend.partition_session import run_on_partitions

    return run_on_partitions(job, report)


def calibrate_partitions(job: Job, report: Progress) -> HardwareProfile:
    """Measure this device, split as the job says."""
    from moesim.backend.partition_session import calibrate_on_partitions

    return calibrate_on_partitions(job, report)


def footnote(config: dict[str, Any]) -> str:
    """What stood for GPUs, in a line."""
    sms = f", {config['sms'][0]} multiprocessors each" if config["sms"] else ""
    return (
        f"measured: {config['gpus']} partitions ({config['partitions']}{sms}) of {config['device_name']}, "
        f"kernel {config['kernel']}, {how_measured(config)}"
    )
