"""From the marks that every rank made along a step to step records.

Knows nothing about how the marks came about. Shape letters: G ranks, N steps, L MoE layers, M marks of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.ranks import Ranks
from moesim.sim.results import StepRecord
from moesim.sim.timeline import Span

Floats = NDArray[np.float64]

START_MARKS = ("start", "decided", "unblocked")
LAYER_MARKS = ("routed", "gathered", "decided", "unblocked", "split", "received", "computed", "combined")
"""start .. unblocked: decision point 0 and its demand copies. Per layer: router output, ids of all ranks here (and
arrived copies in slots), policy asked, demand copies here, split made, tokens here, experts done, results here."""

START_SPANS = ("decide", "blocked")
LAYER_SPANS = ("attention", "exchange ids", "decide", "blocked", "split", "dispatch", "experts", "combine")
"""What ends at each mark but the first: names of a timeline, the simulator's where it knows the same."""

COLUMNS = ("attention", "gather", "decide", "experts", "blocked")
ATTENTION, GATHER, DECIDE, EXPERTS, BLOCKED = range(len(COLUMNS))


def phases(marks: list[float], layers: int) -> Floats:
    """[L + 2, 5] seconds of one rank: rows are the start of the step, its layers, and what follows the last of them."""
    head = len(START_MARKS)
    table = np.zeros((layers + 2, len(COLUMNS)))
    start, decided, unblocked = marks[:head]
    table[0, DECIDE], table[0, BLOCKED] = decided - start, unblocked - decided
    before = unblocked
    at_LM = np.array(marks[head:-1]).reshape(layers, len(LAYER_MARKS))
    for layer, (routed, gathered, asked, free, split, received, computed, combined) in enumerate(at_LM, 1):
        table[layer, ATTENTION] = routed - before
        table[layer, GATHER] = gathered - routed
        table[layer, DECIDE] = (asked - gathered) + (split - free)
        table[layer, BLOCKED] = free - asked
        table[layer, EXPERTS] = computed - received
        before = combined
    table[layers + 1, ATTENTION] = marks[-1] - before
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What all ranks measured in a run."""

    marks_NGM: Floats
    """Seconds since each rank's own start of the step, START_MARKS, LAYER_MARKS by layer, and the end."""
    phase_NGLP: Floats
    """[N, G, L + 2, 5] seconds, see `phases`."""
    duration_N: Floats
    """Seconds from the common start until the last rank is done."""
    computed_NLG: NDArray[np.int64]
    """Tokens that the experts of each rank computed."""
    tokens_N: list[int]
    moved_N: list[int]
    hidden_N: list[int]

    def records(self) -> list[StepRecord]:
        """One record a step."""
        return [self._record(n) for n in range(len(self.duration_N))]

    def spans(self) -> list[Span]:
        """What every rank did when; steps lie end to end, and ranks begin each together."""
        begin_N = np.cumsum(self.duration_N) - self.duration_N
        return [
            Span(name, f"GPU {rank}", float(begin + start), float(end - start))
            for begin, marks_GM in zip(begin_N, self.marks_NGM, strict=True)
            for rank, marks in enumerate(marks_GM)
            for name, start, end in zip(self._names(), marks, marks[1:], strict=False)
            if end > start
        ]

    def _names(self) -> list[str]:
        """[M - 1] what lies between a mark and the next."""
        layers = (self.marks_NGM.shape[2] - len(START_MARKS) - 1) // len(LAYER_MARKS)
        return [*START_SPANS, *(LAYER_SPANS * layers), "attention"]

    def phase_s(self, n: int) -> dict[str, float]:
        """Seconds of step `n` on the critical path: per layer the slowest rank, summed over the layers.

        The exchange of ids counts to the decision that needs it, at the time that the last rank to come spends in it:
        the others wait. All that is left is communication. Decisions and demand copies of different ranks may overlap,
        so that the slowest of each can add up to a little more than the step.
        """
        phase_GLP = self.phase_NGLP[n]
        slowest = phase_GLP.max(axis=0).sum(axis=0)
        gather = phase_GLP[:, :, GATHER].min(axis=0).sum()
        seconds = {
            "attention": float(slowest[ATTENTION]),
            "decide": float(slowest[DECIDE] + gather),
            "experts": float(slowest[EXPERTS]),
            "blocked": float(slowest[BLOCKED]),
        }
        seconds["communication"] = max(float(self.duration_N[n]) - sum(seconds.values()), 0.0)
        return seconds

    def _record(self, n: int) -> StepRecord:
        busy_G = self.phase_NGLP[n][:, :, [ATTENTION, EXPERTS]].sum(axis=(1, 2))
        return StepRecord(
            duration_s=float(self.duration_N[n]),
            tokens=self.tokens_N[n],
            phase_s=self.phase_s(n),
            load_LG=self.computed_NLG[n].tolist(),
            busy_s=busy_G.tolist(),
            moved_bytes=self.moved_N[n],
            hidden_bytes=self.hidden_N[n],
        )


class Timeline:
    """What one rank measures in a run, step by step."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._rows: list[Floats] = []
        self._tokens: list[int] = []
        self._moved: list[int] = []
        self._hidden: list[int] = []

    def add(self, marks: list[float], computed_L: list[int], *, tokens: int, moved: int, hidden: int) -> None:
        """One finished step: this rank's marks, and the tokens that its experts computed in each layer; the rest is the
        same on all ranks."""
        self._rows.append(np.concatenate([marks, computed_L]))
        self._tokens.append(tokens)
        self._moved.append(moved)
        self._hidden.append(hidden)

    def exchange(self, ranks: Ranks) -> Measured:
        """Put the steps of all ranks together; every rank must call this, and every rank gets the result."""
        all_GNX = ranks.all_gather(torch.from_numpy(np.stack(self._rows))).numpy()
        marks_NGM = all_GNX[:, :, : -self._layers].swapaxes(0, 1)
        phase_NGLP = np.stack([[phases(marks.tolist(), self._layers) for marks in marks_GM] for marks_GM in marks_NGM])
        return Measured(
            marks_NGM=marks_NGM,
            phase_NGLP=phase_NGLP,
            duration_N=marks_NGM[:, :, -1].max(axis=1),
            computed_NLG=np.moveaxis(all_GNX[:, :, -self._layers :], 0, 2).astype(np.int64),
            tokens_N=self._tokens,
            moved_N=self._moved,
            hidden_N=self._hidden,
        )
