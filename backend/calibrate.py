"""Measures the terms of the cost model on this machine, with the executor's own code and all ranks at work at once.

At once, so that what they share (cores, memory, the bus) is in the numbers. Inputs are random, never the ones that a
run measures. Shape letters: E experts, G ranks, N samples, L MoE layers, D = d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.backend.clock import Clock
from moesim.backend.fit import Compute, Floats, fit_gpu, fit_link, relative_error, without_noise
from moesim.backend.hub import model_name
from moesim.backend.job import Job
from moesim.backend.loading import model_of, spec_of
from moesim.backend.measure import ATTENTION, DECIDE, GATHER
from moesim.backend.parallel import Executor
from moesim.backend.ranks import Ranks
from moesim.backend.rates import Work, copy_work, matmul_work, measured_now, memory_bytes
from moesim.backend.session import describe_device
from moesim.backend.synthetic import synthetic_scenario
from moesim.sim.cost import RankTokens, rank_tokens
from moesim.sim.curves import ExpertCurve
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.profile import Gpu, HardwareProfile, HostLink, Link, Links
from moesim.sim.residency import Cluster
from moesim.sim.scenario import Scenario
from moesim.traces import InputError

REQUEST_TOKENS = 128
DECISION_STEPS = 9
"""Steps a policy, the first not counted: with it EPLB lays out its experts once in the eight that are."""
ATTENTION_SHAPES = ((1, 16), (16, 16), (1, 64), (4, 64), (16, 64), (1, 128), (4, 128), (8, 128), (16, 128), (4, 256))
"""(requests a rank, tokens a request)."""
EXPERT_TOKENS = (1, 4, 16, 64, 256, 1024)
"""Tokens of each expert that has any."""
SHORT_TOKENS, LONG_TOKENS = 512, 4096
"""Expert phases of at most, and of more than, so many tokens are repeated more, and less, often than others."""
ROWS = (0, 1, 8, 64, 256, 1024)
"""Rows that each rank sends to each other one."""
COPIES = (1 / 64, 1 / 8, 1, 4)
"""Messages between two ranks, in experts."""
REPEATS, LONG_REPEATS, SHORT_REPEATS = 7, 3, 25
"""Short work is noisy, messages above all, and a curve keeps the noise that a fit evens out."""


@torch.inference_mode()
def calibrate_ranks(job: Job, ranks: Ranks) -> None:
    """Measure, and leave the profile in the job's result file. Raises InputError where the model cannot be used."""
    job.say(ranks.rank, 0.0, "loading the model")
    model = model_of(job, ranks.device)
    spec = spec_of(model)
    if "encoder" not in [stack.name for stack in spec.stacks]:
        raise InputError(f"{job.model}: calibration needs a model with MoE layers in its encoder")
    stack = spec.stack("encoder")
    cluster = Cluster(
        layers=len(stack.moe_layers), experts=spec.num_experts, gpus=ranks.size, extra_slots=job.extra_slots
    )
    rng = np.random.default_rng(0)
    requests = max(job.workload.batch // REQUEST_TOKENS, 1)
    work = synthetic_scenario(spec, cluster, [[REQUEST_TOKENS] * requests] * DECISION_STEPS, rng, job.workload)
    executor = Executor(ranks, model, work)
    decide_s = _decisions(job, executor, work)
    shapes = [[tokens] * (count * ranks.size) for count, tokens in ATTENTION_SHAPES]
    tokens_of_ranks, attention_s = _attention(
        job, executor, synthetic_scenario(spec, cluster, shapes, rng, job.workload)
    )
    tokens_EN, experts_s, curve = _experts(job, executor)
    job.say(ranks.rank, 0.85, "links and memory")
    nbytes_per_s = _rate(ranks, copy_work(ranks.device))
    compute = Compute(
        tokens_EN=tokens_EN,
        experts_s=experts_s,
        ranks=tokens_of_ranks,
        attention_s=attention_s,
        memory_bytes=memory_bytes(ranks.device) // (1 if ranks.on_gpu else ranks.size),
        bytes_per_s=nbytes_per_s,
        flops_per_s=_rate(ranks, matmul_work(ranks.device, getattr(torch, job.dtype))),
    )
    links = _links(executor, nbytes_per_s)
    if ranks.rank == 0:
        gpu = without_noise(fit_gpu(compute, spec, stack, job.dtype))
        error = relative_error(gpu, compute, spec, stack, job.dtype)
        # The fit and its error are the formula's own; the curve goes before it where experts have this shape.
        gpu = replace(gpu, expert_curves=(curve,))
        _profile(job, ranks, gpu, links, decide_s, compute, error).save(job.result_file)


def seconds_of(ranks: Ranks, work: Callable[[], object], repeats: int = REPEATS) -> Floats:
    """[G] median over the repeats of each rank's seconds for `work`, which all ranks begin together."""
    clock = Clock(ranks.device)
    taken = []
    for _ in range(repeats + 2):
        ranks.barrier()
        clock.mark()
        work()
        clock.mark()
        taken.append(clock.read()[1])
    mine = torch.tensor([float(np.median(taken[2:]))], dtype=torch.float64)
    return ranks.all_gather(mine).numpy()[:, 0]


def _decisions(job: Job, executor: Executor, scenario: Scenario) -> dict[str, float]:
    """Policy name to mean seconds of a decision point: the exchange of ids, forecasts, planning, the split."""
    names = list(job.policies) or [name for name, parts in POLICIES.items() if not parts.simulated_only]
    asked: dict[str, list[Floats]] = {name: [] for name in names}
    gathered = []
    for done in range(2 * len(names)):
        name = names[done % len(names)]
        job.say(executor.ranks.rank, 0.1 + 0.4 * done / (2 * len(names)), f"decisions of {name}")
        executor.run(make_policy(name, scenario.cluster, scenario.fit))
        # The first step is not counted: it warms caches, and policies plan all layers in it.
        phase_NGLP = executor.measured.phase_NGLP[1:]
        asked[name].append(phase_NGLP[:, :, :, DECIDE].max(axis=1))
        gathered.append(phase_NGLP[:, :, :, GATHER].min(axis=1).sum(axis=1))
    points = scenario.cluster.layers + 1
    # A step's decisions are the same work in both passes, so the faster one has less of other people's noise; the
    # exchange of ids is the same for all policies.
    exchange_s = float(np.median(gathered)) / points
    return {name: float(np.min(runs, axis=0).sum(axis=1).mean()) / points + exchange_s for name, runs in asked.items()}


def _attention(job: Job, executor: Executor, scenario: Scenario) -> tuple[RankTokens, Floats]:
    """What each rank attended over in each step, and the median seconds of its attention, [N = steps x G] both."""
    executor.take(scenario)
    policy = make_policy("contiguous", scenario.cluster, scenario.fit)
    runs = []
    for repeat in range(4):
        job.say(executor.ranks.rank, 0.5 + 0.05 * repeat, "attention")
        executor.run(policy)
        runs.append(executor.measured.phase_NGLP[:, :, :, ATTENTION].sum(axis=2))
    attended = [rank_tokens(s.tokens, s.rank, executor.ranks.size, s.decode) for s in scenario.steps()]
    together = RankTokens(
        tokens_G=np.concatenate([r.tokens_G for r in attended]),
        pairs_G=np.concatenate([r.pairs_G for r in attended]),
        cached_G=np.concatenate([r.cached_G for r in attended]),
    )
    return together, np.median(runs[1:], axis=0).ravel()


def _experts(job: Job, executor: Executor) -> tuple[Any, Floats, ExpertCurve]:
    """Tokens by expert [E, N] and median seconds [N] of expert phases over distinct experts and the tokens of each of
    them, and the same as a curve. Replica slots are in use, too: there are phases with more experts than are at home.
    """
    ranks, cluster, shape = executor.ranks, executor.scenario.cluster, executor.patched.shape
    executor.run(make_policy("contiguous", cluster, executor.scenario.fit))
    most = min(cluster.layer_slots, cluster.experts)
    distinct = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    grid = [(n, rows) for n in distinct for rows in EXPERT_TOKENS]
    samples, seconds = [], []
    for done, (n, rows) in enumerate(grid):
        job.say(ranks.rank, 0.7 + 0.15 * done / len(grid), "experts")
        tokens, count_X = n * rows, np.full(n, rows)
        x_ND = torch.randn((tokens, shape.d_model), device=ranks.device).to(shape.dtype)
        group = torch.randperm(tokens, device=ranks.device)
        turn = iter(range(10**6))

        def work(x_ND: Any = x_ND, group: Any = group, count_X: Any = count_X, n: int = n, turn: Any = turn) -> None:
            # Another layer's experts each time, as in a model: their weights are not in the caches.
            first = (next(turn) % cluster.layers) * cluster.layer_slots
            executor.slots.apply(x_ND, group, list(range(first, first + n)), count_X.tolist())

        samples.append(np.pad(count_X, (0, cluster.experts - n)))
        repeats = SHORT_REPEATS if tokens <= SHORT_TOKENS else REPEATS if tokens <= LONG_TOKENS else LONG_REPEATS
        seconds.append(float(np.median(seconds_of(ranks, work, repeats))))
    per = len(EXPERT_TOKENS)
    curve = ExpertCurve(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        gated=False,
        dtype=job.dtype,
        distinct=tuple(distinct),
        rows=EXPERT_TOKENS,
        seconds=tuple(tuple(seconds[i : i + per]) for i in range(0, len(seconds), per)),
    )
    return np.stack(samples, axis=1), np.array(seconds), curve


def _links(executor: Executor, nbytes_per_s: float) -> Links:
    """Collective and copies between ranks; on one rank there are none, and memory stands in."""
    ranks = executor.ranks
    host = HostLink(latency_s=0.0, bytes_per_s=_host_rate(ranks, nbytes_per_s))
    if ranks.size == 1:
        alone = Link(latency_s=0.0, bytes_per_s=nbytes_per_s)
        return Links(p2p=alone, host=host, all_to_all=alone)
    shape = executor.patched.shape
    moved, seconds = [], []
    for rows in ROWS:
        x_ND = torch.zeros((rows * ranks.size, shape.d_model), dtype=shape.dtype, device=ranks.device)
        order = torch.randperm(len(x_ND), device=ranks.device)
        took = seconds_of(ranks, partial(_there_and_back, ranks, x_ND, order, [rows] * ranks.size), SHORT_REPEATS)
        moved.append(rows * (ranks.size - 1) * shape.d_model * shape.dtype.itemsize)
        seconds.append(float(took.max()) / 2)
    all_to_all = fit_link(np.array(moved, float), np.array(seconds))
    sizes = [max(int(shape.bytes * part), 1) for part in COPIES]
    copies = [float(seconds_of(ranks, partial(_to_neighbour, ranks, n), SHORT_REPEATS).max()) for n in sizes]
    return Links(p2p=fit_link(np.array(sizes, float), np.array(copies)), host=host, all_to_all=all_to_all)


def _there_and_back(ranks: Ranks, x_ND: torch.Tensor, order_N: torch.Tensor, rows_G: list[int]) -> None:
    """Dispatch and combine of equally many rows to every rank, with the sorting and scaling that the executor does."""
    back_ND = ranks.all_to_all(ranks.all_to_all(x_ND[order_N], rows_G, rows_G), rows_G, rows_G)
    out_ND = torch.zeros_like(x_ND)
    out_ND[order_N] = back_ND * x_ND[order_N, :1]


def _to_neighbour(ranks: Ranks, nbytes: int) -> None:
    """Every rank sends one message to the next and waits for the one from the rank before."""
    sent = torch.zeros(nbytes, dtype=torch.uint8, device=ranks.device)
    got = torch.empty_like(sent)
    after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    operations = [
        dist.P2POp(dist.isend, sent, group=ranks.copies, group_peer=after),
        dist.P2POp(dist.irecv, got, group=ranks.copies, group_peer=before),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _rate(ranks: Ranks, work: Work) -> float:
    """Of the work a second, on each rank while the others do the same."""
    amount, do = work
    return amount / float(seconds_of(ranks, do).max())


def _host_rate(ranks: Ranks, nbytes_per_s: float) -> float:
    """Bytes/s from pinned host memory to the GPU; ranks on a CPU are in host memory."""
    if not ranks.on_gpu:
        return nbytes_per_s
    source = torch.zeros(2**27, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=ranks.device)
    return 2**27 / float(seconds_of(ranks, lambda: target.copy_(source, non_blocking=True)).max())


def _profile(
    job: Job,
    ranks: Ranks,
    gpu: Gpu,
    links: Links,
    decide_s: dict[str, float],
    compute: Compute,
    error: dict[str, float],
) -> HardwareProfile:
    device = describe_device(ranks)
    shape = job.random or model_name(job.model) or "a random Switch model"
    off = ", ".join(f"{what} {share:.0%}" for what, share in error.items())
    return HardwareProfile(
        name=f"measured-{device['device']}-{ranks.size}",
        provenance=measured_now(
            "ranks",
            ranks.device,
            where=f"{ranks.size} x {device['device_name']} ({device['device']} ranks, {device['backend']})",
            source=f"moesim calibrate: all ranks at once, the executor's code, shapes of {shape}, random tokens",
            notes=f"decide_s: {job.workload.batch} tokens a step, exchange of ids included. Plain copy "
            f"{compute.bytes_per_s / 1e9:.1f} GB/s, plain matmul {compute.flops_per_s / 1e9:.0f} GFLOP/s a rank. "
            f"Median error of the fit: {off}.",
        ),
        gpus=ranks.size,
        gpu=gpu,
        links=links,
        decide_s=decide_s,
    )
