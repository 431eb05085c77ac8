"""What predictors share that read vocabulary ids only: embedding, neighbours, one head per layer.

They speak of all layers before the first one routes, and of a step that waits. How positions are mixed is up to the
family. Shape letters: T tokens of a step, N those and the tokens before them, B requests, S positions, L layers, E
experts, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moesim.predictors.base import Need, PastStep, RouterSpec, Seen, tokens_of
from moesim.predictors.learned.learned import Learned, kept, matrix_flops
from moesim.predictors.learned.parts import Heads, Vocabulary
from moesim.predictors.learned.requests import Batch, tensor_of
from moesim.traces import Phase, StepTokens, TokenTable, vocabulary_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSettings:
    """Widths, and recurrent layers on top of each other."""

    embedding: int = 64
    width: int = 128
    depth: int = 2


class Mixer(nn.Module, ABC):
    """Lets positions of a request know of each other."""

    @abstractmethod
    def mixed(self, x_BSW: torch.Tensor, real_BS: torch.Tensor) -> torch.Tensor:
        """[B, S, W]; what lies behind a request's end must not reach its tokens."""


class SequenceNet(nn.Module):
    """Embedding, compression, a mixer of positions, and a head for each MoE layer."""

    def __init__(self, mixer: Mixer, tokens: int, settings: SequenceSettings, layers: int, experts: int) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(tokens, settings.embedding)
        self.compress = nn.Linear(settings.embedding, settings.width)
        self.mixer = mixer
        self.heads = Heads(layers, experts, settings.width)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[N, L, E]."""
        x_NW = self.compress(self.vocabulary.vectors(batch.columns["token"], batch.noise)).relu()
        real_BS = batch.real_BS(x_NW.device)
        return self.heads.all_logits(self.mixer.mixed(batch.padded(x_NW), real_BS)[real_BS])


class SequencePredictor(Learned[SequenceNet, SequenceSettings]):
    """All layers from the tokens alone. In decode the tokens before a new one are those of the past steps that are
    still remembered, so the state begins where memory does."""

    needs: tuple[Need, ...] = ("tokens", "vocabulary")
    defaults = SequenceSettings()
    view_count = 1

    @abstractmethod
    def mixer(self) -> Mixer:
        """The part that families differ in."""

    def sizes_of(self, table: TokenTable, router: RouterSpec) -> dict[str, int]:
        """Different ids, and whether a token must not see those behind it (everywhere but in an encoder)."""
        causal = bool((table.phase != Phase.ENCODER).any())
        return {"vocabulary": len(np.unique(vocabulary_ids(table))), "causal": int(causal)}

    def built(self) -> SequenceNet:
        """A net around the family's mixer."""
        shape = self.shape
        return SequenceNet(self.mixer(), self.sizes["vocabulary"], self.settings, shape.layers, shape.experts)

    def begin(self, table: TokenTable, router: RouterSpec) -> None:
        """The vocabulary."""
        self.net.vocabulary.learn(vocabulary_ids(table))

    def columns(self, table: TokenTable) -> dict[str, torch.Tensor]:
        """Vocabulary ids."""
        return {"token": tensor_of(vocabulary_ids(table))}

    def views(self, batch: Batch) -> Iterator[torch.Tensor]:
        """The only one: all layers before any has routed."""
        yield self.net.logits(batch)

    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """One pass serves all layers of the step."""
        logits_TLE = kept(seen, (self.name, queued), lambda: self._pass(tokens_of(seen, queued), seen.past))
        return logits_TLE[:, layer], 0

    def flops(self) -> float:
        """Compression and mixer, shared by the layers, and a head; not the attention, which grows with the request."""
        shared = matrix_flops(self.net.compress, self.net.mixer) / self.shape.layers
        return shared + matrix_flops(self.net.heads.weight_LEW[0])

    def _pass(self, tokens: StepTokens, past: deque[PastStep]) -> torch.Tensor:
        ids_N, lengths, row_T = in_context(tokens, past)
        batch = Batch(columns={"token": torch.from_numpy(ids_N).to(self.device)}, lengths=lengths)
        return self.net.logits(batch)[torch.from_numpy(row_T).to(self.device)]


def in_context(tokens: StepTokens, past: deque[PastStep]) -> tuple[NDArray[np.int32], list[int], NDArray[np.intp]]:
    """Vocabulary ids of a step's requests and of what past steps hold of them, by request and position, [N]; the
    length of each request; and where in it the step's tokens are, [T]."""
    started = np.setdiff1d(tokens.request, tokens.request[tokens.position == 0])
    parts = [tokens]
    if len(started):
        parts += [s.tokens.take(np.flatnonzero(np.isin(s.tokens.request, started))) for s in past]
    request_M = np.concatenate([part.request for part in parts]).astype(np.int64)
    place_M = request_M << 32 | np.concatenate([part.position for part in parts])
    place_N, first_N, row_M = np.unique(place_M, return_index=True, return_inverse=True)
    lengths = np.unique(place_N >> 32, return_counts=True)[1]
    ids_M = np.concatenate([vocabulary_ids(part) for part in parts])
    return ids_M[first_N], lengths.tolist(), row_M[: len(tokens)]
