"""Experts in host memory in place of ranks: options and runs of `moesim run-gpu` and `moesim calibrate` with
--resident."""

from __future__ import annotations

from typing import Any

import click

from moesim.backend.job import Job, Progress, check_inputs
from moesim.backend.launch import under_torchrun
from moesim.backend.offload_options import PHASES, RESIDENT, Offloading
from moesim.cli.options import option_group
from moesim.cli.report import how_measured
from moesim.sim.execution import COPY_BYTES
from moesim.sim.policies import check_slots, offloading, recipe
from moesim.sim.profile import HardwareProfile
from moesim.sim.results import Result
from moesim.traces import InputError

RUNNABLE = [name for name in offloading() if recipe(name).routing != "predicted"]
CALIBRATED = ("on-demand", "lfu", "belady", "prefetch-layer", "prefetch-ridge", "oracle-prefetch")
"""Policies whose decisions a calibration times where none are named; of others the simulator says that they decide in
no time."""


def _asked(resident: str | None, copy_dtype: str | None) -> Offloading | None:
    if resident is None:
        if copy_dtype is not None:
            raise InputError("--copy-dtype is about copies from host memory: add --resident 25%, say")
        return None
    return Offloading(resident=resident, copy_dtype=copy_dtype)


offload_options = option_group(
    "offloading",
    [
        click.option(
            "--resident",
            metavar="SLOTS",
            help="Offload to host memory: slots a layer on one device, a number or a share such as 25%.",
        ),
        click.option(
            "--copy-dtype", type=click.Choice(list(COPY_BYTES)), help="Copy experts in fewer bits; with --resident."
        ),
    ],
    _asked,
)
"""`offloading: Offloading | None`."""


def check(job: Job, ranks: int | None) -> None:
    """Raise InputError for whatever can be seen to be wrong before a model is loaded."""
    if ranks is not None or job.partitions or under_torchrun():
        raise InputError(
            "--resident offloads on one device, in one process: leave --ranks, --partitions and torchrun out"
        )
    if job.phase not in PHASES:
        raise InputError(f"--resident runs the phases {', '.join(PHASES)}, not {job.phase}")
    check_inputs(job)
    for name in job.policies:
        if recipe(name).routing == "predicted":
            raise InputError(f"policy {name} executes forecasts: measure its quality with moesim quality")
        if name != RESIDENT:
            check_slots(name, 1)


def run(job: Job, asked: Offloading, report: Progress) -> list[Result]:
    """Run the job's policies in this process."""
    from moesim.backend.offload_job import run_offload

    return run_offload(job, asked, report)


def calibrate(job: Job, asked: Offloading, report: Progress) -> HardwareProfile:
    """Measure this device for the job's phase, batch and slots."""
    from moesim.backend.offload_job import calibrate_offload

    return calibrate_offload(job, asked, report)


def footnote(config: dict[str, Any]) -> str:
    """What was measured, in a line."""
    return (
        f"measured: experts in host memory (contiguous: all on the device), one {config['device']} device "
        f"({config['device_name']}), {how_measured(config)}"
    )
