"""One partition's expert weights, and the feed-forward of its tokens over them.

A partition reads the shared hidden states by index and writes its tokens' rows of the shared output, so dispatch and
combine are a gather and a scatter in the device's memory, inside the matrix products where the Triton kernels run.
Shape letters: T tokens of the step, M tokens of the partition, S slots of a layer, D = d_model, F = d_ff, P weights of
an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesim.backend import kernels
from moesim.backend.experts import ExpertShape, ExpertSlots
from moesim.backend.grouped import Activation, Groups, SlotWeights, choose, grouped_mlp
from moesim.sim.residency import Cluster
from moesim.traces import InputError

KERNELS = ("triton", "loop")


class PartitionSlots(ExpertSlots):
    """The slots of one partition, [L x S, P] in one piece; who may compute from which is the Residency's to say."""

    def __init__(
        self, cluster: Cluster, shape: ExpertShape, activation: Activation | str, device: torch.device
    ) -> None:
        super().__init__(cluster.gpu_slots, shape, activation, device)
        windows = [cluster.slots_of(layer) for layer in range(cluster.layers)]
        self._layers = [self.weights.window(window.start, window.stop) for window in windows]

    def layer(self, layer: int) -> SlotWeights:
        """The weights in the slots of one layer."""
        return self._layers[layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one partition computes of one layer."""

    x_TD: torch.Tensor
    """Hidden states of all tokens."""
    token_M: torch.Tensor
    """int64, the partition's tokens, slot by slot."""
    offsets_S1: torch.Tensor
    """int32 [S + 1] on the device: slot s computes tokens offsets[s] to offsets[s + 1]."""
    scale_T: torch.Tensor
    """Of every token, multiplied with its output in the dtype of x."""
    out_TD: torch.Tensor
    """Zeros; the partition writes its tokens' rows."""
    tile_rows: int
    """Mean tokens of a partition in the largest step: all partitions use the tile that suits it, so that their times
    differ by their work alone."""


def compute(work: Work, weights: SlotWeights, slot_S: torch.Tensor, kernel: str) -> None:
    """Write scale x expert(x) of the partition's tokens; kernels go to the current stream. `slot_S` int32: 0, 1, ..."""
    if not len(work.token_M):
        return
    if kernel == "triton":
        _triton(work, weights, slot_S)
        return
    x_MD, scale_M = (every_T.index_select(0, work.token_M) for every_T in (work.x_TD, work.scale_T))
    in_order_M = torch.arange(len(x_MD), device=x_MD.device)
    groups = Groups(order_M=in_order_M, offsets_X1=work.offsets_S1, slot_X=slot_S, every_slot=True)
    work.out_TD.index_copy_(0, work.token_M, grouped_mlp(x_MD, groups, weights, scale_M, kernel=kernel))


def kernel_of(asked: str, x_ND: torch.Tensor, weights: SlotWeights) -> str:
    """ "triton" or "loop"; "auto" takes the first where it can run. Raises InputError where the one asked for cannot.

    torch's own grouped product is no choice: it starts as many programs as the whole device has multiprocessors.
    """
    if asked == "auto":
        return "triton" if choose("auto", x_ND, weights) == "triton" else "loop"
    if asked not in KERNELS:
        raise InputError(f"unknown kernel {asked!r} for partitions; known: auto, {', '.join(KERNELS)}")
    return choose(asked, x_ND, weights)


def _triton(work: Work, weights: SlotWeights, slot_S: torch.Tensor) -> None:
    slots, bounds, itemsize = weights.slots, (work.offsets_S1, slot_S), work.x_TD.itemsize
    F, D = weights.up_SFD.shape[1:]
    h_MF = kernels.grouped_up(
        work.x_TD,
        work.token_M,
        *bounds,
        weights.up_SFD,
        activation=weights.activation,
        gated=weights.gated,
        tile=kernels.tile_of(work.tile_rows, slots, F, itemsize=itemsize),
    )
    tile = kernels.tile_of(work.tile_rows, slots, D, itemsize=itemsize)
    kernels.grouped_down(h_MF, work.token_M, work.scale_T, *bounds, weights.down_SDF, work.out_TD, tile=tile)
