"""The drafts of `gate-attention` for the steps of a run: what gate_attention_net.py trains, laid out to be quick.

On the CPU, wherever it was trained, and where there are many tokens in two threads, each with whole requests. Nothing
is padded, and of the experts' maps only those of the chosen ones are used. Shape letters: T tokens of a step, B
requests, L routed layers, E experts, K experts per token, D router input, W inner width, I twice that, A heads, X
what they read or buckets, P distances or parts, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moesim.predictors.base import Ids
from moesim.predictors.halves import FIRST, halves_of_requests, together
from moesim.predictors.learned.gate_attention_heads import SPARE, UNSEEN
from moesim.predictors.learned.gate_attention_kernels import first, later
from moesim.predictors.learned.gate_attention_net import SOFTNESS, AttentionNet, Block, Source, buckets

Floats = NDArray[np.float32]
Part = tuple[int, int, NDArray[np.int64], int]
"""Requests whose rows follow each other: its number, the first row, their lengths, and the longest one of the step."""
LOG2_E = 1 / math.log(2)


@dataclass(slots=True, kw_only=True)
class Step:
    """What drafts read of a running step, layer by layer as it routes."""

    length_B: NDArray[np.int64]
    parts: list[Part]
    """Of the next draft."""
    id_T: NDArray[np.int32]
    """Vocabulary ids, where they are read."""
    ids_LTK: NDArray[np.int64]
    """Of all layers, like the next ones; those that have routed are there."""
    weight_LTK: Floats
    bits_LTD: list[NDArray[np.uint16]] = field(default_factory=list)
    """Router inputs of these, the bits of float16."""
    begun: bool = False

    @classmethod
    def of(cls, length_B: NDArray[np.int64], id_T: NDArray[np.int32], layers: int, top_k: int) -> Step:
        """Before any has routed."""
        shape = (layers, len(id_T), top_k)
        ids_LTK, weight_LTK = np.empty(shape, np.int64), np.empty(shape, np.float32)
        return cls(length_B=length_B, parts=_parts(length_B, FIRST), id_T=id_T, ids_LTK=ids_LTK, weight_LTK=weight_LTK)

    def add(
        self, ids_TK: Ids, weights_TK: NDArray[np.float16] | None, usual: float, given_TD: NDArray[np.float16]
    ) -> None:
        """The next layer has routed; weights are taken over a `usual` one."""
        layer = len(self.bits_LTD)
        self.bits_LTD.append(np.ascontiguousarray(given_TD, np.float16).view(np.uint16))
        self.ids_LTK[layer] = ids_TK
        np.divide(1 if weights_TK is None else weights_TK, np.float32(usual), out=self.weight_LTK[layer])

    def drafted(self) -> None:
        """A draft is made: the second thread came late to the first one, and to the others less so."""
        if not self.begun:
            self.begun, self.parts = True, _parts(self.length_B, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is said of one layer: logits, and what follows from them."""

    logits_TE: Floats
    p_TE: Floats
    likeliest_T1: NDArray[np.int64]
    load_PE: NDArray[np.float64]
    """Of the P parts."""


class ReadyBlock:
    """A `Block` and the frozen gate behind it, as the kernels take them."""

    def __init__(self, block: Block, gate_ED: torch.Tensor, bias_E: torch.Tensor, causal: bool) -> None:
        # Powers of 2 are quicker than those of e; values of a head are filled up with zeros to a number that 8 divides,
        # queries and keys to one that 4 divides.
        width = len(block.query_YX) // block.heads
        value_WD, out_WD = (_filled(rows, block.heads) for rows in (block.value_WD * block.weight, block.out_DW.T))
        told = [_filled(rows, block.heads, 4) for rows in (block.query_YX * (LOG2_E / width**0.5), block.key_YX)]
        told_XI = torch.cat(told).T
        told_XI = _filled(told_XI, block.heads) if block.latent else told_XI * block.weight[:, None]
        self.sizes = len(out_WD), len(told[0]), block.heads
        self.maps = tuple(_plain(part).numpy() for part in (value_WD.T, told_XI, out_WD, gate_ED.T, bias_E))
        self.bucket_AX, self.causal = _plain(block.bucket_AX * LOG2_E).numpy(), causal
        self.bias_AP = np.empty((block.heads, 0), np.float32)

    def reaching(self, longest: int) -> tuple[Any, ...]:
        """For requests of at most so many tokens."""
        if self.bias_AP.shape[1] < SPARE + 2 * longest - 1:
            bias_AP = self.bucket_AX.take(buckets(longest).numpy()[::-1], axis=1)
            bias_AP[:, : longest - 1 if self.causal else 0] = UNSEEN
            self.bias_AP = np.pad(bias_AP, ((0, 0), (SPARE, 0)))
        return *self.maps, self.bias_AP, self.causal


class ReadySource:
    """A `Source` and the frozen gates behind it; their logits are softened by `sharpness_H`."""

    def __init__(self, net: AttentionNet, source: Source, sharpness_H: Iterable[np.float64]) -> None:
        at, (_, E, D) = source.source, net.gate_LED.shape
        self.number = at
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
        self.known_V = np.zeros(0, np.int32) if words is None else words.known_V.cpu().int().numpy()
        word_V = torch.zeros(1) if source.word_scale is None else source.word_scale.weight[:, 0]
        scales = (source.scale_1D[0] / own, source.expert_scale_1E[0], word_V)
        self.scales = tuple(_plain(scale).numpy() for scale in scales)
        targets = range(at + 1, at + 1 + source.ahead)
        blocks = zip(targets, source.blocks, source.out_HD, source.bias_HE, strict=True)
        self.blocks = [
            ReadyBlock(block, net.gate_LED[target] * out_D, net.gate_bias_LE[target] + bias_E, net.causal)
            for target, block, out_D, bias_E in blocks
            if isinstance(block, Block)
        ]
        scale_L = net.logit_scale_L.tolist()
        self.soft = [
            (np.float32(1 / (SOFTNESS * scale_L[target])), _plain(soft_DE.T).numpy())
            for target, soft_DE in zip(targets, source.soft_DE, strict=False)
        ]
        self.sharpness = [np.float32(sharpness) for sharpness in sharpness_H]
        sizes = [block.sizes for block in self.blocks]
        self.make = [first(D, E, len(self.rows[-1]) // (E * D), *sizes[0]), *(later(D, E, *one) for one in sizes[1:])]

    def drafts(self, step: Step) -> Iterator[Draft]:
        """Of the layers after the source, each made when it is asked."""
        T, E = len(step.id_T), len(self.scales[1])
        u_TD, at, before = np.empty((T, len(self.rows[0])), np.float32), self.number, np.empty((0, 0), np.float32)
        inputs = step.bits_LTD[at], step.bits_LTD[max(at - 1, 0)]
        given = *inputs, step.ids_LTK[: at + 1], step.weight_LTK[: at + 1], step.id_T, self.known_V
        for number, (make, block, sharpness) in enumerate(zip(self.make, self.blocks, self.sharpness, strict=True)):
            made = Draft(
                logits_TE=np.empty((T, E), np.float32),
                p_TE=np.empty((T, E), np.float32),
                likeliest_T1=np.empty((T, 1), np.int64),
                load_PE=np.empty((len(step.parts), E)),
            )
            said = sharpness, made.logits_TE, made.p_TE, made.likeliest_T1, made.load_PE
            read: Any = (*self.soft[number - 1], before) if number else (given, self.rows, self.scales)
            ready = block.reaching(step.parts[0][-1])
            together(partial(make, *read, ready, u_TD, said), step.parts)
            step.drafted()
            before = made.logits_TE
            yield made


def _parts(length_B: NDArray[np.int64], share: float) -> list[Part]:
    """Of all requests, the first with this share of the tokens."""
    longest = int(length_B.max(initial=1))
    return [(number, *part, longest) for number, part in enumerate(halves_of_requests(length_B, share))]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in rows that follow each other."""
    return tensor.detach().float().cpu().contiguous()


def _filled(rows_WD: torch.Tensor, heads: int, by: int = 8) -> torch.Tensor:
    """Rows of zeros behind those of each head, to a number that `by` divides."""
    rows_AWD = rows_WD.reshape(heads, -1, rows_WD.shape[1])
    return functional.pad(rows_AWD, (0, 0, 0, -rows_AWD.shape[1] % by)).flatten(0, 1)
