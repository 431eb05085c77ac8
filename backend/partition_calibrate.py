"""Measures the terms of the cost model for partitions of one device, with the executor's own code.

Expert phases are measured with unequal loads on all partitions at once and on one alone, copies alone and while experts
compute. All inputs are made up here, never the ones that a run measures. Shape letters: E experts, G partitions, L MoE
layers, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from moesim.backend.fit import Floats, fit_link
from moesim.backend.partition_fit import PartitionRates, PhaseSamples, fit_partitions
from moesim.backend.partitions import PartitionExecutor
from moesim.backend.queues import Moment
from moesim.backend.rates import Work, copy_work, matmul_work, measured_now, memory_bytes
from moesim.backend.session import device_name
from moesim.backend.synthetic import synthetic_scenario
from moesim.sim.cost import RankTokens
from moesim.sim.dispatch import Ints
from moesim.sim.policies import Policy, make_policy, recipe
from moesim.sim.policies.rules import Periodic
from moesim.sim.profile import HardwareProfile, HostLink, Link, Links
from moesim.sim.residency import EMPTY
from moesim.traces import Workload

REQUEST_TOKENS = 128
TOTALS = (0.6, 0.8, 1.0)
"""Tokens of the measured expert phases, in batches."""
SPREADS = (0.0, 0.5, 0.9, 1.3)
"""Standard deviations of the logarithm of the experts' loads."""
COPIES = (1 / 8, 1 / 2, 1, 4)
"""Copies between two partitions, in experts."""
ATTENTION_PARTS = (0.25, 0.5, 1.0)
"""Steps whose attention is measured, in batches."""
UNLIMITED = 1e15
"""Bytes/s of the all-to-all: tokens do not travel, they are read and written where they are."""

Say = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    samples: int = 3
    """Expert phases of each total and spread."""
    repeats: int = 5
    decision_steps: int = 6
    """Steps a policy, the first not counted; one that lays out its experts every so many steps runs one more than
    that, so that it does so once in those that count."""


@torch.inference_mode()
def calibrate_partitions(
    executor: PartitionExecutor,
    *,
    dtype: str,
    batch: int,
    policies: Sequence[str],
    source: str,
    effort: Effort | None = None,
    say: Say | None = None,
) -> tuple[HardwareProfile, dict[str, Any]]:
    """(profile, raw samples in JSON types). Takes `executor` away from its scenario; `source` names the model."""
    effort, say = effort or Effort(), say or _silent
    rng = np.random.default_rng(20)
    work = _Work(executor, batch, rng)
    say(0.05, "decisions")
    decide_s, exchange_s = _decisions(work, policies, effort)
    say(0.4, "attention")
    ranks, attention_s = _attention(work)
    say(0.5, "experts")
    samples = _phases(work, effort)
    say(0.85, "copies and memory")
    copies, contention = _copies(work, effort)
    rates = PartitionRates(
        memory_bytes=memory_bytes(executor.device),
        bytes_per_s=_rate(executor, copy_work(executor.device)) / work.gpus,
        flops_per_s=_rate(executor, matmul_work(executor.device, getattr(torch, dtype))) / work.gpus,
        ranks=ranks,
        attention_s=attention_s,
    )
    spec, stack = executor.scenario.spec, executor.scenario.spec.stack(executor.scenario.stack)
    gpu, error = fit_partitions(samples, rates, spec, stack, dtype)
    links = Links(
        p2p=fit_link(*copies),
        # No expert crosses to the host here; memory stands in.
        host=HostLink(latency_s=0.0, bytes_per_s=rates.bytes_per_s),
        all_to_all=Link(latency_s=exchange_s / 2, bytes_per_s=UNLIMITED),
    )
    off = ", ".join(f"{what} {share:.1%}" for what, share in error.items())
    shared = ", ".join(f"{what} {ratio:.2f}x" for what, ratio in contention.items())
    profile = HardwareProfile(
        name=f"measured-{work.gpus}-partitions",
        provenance=measured_now(
            "partitions",
            executor.device,
            where=f"{work.gpus} partitions of {device_name(executor.device)} ({executor.groups.kind})",
            source=f"moesim calibrate --partitions: all at once, the executor's code, shapes of {source}",
            notes=f"{batch} tokens a step; multiprocessors a partition {list(executor.groups.sms)}, kernel "
            f"{executor.kernel}. decide_s has the ids' way to the host and the launches in it. Median error of the "
            f"fit: {off}. Contention: {shared}.",
        ),
        gpus=work.gpus,
        gpu=gpu,
        links=links,
        decide_s=decide_s,
    )
    raw = {
        **samples.to_dict(),
        **rates.to_dict(),
        "copy_bytes": copies[0].tolist(),
        "copy_s": copies[1].tolist(),
        "contention": contention,
        "fit_error": error,
    }
    return profile, raw


class _Work:
    """The executor and what is made up for it."""

    def __init__(self, executor: PartitionExecutor, batch: int, rng: np.random.Generator) -> None:
        self.executor, self.batch, self.rng = executor, batch, rng
        self.spec, self.cluster = executor.scenario.spec, executor.scenario.cluster
        self.gpus = self.cluster.gpus
        self.workload = Workload(batch=batch)

    def steps(self, tokens: Sequence[int]) -> None:
        """Give the executor made-up steps of about so many tokens."""
        lengths = [[REQUEST_TOKENS] * max(count // REQUEST_TOKENS, 1) for count in tokens]
        self.executor.take(synthetic_scenario(self.spec, self.cluster, lengths, self.rng, self.workload))

    def policy(self, name: str) -> Policy:
        """A policy, fitted on the executor's steps."""
        return make_policy(name, self.cluster, self.executor.scenario.fit)


def _decisions(work: _Work, policies: Sequence[str], effort: Effort) -> tuple[dict[str, float], float]:
    """(policy name to mean seconds of a decision point, launches included; seconds that a layer's tokens take to be put
    in order)."""
    layers = work.cluster.layers
    decide_s, exchange = {}, []
    for steps, names in _by_steps(policies, effort.decision_steps).items():
        work.steps([work.batch] * steps)
        for name in names:
            policy = work.policy(name)
            runs = [work.executor.run(policy)[1:] for _ in range(2)]
            # The same work in both passes: the faster one has less of other people's noise.
            best = np.min([[record.phase_s["decide"] for record in run] for run in runs], axis=0)
            decide_s[name] = float(best.mean()) / (layers + 1)
            exchange += [record.phase_s["communication"] / layers for run in runs for record in run]
    return decide_s, float(np.median(exchange))


def _by_steps(policies: Sequence[str], fewest: int) -> dict[int, list[str]]:
    """Steps to run, and the policies to run them with."""
    found: dict[int, list[str]] = {}
    for name in policies:
        rule = recipe(name).rule
        found.setdefault(rule.interval + 1 if isinstance(rule, Periodic) else fewest, []).append(name)
    return found


def _attention(work: _Work) -> tuple[RankTokens, Floats]:
    """What is attended over in steps of several sizes, divided by the partitions, and median seconds of attention."""
    sizes = [max(int(work.batch * part), REQUEST_TOKENS) for part in ATTENTION_PARTS]
    work.steps(sizes)
    policy = work.policy("contiguous")
    runs = [[record.phase_s["attention"] for record in work.executor.run(policy)] for _ in range(4)]
    tokens_N = np.array([len(step.tokens) for step in work.executor.scenario.steps()]) // work.gpus
    ranks = RankTokens(tokens_G=tokens_N, pairs_G=tokens_N * REQUEST_TOKENS, cached_G=np.zeros_like(tokens_N))
    return ranks, np.median(runs[1:], axis=0)


def _phases(work: _Work, effort: Effort) -> PhaseSamples:
    """Expert phases of several totals and spreads, on all partitions with replicas, then on one alone."""
    x_TD = torch.randn((work.batch, work.executor.patched.shape.d_model), device=work.executor.device)
    x_TD = x_TD.to(work.executor.patched.shape.dtype)
    tokens: list[Ints] = []
    busy: list[Floats] = []
    phase: list[float] = []
    for _ in range(effort.samples):
        policy = _with_replicas(work)
        work.executor.begin(policy)
        usable_LEG = work.executor.residency.usable_LEG
        for total in TOTALS:
            for spread in SPREADS:
                layer = len(tokens) % work.cluster.layers
                some_EG = _loads(int(work.batch * total), spread, usable_LEG[layer], work.rng)
                for tokens_EG in (some_EG, _only(some_EG, len(tokens) % work.gpus)):
                    found = [work.executor.expert_phase(layer, x_TD, tokens_EG) for _ in range(effort.repeats + 1)][1:]
                    tokens.append(tokens_EG)
                    phase.append(float(np.median([seconds for seconds, _ in found])))
                    busy.append(np.median([busy_G for _, busy_G in found], axis=0))
    return PhaseSamples(tokens_NEG=np.stack(tokens), busy_NG=np.stack(busy), phase_N=np.array(phase))


def _with_replicas(work: _Work) -> Policy:
    """The contiguous placement with some other expert in every replica slot."""
    policy = work.policy("contiguous")
    placed_LGS = policy.placed_LGS.copy()
    for layer, gpu in np.ndindex(placed_LGS.shape[:2]):
        free = np.flatnonzero(placed_LGS[layer, gpu] == EMPTY)
        others = np.setdiff1d(np.arange(work.cluster.experts), placed_LGS[layer, gpu])
        chosen = work.rng.permutation(others)[: len(free)]
        placed_LGS[layer, gpu, free[: len(chosen)]] = chosen
    return replace(policy, placed_LGS=placed_LGS)


def _loads(total: int, spread: float, usable_EG: Any, rng: np.random.Generator) -> Ints:
    """[E, G] so many tokens over experts whose loads' logarithms are normal, split at random over their copies."""
    share_E = np.exp(spread * rng.standard_normal(len(usable_EG)))
    load_E = rng.multinomial(total, share_E / share_E.sum())
    weight_EG = usable_EG * rng.random(usable_EG.shape)
    split = [rng.multinomial(n, w / w.sum()) for n, w in zip(load_E, weight_EG, strict=True)]
    return np.stack(split).astype(np.int64)


def _only(tokens_EG: Ints, gpu: int) -> Ints:
    """The tokens of one partition."""
    alone_EG = np.zeros_like(tokens_EG)
    alone_EG[:, gpu] = tokens_EG[:, gpu]
    if not alone_EG.any():
        alone_EG[:, gpu] = tokens_EG.sum(axis=1) > 0
    return alone_EG


def _copies(work: _Work, effort: Effort) -> tuple[tuple[Floats, Floats], dict[str, float]]:
    """((bytes, median seconds) of copies into all partitions at once; ratios that say who slows whom down)."""
    executor, shape = work.executor, work.executor.patched.shape
    sizes = np.array([max(int(shape.bytes * part), 1) for part in COPIES], float)
    seconds = [float(np.median(_copy_seconds(work, int(size), work.gpus, effort.repeats))) for size in sizes]
    alone = float(np.median(_copy_seconds(work, shape.bytes, 1, effort.repeats)))
    together = seconds[COPIES.index(1)]
    executor.begin(work.policy("contiguous"))
    x_TD = torch.randn((work.batch, shape.d_model), device=executor.device).to(shape.dtype)
    tokens_EG = _loads(work.batch, 0.0, executor.residency.usable_LEG[0], work.rng)
    quiet = np.median([executor.expert_phase(0, x_TD, tokens_EG)[0] for _ in range(effort.repeats + 1)][1:])
    during: list[float] = []
    busy = []
    for _ in range(effort.repeats):
        moments: list[tuple[Moment, Moment]] = []
        begin_copies = partial(_begin_copies, work, shape.bytes, moments)
        busy.append(executor.expert_phase(0, x_TD, tokens_EG, begin_copies)[0])
        during += [end.since(begin) for begin, end in _waited(moments)]
    return (sizes, np.array(seconds)), {
        "copies into all partitions over one": together / alone,
        "copies while experts compute": float(np.median(during)) / together,
        "experts while copies run": float(np.median(busy) / quiet),
    }


def _copy_seconds(work: _Work, nbytes: int, targets: int, repeats: int) -> list[float]:
    found: list[float] = []
    for repeat in range(repeats + 1):
        work.executor.queues.synchronize()
        moments = [_one_copy(work, nbytes, gpu) for gpu in range(targets)]
        seconds = [end.since(begin) for begin, end in _waited(moments)]
        found += seconds if repeat else []
    return found


def _begin_copies(work: _Work, nbytes: int, moments: list[tuple[Moment, Moment]], ready: Moment) -> None:
    """A copy into every partition from `ready` on; notes their begin and end."""
    for gpu, queue in enumerate(work.executor.queues.copy):
        queue.after(ready)
        moments.append(_one_copy(work, nbytes, gpu))


def _one_copy(work: _Work, nbytes: int, gpu: int) -> tuple[Moment, Moment]:
    """(begin, end) of a copy of so many bytes into a partition, from the first half of the next one's slots to the
    second half of its own."""
    executor = work.executor
    queue = executor.queues.copy[gpu]
    source, target = (executor.slots[g].rows_SP.view(-1).view(torch.uint8) for g in ((gpu + 1) % work.gpus, gpu))
    half = len(target) // 2
    size = min(nbytes, half)
    begin = queue.record()
    queue.run(lambda: target[half : half + size].copy_(source[:size], non_blocking=True))
    return begin, queue.record()


def _waited(moments: list[tuple[Moment, Moment]]) -> list[tuple[Moment, Moment]]:
    for _, end in moments:
        end.wait()
    return moments


def _rate(executor: PartitionExecutor, work: Work) -> float:
    """Amount of work a second on the whole device."""
    amount, do = work
    main = executor.queues.main
    taken = []
    for _ in range(6):
        begin = main.record()
        main.run(do)
        end = main.record()
        end.wait()
        taken.append(end.since(begin))
    return amount / float(np.median(taken[1:]))


def _silent(_share: float, _what: str) -> None:
    """Nobody wants to know."""
