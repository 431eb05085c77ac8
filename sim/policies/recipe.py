"""What a policy is composed of, before it is fitted to a cluster and a recording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moesim.sim.dispatch import Split, even_split, exact_split
from moesim.sim.eviction import ORACLES
from moesim.sim.policies.placements import Placement
from moesim.sim.policies.precision import FULL, Precision
from moesim.sim.policies.prefetching import (
    Prefetch,
    PrefetchDeeper,
    PrefetchDraft,
    PrefetchOver,
    PrefetchSequence,
)
from moesim.sim.policies.rules import Never, Periodic, Replicate, Rule
from moesim.sim.splits import nearest_split, timed_split

Miss = Literal["wait", "cpu", "substitute", "skip"]
MISSES: tuple[Miss, ...] = get_args(Miss)
Routing = Literal["router", "predicted"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)

SPLITS: dict[str, Split] = {
    "exact": exact_split,
    "even": even_split,
    "nearest": nearest_split,
    "timed": timed_split,
}
RULES: dict[str, type[Rule] | type[Prefetch]] = {
    "never": Never,
    "periodic": Periodic,
    "replicate": Replicate,
    "prefetch": Prefetch,
    "prefetch-deeper": PrefetchDeeper,
    "prefetch-over": PrefetchOver,
    "prefetch-draft": PrefetchDraft,
    "prefetch-sequence": PrefetchSequence,
}
"""By the name that a policy file gives them; its other keys are the fields of the class."""
NEVER = Never()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The parts of a policy."""

    summary: str
    placement: Placement
    predictor: str | None = None
    rule: Rule | Prefetch = NEVER
    split: Split = exact_split
    simulated_only: bool = False
    """True for what several real GPUs do not run: bounds that no machine can reach, mechanisms that they lack, experts
    in host memory. The last of these (`miss`) run on one real GPU."""
    double_buffered: bool = False
    """Replicas of all layers share two buffers, see `Cluster`."""
    phase_locked: bool = False
    """Copies stand still while a collective runs, whatever the execution says of contention (PROBE)."""
    miss: Miss | None = None
    """What to do about an expert that is on no GPU: None where all are; wait for its copy; run it on the host's CPU
    where that is faster; substitute the token's best expert that is there; or skip the pair."""
    eviction: str = "lru"
    """What goes when a copy needs a slot, a name of eviction.EVICTIONS."""
    pooled: bool = False
    """Where the host backs the slots: all layers share a GPU's, see `Cluster`."""
    precision: Precision = FULL
    """In which precision missing experts come."""
    routing: Routing = "router"
    """Whose choice is executed: the router's, or the forecast's."""
    deviations: str = ""
    """What differs from the published system that it is named after."""

    @property
    def lossy(self) -> bool:
        """Whether results differ from the model's: fewer bits, pairs skipped or substituted, or predicted routing."""
        return self.precision.lossy or self.miss in ("substitute", "skip") or self.routing == "predicted"

    @property
    def clairvoyant(self) -> bool:
        """Whether it is shown the future: a bound, no policy for a machine."""
        return self.predictor == "oracle" or self.eviction in ORACLES
