"""Measures the terms of the cost model for offloading on one device, through the executor's own code, and writes a
profile.

The link by the size of a copy (alone, and beside computation), experts over their number and tokens, the dense parts
of a step, and what each policy takes to decide. The scenario is made up by the caller and is never one that is
measured. What a profile says holds for one phase, batch and number of slots. Shape letters: E experts, L MoE layers,
D = d_model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from moesim.backend.clock import Clock
from moesim.backend.cuda import new_stream, recorded
from moesim.backend.grouped import group_pairs
from moesim.backend.offload_session import HOST_TOKENS, OffloadRun, describe_device, host_seconds
from moesim.backend.rates import Work, copy_work, matmul_work, measured_now, memory_bytes
from moesim.backend.session import Pass
from moesim.backend.slots import FULL, Copy, carry
from moesim.sim.cost import attention_seconds, rank_tokens
from moesim.sim.curves import ExpertCurve, MessageCurve
from moesim.sim.policies import Policy
from moesim.sim.profile import Attention, Cpu, Gpu, HardwareProfile, HostLink, Link, Links
from moesim.sim.residency import HOST, Transfer

REPEATS = 7
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PARTS = (1 / 64, 1 / 16, 1 / 4, 1, 2)
"""Sizes of copies, in experts."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of each expert that has any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What does not depend on phase or policy: measured once, used in every profile."""

    bytes_per_s: float
    flops_per_s: float
    host: HostLink
    busy_host: float
    """Seconds of one expert's copy beside computation over its seconds alone."""
    back: MessageCurve
    """The way from the device to the host."""
    cpu: Cpu
    experts: ExpertCurve


def calibrate_device(run: OffloadRun, resident: Policy, copy_dtype: str | None = None) -> Device:
    """Measure the link, the experts and the rates, in the slots of `resident`, a policy that keeps every expert there.
    `copy_dtype`: a copy in so many bits, unpacked on the device, is a point of the link's curve, too."""
    offload = run.offload
    offload.start(resident)
    try:
        shape = offload.patched.shape
        host_s = host_seconds(offload)
        forth, back = _curve(run, copy_dtype, to_device=True), _curve(run, None, to_device=False)
        return Device(
            bytes_per_s=_rate(run.device, copy_work(run.device)),
            flops_per_s=_rate(run.device, matmul_work(run.device, shape.dtype)),
            host=HostLink(latency_s=forth.seconds[0], bytes_per_s=forth.nbytes[-1] / forth.seconds[-1], curve=forth),
            busy_host=_busy(run) if run.device.type == "cuda" else 1.0,
            back=back,
            cpu=Cpu(
                memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                bytes_per_s=shape.bytes / host_s[0],
                flops_per_s=2 * shape.params * HOST_TOKENS[-1] / host_s[-1],
            ),
            experts=_experts(run),
        )
    finally:
        offload.finish()


def profile_of(
    run: OffloadRun, device: Device, passes: dict[str, list[Pass]], resident: str, name: str
) -> HardwareProfile:
    """A profile for the scenario's phase and batch. `passes`: of all policies, on that scenario
    (session.run_interleaved); dense parts are read off those of `resident`, which waits for nothing."""
    spec, dtype = run.scenario.spec, NAMES[run.offload.patched.shape.dtype]
    layers = run.scenario.cluster.layers
    decide_s = {
        policy: float(np.mean([record.phase_s["decide"] for one in some for record in one.records[1:]])) / (layers + 1)
        for policy, some in passes.items()
    }
    gpu = Gpu(
        memory_bytes=memory_bytes(run.device),
        hbm_bytes_per_s=device.bytes_per_s,
        matmul_flops_per_s={dtype: device.flops_per_s},
        tile_rows=1,
        launch_s=device.experts.seconds[0][0],
        expert_s=0.0,
        attention=Attention(launch_s=0.0, efficiency=1.0),
        expert_curves=(device.experts,),
    )
    dense_s = float(np.median([r.phase_s["attention"] for one in passes[resident] for r in one.records[1:]]))
    stack = spec.stack(run.scenario.stack)
    roofs = []
    for step in run.scenario.steps():
        ranks = rank_tokens(step.tokens, step.rank, 1, step.decode)
        roofs.append(float(attention_seconds(ranks, stack, gpu, spec, dtype).sum()))
    launch_s = max(dense_s - float(np.median(roofs)), 0.0) / stack.num_layers
    about = describe_device(run.device)
    copy_s = device.host.link.seconds(run.offload.patched.shape.bytes)
    return HardwareProfile(
        name=name,
        provenance=measured_now(
            "offload",
            run.device,
            where=f"{about['device_name']} ({about['device']}), experts in host memory",
            source="moesim calibrate --resident: the offload executor's own code, made-up tokens and routing",
            notes=f"Holds for {run.scenario.phase.name.lower()}, {run.scenario.workload.describe()['batch']}. "
            f"An expert's copy takes {copy_s * 1e3:.3f} ms alone, {device.busy_host:.2f} times that beside "
            f"computation, {device.back.seconds_at(run.offload.patched.shape.bytes) * 1e3:.3f} ms back.",
        ),
        gpus=1,
        gpu=replace(gpu, attention=Attention(launch_s=launch_s, efficiency=1.0)),
        links=Links(p2p=None, host=device.host, all_to_all=Link(latency_s=0.0, bytes_per_s=device.bytes_per_s)),
        decide_s=decide_s,
        cpu=device.cpu,
    )


def _seconds(device: torch.device, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of `work` on an idle device, after one that is not counted."""
    clock, taken = Clock(device), []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.mark()
        work()
        clock.mark()
        taken.append(clock.read()[1])
    return float(np.median(taken[1:]))


def _rate(device: torch.device, work: Work) -> float:
    """Of the work a second."""
    amount, do = work
    return amount / _seconds(device, do)


def _curve(run: OffloadRun, packed: str | None, *, to_device: bool) -> MessageCurve:
    """Copies of parts of an expert, of one and of two neighbours; and of one in fewer bits (`packed`), unpacking
    included."""
    offload, shape = run.offload, run.offload.patched.shape
    slots_P = offload.slots.rows_SP.view(-1)
    if to_device:
        host_P = offload.host.rows(FULL)[0].view(-1)
    else:  # what is in host memory is the model
        host_P = torch.empty(int(shape.params * PARTS[-1]), dtype=shape.dtype, pin_memory=run.device.type == "cuda")
    found = {}
    for part in PARTS:
        n = min(max(int(shape.params * part), 1), len(host_P), len(slots_P))
        target, source = (slots_P, host_P) if to_device else (host_P, slots_P)
        found[float(n * shape.dtype.itemsize)] = _seconds(
            run.device,
            partial(target[:n].copy_, source[:n], non_blocking=True),
        )
    if packed:
        move = Transfer(layer=0, expert=0, source=HOST, target=0, slot=0)
        copy = Copy(transfer=move, precision=packed)
        found[float(offload.host.bytes(packed))] = _seconds(
            run.device, lambda: carry([copy], offload.host, offload.slots)
        )
    sizes = sorted(found)
    return MessageCurve(nbytes=tuple(sizes), seconds=tuple(found[size] for size in sizes))


def _busy(run: OffloadRun) -> float:
    """Seconds of an expert's copy while the device multiplies matrices, over its seconds alone."""
    offload, shape = run.offload, run.offload.patched.shape
    source, target = offload.host.rows(FULL)[0][0], offload.slots.rows_SP[0]
    beside = new_stream(run.device)
    _, multiply = matmul_work(run.device, shape.dtype)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for busy in (False, True) * REPEATS:
        torch.cuda.synchronize(run.device)
        for _ in range(8 * busy):
            multiply()
        with torch.cuda.stream(beside):
            begin = recorded()
            target.copy_(source, non_blocking=True)
            end = recorded()
        torch.cuda.synchronize(run.device)
        taken[busy].append(begin.elapsed_time(end))
    return float(np.median(taken[True]) / np.median(taken[False]))


def _experts(run: OffloadRun) -> ExpertCurve:
    """Expert phases with equally many tokens for each, another layer's experts each time: weights are not in caches."""
    offload, device = run.offload, run.device
    shape, E, L = offload.patched.shape, offload.patched.experts, run.scenario.cluster.layers
    distinct = [2**i for i in range(E.bit_length()) if 2**i < E] + [E]
    seconds = []
    for n in distinct:
        row = []
        for rows in ROWS:
            x_ND = torch.randn((n * rows, shape.d_model), device=device).to(shape.dtype)
            scale_N = torch.ones(n * rows, dtype=shape.dtype, device=device)
            ids_N = torch.arange(n, device=device).repeat_interleave(rows)[torch.randperm(n * rows, device=device)]
            slots = [offload.slot_E(layer) for layer in range(L)]
            groups = [group_pairs(ids_N, E, torch.from_numpy(slot_E).to(device)) for slot_E in slots]
            turn = iter(range(10**6))

            def work(x_ND: Any = x_ND, scale_N: Any = scale_N, groups: Any = groups, turn: Any = turn) -> None:
                offload.multiply(x_ND, groups[next(turn) % L], scale_N)

            row.append(_seconds(device, work, repeats=5))
        seconds.append(tuple(row))
    return ExpertCurve(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        gated=False,
        dtype=NAMES[shape.dtype],
        distinct=tuple(distinct),
        rows=ROWS,
        seconds=tuple(seconds),
    )
