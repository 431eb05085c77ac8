"""Named policies for GPUs whose slots do not hold every expert: caches, prefetching, and published offloading systems
as compositions. All compute what the router chose, except those that `Recipe.lossy` names.
"""

from __future__ import annotations

from dataclasses import replace

from moesim.sim.policies.placements import resident_placement, shallow_placement
from moesim.sim.policies.precision import FULL, ByPopularity, ByScore
from moesim.sim.policies.prefetching import (
    Prefetch,
    PrefetchDeeper,
    PrefetchDraft,
    PrefetchOver,
    PrefetchSequence,
)
from moesim.sim.policies.recipe import Recipe

ON_DEMAND = Recipe(
    summary="slots for some experts only, the rest in host memory: copied when needed, least recently used goes",
    placement=resident_placement,
    miss="wait",
    simulated_only=True,
)
FIDDLER = replace(
    ON_DEMAND,
    summary="on-demand, but a missing expert runs on the CPU where that is faster than its copy (Fiddler)",
    miss="cpu",
    deviations="A missing expert that is copied stays, as in a cache; there the GPU's experts are fixed.",
)
HOBBIT = replace(
    ON_DEMAND,
    summary="missing experts in full, int4 or not at all by gate weight, prefetch deeper than what is cached (HOBBIT)",
    predictor="stacked-gate",
    rule=PrefetchDeeper(depth=3),
    eviction="weighted",
    pooled=True,
    precision=ByScore(),
    deviations=(
        "arXiv 2411.01433. One copy of an expert a GPU, in a slot as large as a full one: there low precision has\n"
        "a cache of its own. The cache's four criteria weigh the same: there they are tuned. Experts of fewer bits\n"
        "compute as fast as full ones. Depth 3 is what recordings usually hold of later gates."
    ),
)

OFFLOADING: dict[str, Recipe] = {
    "on-demand": ON_DEMAND,
    "on-demand-cpu": FIDDLER,
    "fiddler": FIDDLER,
    "lfu": replace(ON_DEMAND, summary="on-demand, least often used goes", eviction="lfu"),
    "arc": replace(ON_DEMAND, summary="on-demand, adaptive replacement (ARC)", eviction="arc"),
    "belady": replace(
        ON_DEMAND,
        summary="on-demand, what is needed again last goes: an oracle, the bound of caches",
        eviction="belady",
    ),
    "prefetch-layer": replace(
        ON_DEMAND,
        summary="on-demand, and what the next layer is forecast to need is copied before it is asked for",
        predictor="markov",
        rule=Prefetch(),
        eviction="next-use",
    ),
    "prefetch-ridge": replace(
        ON_DEMAND,
        summary="likely experts only, by our own predictor, and deeper while the next layer has all that is forecast",
        predictor="ridge",
        rule=PrefetchDeeper(depth=4, least=0.5),
        eviction="next-use",
    ),
    "hobbit": HOBBIT,
    "hobbit-exact": replace(
        HOBBIT, summary="hobbit with every expert in full: what its prefetching and cache are worth", precision=FULL
    ),
    "fate": replace(
        ON_DEMAND,
        summary="experts of the first layers stay, ARC for the rest, next gate over-fetched, int4 and int2 (Fate)",
        placement=shallow_placement,
        predictor="cross-gate-over",
        rule=PrefetchOver(percentile=75.0),
        eviction="shallow-arc",
        pooled=True,
        precision=ByPopularity(),
        deviations=(
            "arXiv 2502.12224. At most as many experts of a token are fetched as the recording holds of the next\n"
            "gate's ranking. int2 for the rarest quarter of the fitted requests, in decode as well. A slot is as\n"
            "large as a full expert, whatever it holds; experts of fewer bits compute as fast as full ones."
        ),
    ),
    "sp-moe": replace(
        ON_DEMAND,
        summary="once a step, all layers up to a cutoff, as a draft through the target's gates says (SP-MoE)",
        predictor="draft-gate",
        rule=PrefetchDraft(),
        deviations=(
            "arXiv 2510.10302. No speculative decoding: the draft is the model's own first MoE layer, whose input\n"
            "goes through the later gates. The cutoff's two times are the rule's options and not measured."
        ),
    ),
    "sida": replace(
        ON_DEMAND,
        summary="a network over token embeddings forecasts all layers; its forecast is executed, not exact (SiDA)",
        predictor="sida",
        rule=PrefetchSequence(),
        routing="predicted",
        deviations=(
            "arXiv 2310.18859. All layers' forecasts are made in the step itself, not by a thread one batch ahead.\n"
            "The least recently used expert goes, there the first one that came."
        ),
    ),
    "moe-infinity": replace(
        ON_DEMAND,
        summary="all layers that are left, from the activation matrix most like the sequence so far (MoE-Infinity)",
        predictor="nearest-matrix",
        rule=PrefetchSequence(),
        eviction="next-use",
        deviations=(
            "arXiv 2401.14361. The collection of matrices is fitted once. Nearer layers go first on the link: there\n"
            "nearness and chance are multiplied. Slots belong to layers."
        ),
    ),
    "pre-gated": replace(
        ON_DEMAND,
        summary="what the next layer's gate says of this layer's input is copied ahead (Pre-gated MoE)",
        predictor="cross-gate",
        rule=Prefetch(),
        deviations=(
            "arXiv 2308.12066. There the model is fine-tuned so that the early gate's choice is the routing; here the\n"
            "model's own router decides and what the early gate missed is waited for."
        ),
    ),
    "diff-moe": replace(
        ON_DEMAND,
        summary="a recurrent net forecasts the next layer, hot experts are pinned, the rest is a cache (Diff-MoE)",
        predictor="gru",
        rule=Prefetch(),
        eviction="pinned-lru",
        deviations="SC'25. Half of each layer's slots are pinned, by the fitted requests: its share is not known here.",
    ),
    "expertflow": replace(
        ON_DEMAND,
        summary="a transformer forecasts all layers' experts from the tokens, what comes soonest stays (ExpertFlow)",
        predictor="path-transformer",
        rule=PrefetchSequence(),
        eviction="next-use",
        deviations="Tokens are not regrouped by their forecast paths. Slots belong to layers.",
    ),
    "oracle-prefetch": replace(
        ON_DEMAND,
        summary="perfect forecasts of the running step and Belady's cache; copies still take their time",
        predictor="oracle",
        rule=PrefetchSequence(),
        eviction="belady",
    ),
}
"""By name, merged into POLICIES (systems.py). AdapMoE is not here: too little of it is known to compose it."""
