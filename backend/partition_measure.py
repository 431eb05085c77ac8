"""From the moments of a step on partitions to its record.

All moments of a step lie on the main queue, one after the other, so its phases add up to its duration; beside them
every partition has the begin and end of its experts. Shape letters: L MoE layers, G partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.backend.queues import Moment
from moesim.sim.results import PHASES, StepRecord
from moesim.sim.timeline import Span

LAYER_MOMENTS = ("routed", "gathered", "asked", "unblocked", "split", "placed", "ready", "computed")
"""Router output there; ids on the host; policy asked; demand copies there; tokens split over partitions; tokens in
their partitions' order; all partitions' kernels launched (a gate holds them until then); the last partition done."""
PHASE_OF = dict(
    zip(
        LAYER_MOMENTS,
        ("attention", "decide", "decide", "blocked", "decide", "communication", "decide", "experts"),
        strict=True,
    )
)
"""The phase that ends at each moment. Dispatch and combine are a gather and a scatter inside the experts' kernels; what
remains of communication is putting the tokens' numbers in order."""

PartitionSpan = tuple[Moment, Moment] | None
"""Begin and end of one partition's experts; None where it had no tokens."""


@dataclass(slots=True)
class StepMoments:
    """What is noted while a step runs."""

    start: Moment
    decided: Moment | None = None
    unblocked: Moment | None = None
    layers: list[dict[str, Moment]] = field(default_factory=list)
    spans_LG: list[list[PartitionSpan]] = field(default_factory=list)
    tokens_LG: list[list[int]] = field(default_factory=list)
    end: Moment | None = None


@dataclass(slots=True)
class Shares:
    """Sums over layers, of the expert phases alone."""

    gpus: int
    window_s: float = 0.0
    """From the first partition's begin to the last one's end."""
    busy_s: float = 0.0
    """Of all partitions."""
    launch_s: float = 0.0
    spread_s: float = 0.0
    layers: int = 0

    def summary(self) -> dict[str, float | int | None]:
        """expert_busy_share: busy seconds of all partitions over G x the time from the first begin to the last end.
        launch_s and start_spread_s: means of a layer, the time for the host to launch all partitions (counted to
        deciding) and between the first and the last partition's begin."""
        layers = max(self.layers, 1)
        return {
            "expert_busy_share": self.busy_s / (self.gpus * self.window_s) if self.window_s else None,
            "launch_s": self.launch_s / layers,
            "start_spread_s": self.spread_s / layers,
        }


def total(parts: Sequence[Shares]) -> Shares:
    """The sum over steps, at least one."""
    names = ("window_s", "busy_s", "launch_s", "spread_s", "layers")
    return Shares(parts[0].gpus, **{name: sum(getattr(part, name) for part in parts) for name in names})


def step_record(moments: StepMoments, shares: Shares, *, tokens: int, moved: int, hidden: int) -> StepRecord:
    """The record of a finished step, all of whose moments are done; adds to `shares`."""
    phase_s = dict.fromkeys(PHASES, 0.0)
    assert moments.decided is not None and moments.unblocked is not None and moments.end is not None
    phase_s["decide"] += moments.decided.since(moments.start)
    phase_s["blocked"] += moments.unblocked.since(moments.decided)
    before = moments.unblocked
    busy_G = np.zeros(shares.gpus)
    for layer, spans_G in zip(moments.layers, moments.spans_LG, strict=True):
        for name in LAYER_MOMENTS:
            phase_s[PHASE_OF[name]] += layer[name].since(before)
            before = layer[name]
        busy_G += _add_layer(layer, spans_G, shares)
    phase_s["attention"] += moments.end.since(before)
    return StepRecord(
        duration_s=moments.end.since(moments.start),
        tokens=tokens,
        phase_s=phase_s,
        load_LG=moments.tokens_LG,
        # All partitions compute attention together, on the whole device.
        busy_s=(busy_G + phase_s["attention"]).tolist(),
        moved_bytes=moved,
        hidden_bytes=hidden,
    )


def step_spans(moments: StepMoments, begin_s: float) -> list[Span]:
    """The step on a timeline that it enters at `begin_s`: what is not split, and the experts of every partition."""
    assert moments.decided is not None and moments.unblocked is not None and moments.end is not None
    marks = [("decide", moments.decided), ("blocked", moments.unblocked)]
    spans = []
    for layer, spans_G in zip(moments.layers, moments.spans_LG, strict=True):
        marks += [(PHASE_OF[name], layer[name]) for name in LAYER_MOMENTS]
        for gpu, span in enumerate(spans_G):
            if span:
                at_s = begin_s + span[0].since(moments.start)
                spans.append(Span("experts", f"GPU {gpu}", at_s, span[1].since(span[0])))
    marks.append(("attention", moments.end))
    before = moments.start
    for name, moment in marks:
        if (seconds := moment.since(before)) > 0 and name != "experts":
            spans.append(Span(name, "all GPUs", begin_s + before.since(moments.start), seconds))
        before = moment
    return spans


def busy_seconds(spans_G: list[PartitionSpan]) -> list[float]:
    """[G] seconds of each partition's experts."""
    return [span[1].since(span[0]) if span else 0.0 for span in spans_G]


def _add_layer(layer: dict[str, Moment], spans_G: list[PartitionSpan], shares: Shares) -> NDArray[np.float64]:
    busy_G = np.array(busy_seconds(spans_G))
    starts, ends = ([span[i].since(layer["placed"]) for span in spans_G if span] or [0.0] for i in (0, 1))
    shares.layers += 1
    shares.window_s += max(ends) - min(starts)
    shares.busy_s += float(busy_G.sum())
    shares.launch_s += layer["ready"].since(layer["placed"])
    shares.spread_s += max(starts) - min(starts)
    return busy_G
