"""`moesim calibrate`: measure this machine and write the profile that `moesim simulate` reads."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from moesim.backend.job import DTYPES, Job, check_options
from moesim.backend.launch import check_device, launch
from moesim.backend.offload_options import PHASES, Offloading
from moesim.cli import run_offload
from moesim.cli.options import MODEL, OutFile, writing
from moesim.cli.run_gpu import RUNNABLE, policy_names, progress_bar
from moesim.cli.run_partitions import Partitions, calibrate_partitions, calibration_options
from moesim.sim.policies import default_baseline
from moesim.sim.profile import HardwareProfile, load_profile
from moesim.traces import InputError, Workload


@click.command()
@click.argument("model", required=False, type=MODEL)
@click.option(
    "--policy",
    help="Comma-separated, whose decisions are timed.  [default: all that run-gpu runs; with --resident: "
    f"{', '.join(run_offload.CALIBRATED)}]",
)
@click.option("--ranks", type=int, help="Processes, one a GPU or core, all at work at once.  [default: 2]")
@calibration_options
@run_offload.offload_options
@click.option("--phase", type=click.Choice(PHASES), default=PHASES[0], show_default=True, help="With --resident.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--out", required=True, type=OutFile(), help="Profile to write, JSON.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of the steps in which the policies' decisions are timed.",
)
@click.option("--extra-slots", type=int, default=1, show_default=True, help="Replica slots per GPU and layer.")
def calibrate(
    model: Path | None,
    policy: str | None,
    ranks: int | None,
    parts: Partitions,
    offloading: Offloading | None,
    phase: str,
    device: str,
    out: Path,
    dtype: str,
    batch_tokens: int,
    extra_slots: int,
) -> None:
    """Measure experts, attention, links and decisions on this machine, with the shapes of MODEL, and write a profile.

    Uses random tokens, never a trace. Without MODEL a small random one is measured: rates then hold for its shapes.
    A profile of --partitions is for run-gpu --partitions with as many, one of --resident for run-gpu --resident with
    the same slots, phase and --batch-tokens.

    \b
    moesim calibrate models/switch-mini --ranks 2 --out here.json
    moesim simulate mini.moetrace --policy all --profile here.json --gpus 2
    moesim calibrate models/switch-mini --partitions 2 --policy eplb,predictive-batch --out parts.json
    moesim calibrate models/switch-mini --resident 25% --phase encoder --batch-tokens 1024 --out offload.json
    """
    size = parts.as_ranks(ranks) or (1 if offloading else 2 if ranks is None else ranks)
    parts.prepare()
    with tempfile.TemporaryDirectory(prefix="moesim-calibrate-") as folder, progress_bar() as report:
        job = Job(
            kind="calibrate",
            folder=folder,
            model=str(model or ""),
            ranks=size,
            device="cpu",
            dtype=dtype,
            workload=Workload(batch=batch_tokens),
            extra_slots=extra_slots,
            partitions=parts.count,
            random=parts.random,
            phase=phase,
            policies=_policies(policy, offload=offloading is not None),
        )
        if offloading:
            run_offload.check(job, ranks)
        else:
            if phase != PHASES[0]:
                raise InputError(f"--phase {phase} goes with --resident: ranks and partitions run whole batches")
            check_options(job)
        job = replace(job, device=check_device(device, size))
        if offloading:
            profile = run_offload.calibrate(job, offloading, report)
        elif job.partitions:
            profile = calibrate_partitions(job, report)
        else:
            launch(job, report)
            profile = load_profile(job.result_file)
    profile = replace(profile, name=out.stem)
    with writing(out):
        profile.save(out)
    click.echo(summary(profile, out))


def _policies(policy: str | None, *, offload: bool) -> tuple[str, ...]:
    """Those to time."""
    if policy is None or policy.strip() == "all":
        return run_offload.CALIBRATED if offload else tuple(RUNNABLE)
    return policy_names(policy, default_baseline(1 if offload else None), run_offload.RUNNABLE if offload else RUNNABLE)


def summary(profile: HardwareProfile, out: Path) -> str:
    """A few lines for people."""
    gpu, links = profile.gpu, profile.links
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in gpu.matmul_flops_per_s.items())
    lines = [
        f"{out}: {profile.provenance.device}",
        f"experts: {1e6 * gpu.launch_s:.0f} us + {1e6 * gpu.expert_s:.0f} us an expert, {rates} "
        f"x {gpu.matmul_efficiency:.0%}, weights {gpu.hbm_bytes_per_s / 1e9:,.1f} GB/s",
        f"attention: {1e6 * gpu.attention.launch_s:.0f} us a layer, {gpu.attention.efficiency:.0%} of the rate",
        f"all-to-all: {1e6 * links.all_to_all.latency_s:.0f} us, {links.all_to_all.bytes_per_s / 1e9:,.2f} GB/s",
    ]
    if links.p2p:
        lines.append(f"copies: {1e6 * links.p2p.latency_s:.0f} us, {links.p2p.bytes_per_s / 1e9:,.2f} GB/s")
    lines += [f"measured curve of experts: {curve.range_text()}" for curve in gpu.expert_curves]
    for what, link in (("all-to-all", links.all_to_all), ("copies", links.p2p)):
        if link and link.curve:
            lines.append(f"measured curve of {what}: {link.curve.range_text()}")
    lines.append("decision point: " + ", ".join(f"{name} {1e6 * s:.0f} us" for name, s in profile.decide_s.items()))
    lines.append(profile.provenance.notes)
    return "\n".join(lines)
