"""The drafts of `gate-attention` for the steps of a run: what gate_attention_net.py trains, laid out to be quick.

On the CPU, wherever it was trained, and where there are many tokens in two threads, each with whole requests. Nothing
is padded, and of the experts' maps only those of the chosen ones are used. Shape letters: T tokens of a step, B
requests, L routed layers, E experts, K experts per token, D router input, W inner width, I three times that, A heads, X
buckets, P distances or parts, V vocabulary rows.
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
from moesim.predictors.halves import halves_of_requests, together
from moesim.predictors.learned.gate_attention_kernels import SPARE, UNSEEN, first, later
from moesim.predictors.learned.gate_attention_net import SOFTNESS, AttentionNet, Block, Source, buckets

Floats = NDArray[np.float32]
Part = tuple[int, int, NDArray[np.int64], int]
"""Requests whose rows follow each other: its number, the first row, their lengths, and the longest one of the step."""
LOG2_E = 1 / math.log(2)


@dataclass(slots=True, kw_only=True)
class Step:
    """What drafts read of a running step, layer by layer as it routes."""

    parts: list[Part]
    word_T: NDArray[np.int64]
    """Row of each token's vocabulary id."""
    ids_LTK: NDArray[np.int64]
    """Of all layers, like the next ones; those that have routed are there."""
    weight_LTK: Floats
    bits_LTD: list[NDArray[np.uint16]] = field(default_factory=list)
    """Router inputs of these, the bits of float16."""

    @classmethod
    def of(cls, length_B: NDArray[np.int64], word_T: NDArray[np.int64], layers: int, top_k: int) -> Step:
        """Before any has routed."""
        longest, shape = int(length_B.max(initial=1)), (layers, len(word_T), top_k)
        parts = [(number, *part, longest) for number, part in enumerate(halves_of_requests(length_B))]
        ids_LTK, weight_LTK = np.empty(shape, np.int64), np.empty(shape, np.float32)
        return cls(parts=parts, word_T=word_T, ids_LTK=ids_LTK, weight_LTK=weight_LTK)

    def add(
        self, ids_TK: Ids, weights_TK: NDArray[np.float16] | None, usual: float, given_TD: NDArray[np.float16]
    ) -> None:
        """The next layer has routed; weights are taken over a `usual` one."""
        layer = len(self.bits_LTD)
        self.bits_LTD.append(np.ascontiguousarray(given_TD, np.float16).view(np.uint16))
        self.ids_LTK[layer] = ids_TK
        np.divide(1 if weights_TK is None else weights_TK, np.float32(usual), out=self.weight_LTK[layer])


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is said of one layer: logits, and what follows from them."""

    logits_TE: Floats
    p_TE: Floats
    likeliest_T1: NDArray[np.int64]
    load_PE: NDArray[np.float64]
    """Of the P parts."""


def rows_of(known_V: NDArray[np.int32], ids_T: NDArray[np.int32]) -> NDArray[np.int64]:
    """[T] the vocabulary row of each id, the last one where it is none of `known_V`; as Vocabulary.rows, on the CPU."""
    unknown = len(known_V)
    near_T = np.minimum(np.searchsorted(known_V, ids_T), max(unknown - 1, 0))
    return np.where(known_V[near_T] == ids_T, near_T, unknown) if unknown else np.zeros(len(ids_T), np.int64)


class ReadyBlock:
    """A `Block` and the frozen gate behind it, as the kernels take them."""

    def __init__(self, block: Block, gate_ED: torch.Tensor, bias_E: torch.Tensor, causal: bool) -> None:
        # Powers of 2 are quicker than those of e, and heads are filled up with zeros to a width that 8 divides.
        width = len(block.value_WD) // block.heads
        query_WD = block.query_WD * (LOG2_E / width**0.5)
        maps = [_filled(rows_WD, block.heads) for rows_WD in (query_WD, block.key_WD, block.value_WD)]
        map_DI = _plain((torch.cat(maps) * block.weight).T).numpy()
        out_WD = _plain(_filled(block.out_DW.T, block.heads)).numpy()
        self.sizes = len(out_WD), block.heads
        self.maps = map_DI, out_WD, _plain(gate_ED.T).numpy(), _plain(bias_E).numpy()
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
        T, E = len(step.word_T), len(self.scales[1])
        u_TD, at, before = np.empty((T, len(self.rows[0])), np.float32), self.number, np.empty((0, 0), np.float32)
        inputs = step.bits_LTD[at], step.bits_LTD[max(at - 1, 0)]
        given = *inputs, step.ids_LTK[: at + 1], step.weight_LTK[: at + 1], step.word_T
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
            before = made.logits_TE
            yield made


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in rows that follow each other."""
    return tensor.detach().float().cpu().contiguous()


def _filled(rows_WD: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of zeros behind those of each head, to a number that 8 divides."""
    rows_AWD = rows_WD.reshape(heads, -1, rows_WD.shape[1])
    return functional.pad(rows_AWD, (0, 0, 0, -rows_AWD.shape[1] % 8)).flatten(0, 1)
