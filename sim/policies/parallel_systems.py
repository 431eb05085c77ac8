"""Published systems of expert parallelism, and ours: where experts lie, which are copied, and who computes the tokens.

Each is a few lines, so that the difference between two of them can be read; `deviations` says what differs from the
paper. What they have in common is said once, in COMMON.
"""

from __future__ import annotations

from moesim.sim.dispatch import even_split, exact_split
from moesim.sim.policies.placements import balanced_placement, contiguous_placement
from moesim.sim.policies.recipe import Recipe
from moesim.sim.policies.rules import Periodic, Replicate
from moesim.sim.policies.together import affinity_placement, balanced_affinity_placement, group_placement
from moesim.sim.splits import nearest_split, timed_split

COMMON = (
    "The true router decides what runs. Replicas take slots that the cluster has beside the homes (--extra-slots), and "
    "of each expert a GPU has one copy at most.\n"
)
AFFINE = (
    "Tokens return to the GPU of their request after every layer, so fewer changes of GPU between layers are counted "
    "but save no time; what saves time is that co-chosen experts share a GPU, with --send per-gpu.\n"
)

PARALLEL: dict[str, Recipe] = {
    "eplb-hierarchical": Recipe(
        summary="eplb, groups of experts kept in one node: groups to nodes, replicas, then GPUs (DeepSeek EPLB)",
        placement=group_placement,
        predictor="window",
        rule=Periodic(interval=8, hierarchical=True),
        split=even_split,
        deviations=COMMON + "Where nodes do not divide the groups, or a GPU has failed, it is the flat variant.",
    ),
    "lplb": Recipe(
        summary="eplb's replicas, and every batch split over them so that the busiest GPU is least busy (LPLB)",
        placement=balanced_placement,
        predictor="window",
        rule=Periodic(interval=8),
        split=exact_split,
        deviations=COMMON + "The linear program's optimum in whole tokens, found without a solver.",
    ),
    "eplb-incremental": Recipe(
        summary="every 8 steps at most 4 copies a layer, each only where it pays, tokens split exactly (ours)",
        placement=balanced_placement,
        predictor="window",
        rule=Periodic(interval=8, moves=4),
        split=exact_split,
    ),
    "moe-gps-distribution": Recipe(
        summary="replicate the next layer's hot experts, forecast from the distribution so far (MoE-GPS, cheap)",
        placement=balanced_placement,
        predictor="distribution",
        rule=Replicate(next_batch=False),
        deviations=COMMON + "Replicas are planned greedily, tokens split exactly.",
    ),
    "moe-gps-token": Recipe(
        summary="the same, forecast token by token from what is known before the step (MoE-GPS, exact)",
        placement=balanced_placement,
        predictor="token-table",
        rule=Replicate(next_batch=False),
        deviations=COMMON + "A table by vocabulary id takes the place of the paper's choice of predictors.",
    ),
    "lina": Recipe(
        summary="popularity by path (experts of the last layers), replicas in proportion to it before the gate (Lina)",
        placement=balanced_placement,
        predictor="path",
        rule=Replicate(next_batch=False, plan="popular"),
        split=even_split,
        deviations=COMMON + "No second plan once the gate has spoken, which the paper makes in about 23% of the cases.",
    ),
    "libra": Recipe(
        summary="replicas by what the next layer's gate says of this layer's input, local first (Libra)",
        placement=balanced_placement,
        predictor="cross-gate",
        rule=Replicate(next_batch=False),
        split=nearest_split,
        simulated_only=True,
        deviations=COMMON + "Replicas are planned greedily. Local first within a bound on the busiest GPU.",
    ),
    "probe": Recipe(
        summary="replicas by time, as many as can be hidden, from frozen gates with a trained correction (PROBE)",
        placement=contiguous_placement,
        predictor="gate-mlp-online",
        rule=Replicate(next_batch=False, plan="weighed", most_moves=16, most_per_gpu=3, hide=True),
        split=timed_split,
        double_buffered=True,
        phase_locked=True,
        simulated_only=True,
        deviations=COMMON + "Copies pause in both all-to-alls, not only in the combining one. How many can be hidden "
        "is worked out once for the median step, without collectives.",
    ),
    "probe-gate": Recipe(
        summary="probe with the frozen gates as they are: nothing to train, lookahead is enough",
        placement=contiguous_placement,
        predictor="cross-gate",
        rule=Replicate(next_batch=False, plan="weighed", most_moves=16, most_per_gpu=3, hide=True),
        split=timed_split,
        double_buffered=True,
        phase_locked=True,
        simulated_only=True,
        deviations=COMMON + "As probe, and the predictor is the paper's starting point (top-k 70-80% there).",
    ),
    "fastermoe": Recipe(
        summary="experts over twice the mean load, measured in the last step, on all GPUs (FasterMoE's shadowing)",
        placement=contiguous_placement,
        predictor="previous",
        rule=Replicate(next_batch=False, plan="shadow"),
        split=nearest_split,
        deviations=COMMON + "A training system: it shadows for the running iteration, once its gate has spoken, and "
        "decides by a model of latency. There, a shadowed expert's tokens never leave their GPU; here they may, within "
        "a bound on the busiest one.",
    ),
    "exflow": Recipe(
        summary="experts that follow each other from layer to layer on one GPU, no replicas (ExFlow)",
        placement=affinity_placement,
        deviations=COMMON + AFFINE + "The integer program is solved for small models, else local search.",
    ),
    "moetuner": Recipe(
        summary="exflow within 5% of the balanced placement's busiest GPU (MoETuner)",
        placement=balanced_affinity_placement,
        deviations=COMMON + AFFINE + "The integer program is solved for small models, else local search.",
    ),
    "predictive-replication": Recipe(
        summary="the next batch's overloaded experts copied just often enough, at most 4 times (arXiv 2605.11537)",
        placement=balanced_placement,
        predictor="predictive-replication",
        rule=Replicate(next_batch=True, plan="enough", cap=4),
        simulated_only=True,
        deviations=COMMON + "The paper executes the prediction as the routing, on one GPU, and offloads idle experts. "
        "Overloaded is over twice the mean load, and the cap of 4 is this project's.",
    ),
    "predictive-replication-executed": Recipe(
        summary="the same as the paper runs it: the prediction is executed as the routing (not exact)",
        placement=balanced_placement,
        predictor="predictive-replication",
        rule=Replicate(next_batch=True, plan="enough", cap=4),
        routing="predicted",
        simulated_only=True,
        deviations=COMMON.replace("The true router decides what runs. ", "")
        + "On several GPUs, and all experts stay on them. Overloaded is over twice the mean load, and the cap of 4 is "
        "this project's.",
    ),
    "hedged": Recipe(
        summary="replicas that stay good when the forecast is off, by its own uncertainty, one layer ahead (ours)",
        placement=balanced_placement,
        predictor="ridge",
        rule=Replicate(next_batch=False, plan="hedged"),
        simulated_only=True,
    ),
    "weighed": Recipe(
        summary="the same forecast; a replica only where it saves more time than reading its weights costs (ours)",
        placement=balanced_placement,
        predictor="ridge",
        rule=Replicate(next_batch=False, plan="weighed", hide=True),
        split=timed_split,
        simulated_only=True,
    ),
    "oracle-weighed": Recipe(
        summary="weighed with a perfect forecast and copies that cost nothing: knows loads and bytes",
        placement=balanced_placement,
        predictor="oracle",
        rule=Replicate(next_batch=False, free=True, plan="weighed"),
        split=timed_split,
        simulated_only=True,
    ),
}
