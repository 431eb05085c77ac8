"""Experts in host memory in place of ranks: options and runs of `moesim run-gpu` and `moesim calibrate` with
--resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moesim.backend.job import Job, model_config
from moesim.backend.launch import Progress, under_torchrun
from moesim.backend.offload_options import PHASES, Offloading
from moesim.cli.options import option_group
from moesim.sim.execution import COPY_BYTES
from moesim.sim.policies import check_slots, offloading, recipe
from moesim.sim.profile import HardwareProfile
from moesim.sim.results import Result
from moesim.sim.scenario import STACK_OF_PHASE
from moesim.traces import InputError, Phase

RESIDENT = "contiguous"
"""Has every expert on the device, however many slots the others have."""
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
    _check_model(job)
    if job.repeats < 1 or job.warmup < 0:
        raise InputError("--repeats must be at least 1 and --warmup at least 0")
    for name in job.policies:
        if recipe(name).routing == "predicted":
            raise InputError(f"policy {name} executes forecasts: measure its quality with moesim quality")
        if name != RESIDENT:
            check_slots(name, 1)
    if job.kind != "run":
        return
    if not job.model and not job.random:
        raise InputError("nothing to run: give the folder of a MODEL, or --random switch-base-128")
    if job.random and job.routing != "replay":
        raise InputError("a random router says nothing: --random goes with --routing replay and a --trace")
    if job.routing == "replay" and not job.trace:
        raise InputError("--routing replay needs the recorded routing: give --trace")


def _check_model(job: Job) -> None:
    if job.random and job.model:
        raise InputError(f"give a MODEL or --random {job.random}, not both")
    if job.model:
        config, stack = model_config(Path(job.model)), STACK_OF_PHASE[Phase[job.phase.upper()]]
        if not int(config.get(f"num_sparse_{stack}_layers", 0)):
            raise InputError(f"{job.model}: the model has no MoE layers in its {stack}")


def run(job: Job, asked: Offloading, report: Progress) -> list[Result]:
    """Run the job's policies in this process."""
    from moesim.backend.failures import in_one_line
    from moesim.backend.offload_job import run_offload

    with in_one_line():
        return run_offload(job, asked, report)


def calibrate(job: Job, asked: Offloading, report: Progress) -> HardwareProfile:
    """Measure this device for the job's phase, batch and slots."""
    from moesim.backend.failures import in_one_line
    from moesim.backend.offload_job import calibrate_offload

    with in_one_line():
        return calibrate_offload(job, asked, report)


def footnote(config: dict[str, Any]) -> str:
    """What was measured, in a line."""
    routing = "true router" if config["routing"] == "model" else "recorded routing replayed"
    return (
        f"measured: experts in host memory, one {config['device']} device ({config['device_name']}), "
        f"{config['weights']} weights, {config['dtype']}, {routing}, median of {config['repeats']} repeats after "
        f"{config['warmup']} to warm up, policies interleaved; contiguous has every expert on the device."
    )
