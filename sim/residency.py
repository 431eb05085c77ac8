"""Which (layer, expert) is in which slot of which GPU, or on its way there.

Shared by the simulated and the real executor, so it imports neither simpy nor torch and knows nothing about time: an
executor says when a transfer has arrived. Shape letters: L layers, E experts, G GPUs, S slots of one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.sim.rates import Rates
from moesim.traces.errors import InputError, PolicyError

EMPTY = -1
HOST = -1
"""As the source of a transfer: the host's memory, which has every expert."""
PRECISIONS = ("full", "int8", "int4", "int2")
"""What a copy can be in, highest first: the model's own dtype, or fewer bits (execution.py says how many bytes). Where
arrays hold precisions they hold places in this list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The shape that a policy plans for."""

    layers: int
    experts: int
    gpus: int
    extra_slots: int = 1
    """Slots for replicas, per GPU and layer, beside those that hold every expert once."""
    top_k: int = 1
    resident: int | None = None
    """Slots per GPU and layer where not all experts fit and the host's memory backs them; None: all are resident."""
    double_buffered: bool = False
    """True: replicas of all layers share two buffers of `extra_slots` slots a GPU, in turn, instead of having their own
    in every layer (PROBE, arXiv 2602.00509)."""
    pooled: bool = False
    """True: where the host backs the slots, a slot may hold any layer's expert; the budget is the same."""
    node_size: int | None = None
    """GPUs 0..n-1 are the first node, and so on; None: all are in one."""
    groups: int = 1
    """Groups of neighbouring experts that the router limits itself to (DeepSeek); 1: none."""
    rates: Rates | None = None
    """How fast the executor is, where it says so; what weighs copies by time weighs them by tokens otherwise."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.layers < 1 or self.experts < 1:
            raise InputError("a cluster needs at least one GPU, one layer and one expert")
        if self.gpus > self.experts:
            raise InputError(f"{self.gpus} GPUs for {self.experts} experts: use at most one GPU per expert")
        if self.extra_slots < 0:
            raise InputError(f"extra slots must not be negative, got {self.extra_slots}")
        most = -(-self.experts // self.gpus)
        if self.resident is not None and not 1 <= self.resident <= most:
            raise InputError(
                f"{self.resident} resident slots a GPU and layer: {self.experts} experts on {self.gpus} GPUs take 1 "
                f"to {most}"
            )

    @property
    def node_G(self) -> NDArray[np.int64]:
        """[G] the node of each GPU."""
        return np.arange(self.gpus) // (self.node_size or self.gpus)

    @property
    def nodes(self) -> int:
        """Nodes that the GPUs fill evenly; 1 where they do not, or where all are in one."""
        size = self.node_size or self.gpus
        return self.gpus // size if self.gpus % size == 0 else 1

    @property
    def home_slots(self) -> int:
        """Slots per GPU and layer that hold each expert once, or as many as are resident."""
        return -(-self.experts // self.gpus) if self.resident is None else self.resident

    @property
    def layer_slots(self) -> int:
        """Slots per GPU that belong to one layer; slot numbers of layer l are l * layer_slots onwards."""
        own = self.resident is None and not self.double_buffered
        return self.home_slots + (self.extra_slots if own else 0)

    @property
    def gpu_slots(self) -> int:
        """All slots of a GPU; those of the two buffers come last."""
        return self.layers * self.layer_slots + (2 * self.extra_slots if self.double_buffered else 0)

    def slots_of(self, layer: int) -> range:
        """The slots that `layer` may use on every GPU."""
        if self.pooled:
            return range(self.gpu_slots)
        return range(layer * self.layer_slots, (layer + 1) * self.layer_slots)

    def replica_slots(self, layer: int) -> range:
        """The slots for replicas of `layer`: its own, or the buffer whose turn it is."""
        if self.double_buffered:
            first = self.layers * self.layer_slots + layer % 2 * self.extra_slots
            return range(first, first + self.extra_slots)
        window = self.slots_of(layer)
        return range(min(window.start + self.home_slots, window.stop), window.stop)

    def home_gpu(self, expert: int) -> int:
        """The GPU that computes an expert whose copies lie in the host's memory."""
        return expert * self.gpus // self.experts

    @property
    def home_E(self) -> NDArray[np.int64]:
        """[E] `home_gpu` of every expert."""
        return np.array([self.home_gpu(expert) for expert in range(self.experts)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Copy one expert into a slot. What the slot held is gone when the transfer begins."""

    layer: int
    expert: int
    source: int
    """GPU that is read (it must hold the expert, and its copy is taken as it was when the transfer was issued), or
    HOST."""
    target: int
    slot: int
    blocking: bool = False
    """True: the executor goes on only when it has arrived (demand). False: computation overlaps it (prefetch)."""
    serial: int = 0
    """Which of several equal transfers this is; the driver numbers them, so that a late copy is not taken for a new."""
    free: bool = False
    """True: arrives at once and costs nothing. Only bounds use it, only the simulator accepts it."""
    precision: str = "full"
    """What arrives, one of PRECISIONS."""
    due: int = 0
    """Of prefetches that wait for a link the smallest goes first, then the first issued."""
    displaces: int = EMPTY
    """Layer whose expert the slot held until now, written by the driver; the copy waits while that layer computes."""


class Residency:
    """Contents of all slots. Every change keeps: one expert per slot, no expert twice on a GPU, no expert lost."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        slots = cluster.gpu_slots
        shape = (cluster.layers, cluster.experts, cluster.gpus)
        self.layer_GS: NDArray[np.int32] = np.full((cluster.gpus, slots), EMPTY, np.int32)
        self.expert_GS: NDArray[np.int32] = np.full((cluster.gpus, slots), EMPTY, np.int32)
        self.serial_GS: NDArray[np.int64] = np.full((cluster.gpus, slots), EMPTY, np.int64)
        self.usable_LEG: NDArray[np.bool_] = np.zeros(shape, np.bool_)
        self.coming_LEG: NDArray[np.bool_] = np.zeros(shape, np.bool_)
        self.precision_LEG: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        """Of each copy, there or coming: its place in PRECISIONS."""
        self.alive_G: NDArray[np.bool_] = np.ones(cluster.gpus, np.bool_)
        self.slowdown_G: NDArray[np.float64] = np.ones(cluster.gpus)
        """How many times longer each GPU computes than it should; policies see it."""
        self._lossy = cluster.resident is not None

    def place(self, experts_LGS: NDArray[np.integer]) -> None:
        """Fill the slots of every layer, [L, G, layer_slots], EMPTY where a slot stays free. Nothing is copied: this is
        how the model was loaded. Of slots that all layers share, a layer may take any number: [L, G, any], one layer
        after the other. Raises PolicyError where an expert is missing or twice on one GPU, or a GPU has too few slots.
        """
        c = self.cluster
        if experts_LGS.shape[:2] != (c.layers, c.gpus) or not (c.pooled or experts_LGS.shape[2] == c.layer_slots):
            raise PolicyError(
                f"placement has shape {experts_LGS.shape}, the cluster needs {(c.layers, c.gpus, c.layer_slots)}"
            )
        layer_X, gpu_X, slot_X = np.nonzero(experts_LGS != EMPTY)
        expert_X = experts_LGS[layer_X, gpu_X, slot_X]
        if len(wrong := np.flatnonzero((expert_X < 0) | (expert_X >= c.experts))):
            at = wrong[0]
            raise PolicyError(f"placement of layer {layer_X[at]}: expert {expert_X[at]} does not exist")
        place_X = np.ravel_multi_index((layer_X, expert_X, gpu_X), self.usable_LEG.shape)
        found, copies = np.unique(place_X, return_counts=True)
        if len(found) < len(place_X):
            layer, expert, gpu = np.unravel_index(found[copies > 1][0], self.usable_LEG.shape)
            raise PolicyError(f"placement of layer {layer}: expert {expert} is twice on GPU {gpu}")
        number_X = layer_X * c.layer_slots + slot_X
        if c.pooled:
            number_X = _running_number(gpu_X)
            if len(number_X) and number_X.max() >= c.gpu_slots:
                raise PolicyError(f"placement wants {number_X.max() + 1} slots of a GPU, it has {c.gpu_slots}")
        self.layer_GS[gpu_X, number_X] = layer_X
        self.expert_GS[gpu_X, number_X] = expert_X
        self.usable_LEG[layer_X, expert_X, gpu_X] = True
        self._check_nothing_lost(range(c.layers))

    def begin(self, transfers: list[Transfer]) -> None:
        """Start `transfers` together: all sources are checked, then all target slots change hands, then it is checked
        that no expert was lost. Raises PolicyError (and changes nothing) where one of them is impossible."""
        for t in transfers:
            self._check(t)
        touched = {t.layer for t in transfers} | {int(self.layer_GS[t.target, t.slot]) for t in transfers}
        state = ("layer_GS", "expert_GS", "serial_GS", "usable_LEG", "coming_LEG", "precision_LEG")
        before = {name: getattr(self, name).copy() for name in state}
        code_X = [self._code(t) for t in transfers]  # of a source that may be overwritten now
        try:
            for t in transfers:
                self._evict(t.target, t.slot)
            for t, code in zip(transfers, code_X, strict=True):
                if self.usable_LEG[t.layer, t.expert, t.target] or self.coming_LEG[t.layer, t.expert, t.target]:
                    raise PolicyError(f"layer {t.layer}, expert {t.expert} would be twice on GPU {t.target}")
                if self.layer_GS[t.target, t.slot] != EMPTY:
                    raise PolicyError(f"two transfers want slot {t.slot} of GPU {t.target}")
                self._fill(t.target, t.slot, t.layer, t.expert)
                self.serial_GS[t.target, t.slot] = t.serial
                self.coming_LEG[t.layer, t.expert, t.target] = True
                self.precision_LEG[t.layer, t.expert, t.target] = code
            self._check_nothing_lost(touched - {EMPTY})
        except PolicyError:
            for name, array in before.items():
                setattr(self, name, array)
            raise

    def arrived(self, t: Transfer, precision: str | None = None) -> bool:
        """Make the copy usable; False where the slot was given away while the copy was under way. `precision`: what it
        came in, where that is less than the transfer says."""
        if not self.holds(t) or not self.coming_LEG[t.layer, t.expert, t.target]:
            return False
        self.coming_LEG[t.layer, t.expert, t.target] = False
        self.usable_LEG[t.layer, t.expert, t.target] = True
        if precision is not None:
            code = max(int(self.precision_LEG[t.layer, t.expert, t.target]), PRECISIONS.index(precision))
            self.precision_LEG[t.layer, t.expert, t.target] = code
        return True

    def fail(self, gpu: int) -> None:
        """`gpu` is gone with all that it held; from now on experts may be without a copy."""
        self.alive_G[gpu] = False
        self.usable_LEG[:, :, gpu] = self.coming_LEG[:, :, gpu] = False
        self.layer_GS[gpu] = self.expert_GS[gpu] = EMPTY
        self._lossy = True

    def cancel(self, t: Transfer) -> None:
        """The copy will never arrive: its slot is free again, unless it has been given away."""
        if self.holds(t):
            self._evict(t.target, t.slot)

    def holds(self, t: Transfer) -> bool:
        """True while the transfer's slot is still its own."""
        there = (self.layer_GS[t.target, t.slot], self.expert_GS[t.target, t.slot], self.serial_GS[t.target, t.slot])
        return there == (t.layer, t.expert, t.serial)

    def slot(self, layer: int, expert: int, gpu: int) -> int:
        """The slot of `gpu` that holds the expert. Raises KeyError where none does."""
        found = np.flatnonzero((self.layer_GS[gpu] == layer) & (self.expert_GS[gpu] == expert))
        if not len(found):
            raise KeyError((layer, expert, gpu))
        return int(found[0])

    def experts_GS(self, layer: int) -> NDArray[np.int32]:
        """[G, slots of the layer] expert in each slot of `layer` (on its way included), EMPTY where free or another
        layer's."""
        if self.cluster.pooled:
            return np.where(self.layer_GS == layer, self.expert_GS, np.int32(EMPTY))
        window = self.cluster.slots_of(layer)
        return self.expert_GS[:, window.start : window.stop]

    def replicas_GS(self, layer: int) -> NDArray[np.int32]:
        """[G, extra slots] expert of `layer` in each of its replica slots, EMPTY where free or another layer's."""
        window = self.cluster.replica_slots(layer)
        slots = slice(window.start, window.stop)
        return np.where(self.layer_GS[:, slots] == layer, self.expert_GS[:, slots], np.int32(EMPTY))

    def _check(self, t: Transfer) -> None:
        c = self.cluster
        what = f"transfer of layer {t.layer}, expert {t.expert} from GPU {t.source} to GPU {t.target}, slot {t.slot}"
        if not (0 <= t.layer < c.layers and 0 <= t.expert < c.experts):
            raise PolicyError(f"{what}: no such expert")
        if not ((0 <= t.source < c.gpus or t.source == HOST) and 0 <= t.target < c.gpus):
            raise PolicyError(f"{what}: no such GPU, the cluster has {c.gpus}")
        if not self.alive_G[t.target]:
            raise PolicyError(f"{what}: the target has failed")
        if not 0 <= t.slot < self.layer_GS.shape[1]:
            raise PolicyError(f"{what}: no such slot, a GPU has {self.layer_GS.shape[1]}")
        if t.source != HOST and not self.usable_LEG[t.layer, t.expert, t.source]:
            raise PolicyError(f"{what}: the source does not hold it")
        if t.precision not in PRECISIONS:
            raise PolicyError(f"{what}: unknown precision {t.precision!r}; known: {', '.join(PRECISIONS)}")

    def _code(self, t: Transfer) -> int:
        """A copy is no better than what it is copied from."""
        code = PRECISIONS.index(t.precision)
        return code if t.source == HOST else max(code, int(self.precision_LEG[t.layer, t.expert, t.source]))

    def _evict(self, gpu: int, slot: int) -> None:
        layer, expert = self.layer_GS[gpu, slot], self.expert_GS[gpu, slot]
        if layer != EMPTY:
            self.usable_LEG[layer, expert, gpu] = self.coming_LEG[layer, expert, gpu] = False
            self.precision_LEG[layer, expert, gpu] = 0
            self.layer_GS[gpu, slot] = self.expert_GS[gpu, slot] = EMPTY

    def _fill(self, gpu: int, slot: int, layer: int, expert: int) -> None:
        self.layer_GS[gpu, slot], self.expert_GS[gpu, slot] = layer, expert

    def _check_nothing_lost(self, layers: range | set[int]) -> None:
        for layer in () if self._lossy else layers:
            held_E = self.usable_LEG[layer].any(axis=1) | self.coming_LEG[layer].any(axis=1)
            if not held_E.all():
                raise PolicyError(f"layer {layer}: no GPU would hold expert {int(np.argmin(held_E))}")


def _running_number(group_X: NDArray[np.integer]) -> NDArray[np.intp]:
    """[X] how many of the same group come before."""
    order = np.argsort(group_X, kind="stable")
    counts = np.bincount(group_X)
    number_X = np.empty(len(group_X), np.intp)
    number_X[order] = np.arange(len(group_X)) - np.repeat(np.cumsum(counts) - counts, counts)
    return number_X
