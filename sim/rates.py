"""How fast the executor is, in the few numbers that a rule or a split may weigh copies by.

Policies know no time. An executor that knows its own speed says so in the cluster that it gives them, and what weighs
by time falls back on tokens where it does not. Shape letters: E experts, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moesim.sim.profile import HardwareProfile
    from moesim.sim.scenario import Scenario

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds that experts take on one GPU; the launch, which all GPUs have, is left out."""

    expert_s: float = 0.0
    """Fixed overhead of each distinct expert that has tokens."""
    read_s: float = 0.0
    """Reading one expert's weights."""
    row_s: float = 1.0
    """Computing one row of an expert's matmuls."""
    tile_rows: int = 1
    """Every expert's tokens are rounded up to so many rows."""
    copy_s: float = 0.0
    """One expert's copy from another GPU of the node, alone on its way."""
    layer_s: float = 0.0
    """Experts and attention of a layer of a typical step at even load: what a copy can hide behind without meeting a
    collective."""

    def seconds(self, distinct: Any, rows: Any) -> Floats:
        """Of GPUs with so many distinct experts and rows in whole tiles, arrays of any one shape."""
        return np.asarray(distinct * self.expert_s + np.maximum(distinct * self.read_s, rows * self.row_s))

    def rows(self, tokens: Any) -> Any:
        """Tokens of single experts in whole tiles."""
        return np.ceil(tokens / self.tile_rows) * self.tile_rows

    def hidden_copies(self, layers: int) -> int | None:
        """Copies into one GPU that fit between a decision and the layer that it is for, `layers` layers on; None where
        copies take no time."""
        return int(layers * self.layer_s / self.copy_s) if self.copy_s > 0 else None


TOKENS_ONLY = Rates()
"""A GPU is as busy as it has tokens."""


def rates_of(scenario: Scenario, profile: HardwareProfile, dtype: str) -> Rates:
    """The rates of the simulated executor, by the formulas of the cost model; measured curves are not consulted, since
    they give no seconds per weight read. The typical step is the scenario's median one, its load even and its tokens
    spread over as many experts as independent choices would hit."""
    from moesim.sim.cost import attention_seconds, expert_seconds_of, rank_tokens
    from moesim.traces import assign_ranks

    spec, gpu, c = scenario.spec, profile.gpu, scenario.cluster
    p2p = profile.links.p2p or profile.links.host.link
    tokens = scenario.workload.batch
    attention_s = 0.0
    if scenario.batches:
        order = np.argsort([len(batch.tokens) for batch in scenario.batches], kind="stable")
        typical = scenario.batches[int(order[len(order) // 2])].tokens
        tokens = len(typical)
        decode = scenario.phase.name == "DECODE"
        ranks = rank_tokens(typical, assign_ranks(typical.request, c.gpus), c.gpus, decode)
        attention_s = float(attention_seconds(ranks, spec.stack(scenario.stack), gpu, spec, dtype).max(axis=1).min())
    hit = c.experts * (1 - (1 - c.top_k / c.experts) ** tokens)
    distinct = np.array(max(round(hit / c.gpus), 1))
    rates = Rates(tile_rows=gpu.tile_rows)
    rows = distinct * rates.rows(tokens * c.top_k / c.gpus / distinct)
    return Rates(
        expert_s=gpu.expert_s,
        read_s=spec.expert_bytes(dtype) / gpu.hbm_rate,
        row_s=2 * spec.expert_params() / gpu.matmul_rate(dtype),
        tile_rows=gpu.tile_rows,
        copy_s=float(p2p.seconds(spec.expert_bytes(dtype))),
        layer_s=attention_s + float(expert_seconds_of(distinct, rows, gpu, spec, dtype)),
    )
