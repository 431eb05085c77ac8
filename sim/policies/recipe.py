"""What a policy is composed of, before it is fitted to a cluster and a recording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moesim.sim.dispatch import Split, even_split, exact_split
from moesim.sim.policies.placements import Placement
from moesim.sim.policies.rules import Never, Periodic, Prefetch, Replicate, Rule

Miss = Literal["wait", "cpu"]
MISSES: tuple[Miss, ...] = get_args(Miss)

SPLITS: dict[str, Split] = {"exact": exact_split, "even": even_split}
RULES: dict[str, type[Rule]] = {"never": Never, "periodic": Periodic, "replicate": Replicate, "prefetch": Prefetch}
"""By the name that a policy file gives them; its other keys are the fields of the class."""
NEVER = Never()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The parts of a policy."""

    summary: str
    placement: Placement
    predictor: str | None = None
    rule: Rule = NEVER
    split: Split = exact_split
    simulated_only: bool = False
    """True for bounds that no machine can reach, and for what the real executor does not have yet."""
    double_buffered: bool = False
    """Replicas of all layers share two buffers, see `Cluster`."""
    miss: Miss | None = None
    """What to do about an expert that is on no GPU: None where all are; wait for its copy, or run it on the host's CPU
    where that is faster."""
    deviations: str = ""
    """What differs from the published system that it is named after."""
