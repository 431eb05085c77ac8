"""Steps of policies that never move an expert: counted many at a time, so that large clusters are simulated fast.

Gives the same numbers, to the bit, as deciding and dispatching layer by layer (tests/sim/test_static.py); the engine
takes this way where nobody wants a log. Shape letters: S steps of a block, T their tokens, L MoE layers, E experts, G
GPUs, A kinds of layers by the dense layers before them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.sim.cost import (
    RankTokens,
    Seconds,
    dense_layers_before,
    exchange_seconds,
    expert_seconds_of,
    layers_seconds,
    measured_ranges,
)
from moesim.sim.events import Book
from moesim.sim.policies import Never, Policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.scenario import Scenario
from moesim.sim.totals import PHASES, StepRecord
from moesim.traces import Batch, Phase

BLOCK = 32
"""Steps that are counted at a time."""
LARGEST_TABLE = 4_000_000
"""Entries of the table of expert seconds; steps that need a larger one go the other way."""


class StaticSteps:
    """The steps of a scenario under a placement in which every expert lies on one GPU."""

    def __init__(self, scenario: Scenario, usable_LEG: NDArray[np.bool_], profile: HardwareProfile, dtype: str) -> None:
        self._scenario, self._profile, self._dtype = scenario, profile, dtype
        self._holder_LE = usable_LEG.argmax(axis=2)
        self._node_G = np.arange(scenario.cluster.gpus) // profile.node_size
        self._ids, self._dropped = np.ascontiguousarray(scenario.run.topk_ids), scenario.run.dropped
        self._drops = bool(self._dropped.any())
        dense_L = np.array(dense_layers_before(scenario.spec.stack(scenario.stack)))
        self._dense_A, self._kind_L = np.unique(dense_L, return_inverse=True)
        distinct, tiles = np.meshgrid(*(np.arange(n) for n in _table_shape(scenario, profile)), indexing="ij")
        rows = tiles * profile.gpu.tile_rows
        self._expert_s = expert_seconds_of(distinct, rows, profile.gpu, scenario.spec, dtype)

    def run(
        self, env: Any, book: Book, decide_s: float, progress: Callable[[int], None] | None
    ) -> Generator[Any, Any, None]:
        """The process of the run: nothing lies between the events, no decisions to wait for and no copies that
        arrive."""
        timeout, keep = env.timeout, book.keep_steps
        layers, done = self._scenario.cluster.layers, 0
        busy_G = np.zeros(self._scenario.cluster.gpus)
        for first in range(0, len(self._scenario.batches), BLOCK):
            block = self._scenario.batches[first : first + BLOCK]
            waits, records, sums_S3, busy_SG = self._block(block, decide_s, keep)
            for step_G in busy_SG:  # one after the other, as elsewhere
                busy_G += step_G
            for wait, record, (balance, mean_load, peak_load) in zip(waits, records, sums_S3, strict=True):
                begin = env.now
                for seconds in wait:
                    if seconds:
                        yield timeout(seconds)
                record["duration_s"] = env.now - begin
                step = StepRecord(**record)
                if keep:
                    book.add(step)
                else:
                    book.totals.add_sums(step, layers, balance, mean_load, int(peak_load))
                done += 1
                if progress:
                    progress(done)
        book.totals.busy_s = busy_G.tolist()

    def _block(
        self, block: tuple[Batch, ...], decide_s: float, keep: bool
    ) -> tuple[list[list[float]], list[dict[str, Any]], list[list[float]], Seconds]:
        """What every step waits for, one after the other; its record, still without a duration (and without what each
        GPU did unless it is kept); the sums of its loads; and the busy seconds of its GPUs."""
        from moesim.sim.kernels import count, place, sums  # compiled: only who runs a static policy pays for it

        c, S = self._scenario.cluster, len(block)
        rows_T = np.concatenate([batch.rows for batch in block])
        request_T = np.concatenate([batch.tokens.request for batch in block])
        position_T = np.concatenate([batch.tokens.position for batch in block])
        tokens_S = [len(batch.tokens) for batch in block]
        ends_S = np.cumsum(tokens_S)
        rank_T, last_T = np.empty((2, len(rows_T)), np.int64)
        tokens_SG, pairs_SG, cached_SG = np.zeros((3, S, c.gpus), np.int64)
        decode = self._scenario.phase is Phase.DECODE
        place(request_T, position_T, ends_S, decode, rank_T, last_T, tokens_SG, pairs_SG, cached_SG)
        attention_SAG = self._attention(RankTokens(tokens_G=tokens_SG, pairs_G=pairs_SG, cached_G=cached_SG))
        near_SL, far_SL = np.empty((2, S, c.layers), np.int64)
        experts_SL, busy_SG = np.empty((S, c.layers)), np.zeros((S, c.gpus))
        load_SLG = np.empty((S if keep else 0, c.layers, c.gpus), np.int64)
        sums_S3, sums_S4 = np.zeros((S, 3)), np.zeros((S, 4))
        count(
            self._ids, self._dropped, self._drops, rows_T, rank_T, last_T, ends_S, self._holder_LE, self._node_G,
            self._profile.gpu.tile_rows, self._expert_s, attention_SAG, self._kind_L,
            near_SL, far_SL, experts_SL, busy_SG, load_SLG, sums_S3,
        )  # fmt: skip
        attention_SL = attention_SAG.max(axis=2)[:, self._kind_L]
        exchange_SL = exchange_seconds(near_SL, far_SL, c.gpus, self._profile, self._scenario.spec, self._dtype)
        sums(attention_SL, exchange_SL, experts_SL, decide_s, sums_S4)
        decide_SL = np.full_like(experts_SL, decide_s)
        wait_SLX = np.stack([attention_SL, decide_SL, exchange_SL, experts_SL, exchange_SL], axis=2)
        waits = wait_SLX.reshape(S, -1).tolist()
        if decide_s:
            waits = [[decide_s, *wait] for wait in waits]
        busy, loads = (busy_SG.tolist(), load_SLG.tolist()) if keep else ([[]] * S, [[]] * S)
        records = [
            {
                "tokens": tokens_S[s],
                "phase_s": dict(zip(PHASES, [*spent, 0.0], strict=True)),
                "busy_s": busy[s],
                "load_LG": loads[s],
            }
            for s, spent in enumerate(sums_S4.tolist())
        ]
        return waits, records, sums_S3.tolist(), busy_SG

    def _attention(self, ranks: RankTokens) -> Seconds:
        """[S, A, G] seconds of attention and dense parts, by kind of layer."""
        stack, spec = self._scenario.spec.stack(self._scenario.stack), self._scenario.spec
        moe_SG, dense_SG = layers_seconds(ranks, stack, self._profile.gpu, spec, self._dtype)
        return moe_SG[:, None] + self._dense_A[:, None] * dense_SG[:, None]


def _table_shape(scenario: Scenario, profile: HardwareProfile) -> tuple[int, int]:
    """(distinct experts, tiles of tokens) that a GPU can have in a step, plus one each."""
    most = max(len(batch.rows) for batch in scenario.batches) * scenario.spec.top_k
    return scenario.cluster.home_slots + 1, most // profile.gpu.tile_rows + scenario.cluster.home_slots + 1


def is_static(
    scenario: Scenario, policy: Policy, profile: HardwareProfile, dtype: str, usable_LEG: NDArray[np.bool_]
) -> bool:
    """Whether the policy never moves an expert, begins with one copy of each, nothing is read off
    a measured curve, and the table is of a size to keep."""
    rule = policy.recipe
    never = isinstance(rule.rule, Never) and policy.predictor is None and rule.miss is None
    distinct, tiles = _table_shape(scenario, profile)
    if measured_ranges(scenario.cluster.gpus, profile, scenario.spec, dtype):
        return False  # whoever leaves a curve must say so
    if profile.gpu.shared_slowdown:
        return False  # a GPU's seconds depend on what the others have to do
    once = bool(usable_LEG.any(axis=2).all()) and np.count_nonzero(usable_LEG) == usable_LEG[..., 0].size
    return never and once and distinct * tiles <= LARGEST_TABLE
