"""The drafts of `gate-attention` for the steps of a run: what gate_attention_net.py trains, laid out to be quick.

On the CPU and in one thread, wherever it was trained. Nothing is padded, and of the experts' maps only those of the
chosen ones are used. Shape letters: T tokens of a step, B requests, L routed layers, E experts, K experts per token, D
router input, W inner width, I three times that, A heads, P distances, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moesim.predictors.base import Ids
from moesim.predictors.learned.gate_attention_kernels import attend, over_roots, read, start
from moesim.predictors.learned.gate_attention_net import SOFTNESS, AttentionNet, Block, Source, buckets

Floats = NDArray[np.float32]
LOG2_E = 1 / math.log(2)


@dataclass(slots=True, kw_only=True)
class Step:
    """What drafts read of a running step, layer by layer as it routes."""

    length_B: NDArray[np.int64]
    word_T: NDArray[np.int64]
    """Row of each token's vocabulary id."""
    bits_LTD: list[NDArray[np.uint16]] = field(default_factory=list)
    """Router inputs, the bits of float16."""
    ids_LTK: list[NDArray[np.int64]] = field(default_factory=list)
    weight_LTK: list[Floats] = field(default_factory=list)

    def add(self, ids_TK: Ids, weights_TK: NDArray[np.float16] | None, given_TD: torch.Tensor) -> None:
        """The next layer has routed."""
        self.bits_LTD.append(given_TD.half().contiguous().numpy().view(np.uint16))
        self.ids_LTK.append(ids_TK.astype(np.int64))
        ones_TK = np.ones(ids_TK.shape, np.float32)
        self.weight_LTK.append(ones_TK if weights_TK is None else weights_TK.astype(np.float32))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch does not divide its work: a product takes less time than a second thread to awake where others run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of(known_V: NDArray[np.int32], ids_T: NDArray[np.int32]) -> NDArray[np.int64]:
    """[T] the vocabulary row of each id, the last one where it is none of `known_V`; as Vocabulary.rows, on the CPU."""
    unknown = len(known_V)
    near_T = np.minimum(np.searchsorted(known_V, ids_T), max(unknown - 1, 0))
    return np.where(known_V[near_T] == ids_T, near_T, unknown) if unknown else np.zeros(len(ids_T), np.int64)


class ReadyBlock:
    """A `Block` and the frozen gate behind it."""

    def __init__(self, block: Block, gate_ED: torch.Tensor, bias_E: torch.Tensor) -> None:
        # Powers of 2 are quicker than those of e, and heads are filled up with zeros to a width that 8 divides.
        width = len(block.value_WD) // block.heads
        query_WD = block.query_WD * (LOG2_E / width**0.5)
        maps = [_filled(rows_WD, block.heads) for rows_WD in (query_WD, block.key_WD, block.value_WD)]
        self.map_ID = _plain(torch.cat(maps) * block.weight)
        self.out_WD = _plain(_filled(block.out_DW.T, block.heads))
        self.bucket_AX = _plain(block.bucket_AX * LOG2_E).numpy()
        self.bias_AP = np.empty((block.heads, 0), np.float32)
        self.gate_DE, self.bias_E = _plain(gate_ED.T), _plain(bias_E).numpy()

    def mixed(
        self, u_TD: torch.Tensor, scale_T: torch.Tensor, length_B: NDArray[np.int64], causal: bool
    ) -> torch.Tensor:
        """[T, W] the values that every token's queries ask for; `scale_T` is 1 over the root mean square of its row."""
        told_IT = self.map_ID @ u_TD.T
        mixed_WT = torch.empty((len(self.out_WD), len(u_TD)))
        if self.bias_AP.shape[1] < 2 * (longest := int(length_B.max())) - 1:
            self.bias_AP = self.bucket_AX.take(buckets(longest).numpy()[::-1], axis=1)
        attend(told_IT.numpy(), scale_T.numpy(), length_B, self.bias_AP, causal, mixed_WT.numpy())
        return mixed_WT.T


class ReadySource:
    """A `Source` and the frozen gates behind it."""

    def __init__(self, net: AttentionNet, source: Source) -> None:
        at, (_, E, D) = source.source, net.gate_LED.shape
        self.number, self.causal = at, net.causal
        # Router inputs are read as they are, so their scale goes into what they are multiplied by.
        own, words = net.input_scale_L[at], source.words
        earlier_D = torch.zeros(D) if source.before_1D is None else source.before_1D[0] / net.input_scale_L[at - 1]
        self.rows = tuple(
            _plain(rows).view(-1).numpy()
            for rows in (
                source.own_1D[0] / own,
                earlier_D,
                torch.zeros(D) if words is None else words.table.weight,
                source.routes_LDE.transpose(1, 2),
                _filled(source.down_XD / own, E),
                _filled(source.up_DX.T, E),
            )
        )
        self.start = start(D, len(self.rows[-1]) // (E * D))
        word_V = torch.zeros(1) if source.word_scale is None else source.word_scale.weight[:, 0]
        scales = (source.scale_1D[0] / own, source.expert_scale_1E[0], word_V)
        self.scales = tuple(_plain(scale).numpy() for scale in scales)
        self.weight_L11 = (1 / _plain(net.weight_scale_L[: at + 1])).numpy()[:, None, None]
        targets = range(at + 1, at + 1 + source.ahead)
        blocks = zip(targets, source.blocks, source.out_HD, source.bias_HE, strict=True)
        self.blocks = [
            ReadyBlock(block, net.gate_LED[target] * out_D, net.gate_bias_LE[target] + bias_E)
            for target, block, out_D, bias_E in blocks
            if isinstance(block, Block)
        ]
        self.soft_ED = [_plain(soft_DE.T) for soft_DE in source.soft_DE]
        self.softness = [SOFTNESS * float(net.logit_scale_L[target]) for target in targets]

    def drafts(self, step: Step) -> Iterator[torch.Tensor]:
        """[T, E] logits of the layers after the source, each made when it is asked."""
        u_TD, scale_T = self._started(step)
        logits_TE = torch.empty(0)
        for i, block in enumerate(self.blocks):
            if i:
                u_TD.addmm_((logits_TE / self.softness[i - 1]).softmax(dim=1), self.soft_ED[i - 1])
                over_roots(u_TD.numpy(), scale_T.numpy())
            u_TD.addmm_(block.mixed(u_TD, scale_T, step.length_B, self.causal), block.out_WD)
            logits_TE = u_TD @ block.gate_DE
            read(u_TD.numpy(), logits_TE.numpy(), block.bias_E)
            yield logits_TE

    def _started(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        at = self.number
        bits_TD, before_TD = step.bits_LTD[at], step.bits_LTD[max(at - 1, 0)]
        ids_LTK = np.stack(step.ids_LTK[: at + 1])
        weight_LTK = np.stack(step.weight_LTK[: at + 1]) * self.weight_L11
        order_T = np.argsort(ids_LTK[-1, :, 0].astype(np.uint16), kind="stable")  # of few bits it is quick
        given = bits_TD, before_TD, ids_LTK, weight_LTK, step.word_T
        u_TD, scale_T = torch.empty(bits_TD.shape), torch.empty(len(bits_TD))
        self.start(order_T, given, self.rows, self.scales, u_TD.numpy(), scale_T.numpy())
        return u_TD, scale_T


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in rows that follow each other."""
    return tensor.detach().float().cpu().contiguous()


def _filled(rows_WD: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of zeros behind those of each head, to a number that 8 divides."""
    rows_AWD = rows_WD.reshape(heads, -1, rows_WD.shape[1])
    return functional.pad(rows_AWD, (0, 0, 0, -rows_AWD.shape[1] % 8)).flatten(0, 1)
