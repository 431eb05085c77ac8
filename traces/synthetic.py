"""Made-up routing with given skew, drift, domains and structure; never to be taken for a recording.

Every layer l, domain d and window w has a popularity of experts, p ~ exp(sigma_l z), whose log is normal: skew is one
number a layer. A token's K experts are the winners of an exponential race, x_e / p_e smallest first with x_e ~ Exp(1),
which is sampling without replacement in proportion to p. What couples choices reuses the x, so that the popularity of
every layer stays what it was:

- layer to layer: with probability `coupling` a token carries its x into the next layer, relabelled by a fixed
  permutation: who won there is likely to win here (first-order affinity, as ExFlow and Lina exploit it);
- token to token: with probability `repeat` a token takes the choices of the one before it in its request;
- drift: from window to window z <- sqrt(1 - drift^2) z + drift eps, which keeps its spread;
- domains: z of domain d is sqrt(1 - shift^2) z + shift eps_d.

Shape letters: T tokens, L MoE layers, E experts, K experts per token, D domains, R requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.spec import ModelSpec, StackSpec
from moesim.traces.tokens import Phase, TokenTable, id_dtype

CHUNK = 1 << 13
"""Tokens that are drawn at once; bounds memory at CHUNK x E floats."""

NOT_MODELLED = (
    "which words the tokens are (no token ids)",
    "gate weights",
    "experts over capacity",
    "decode: every request is one prefill",
    "what a token's experts say of others than the next layer's",
    "memory of a request beyond the token before",
    "requests of different lengths",
)

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large the made-up recording is."""

    experts: int = 64
    layers: int = 12
    top_k: int = 2
    requests: int = 256
    request_tokens: int = 128
    domains: int = 1
    arrival: Literal["mixed", "blocks"] = "mixed"
    """Whether the domains' requests come in random order or one domain after the other."""
    window_tokens: int = 512
    """Tokens after which popularity drifts, and over which skew and drift are measured."""

    def __post_init__(self) -> None:
        for name in ("layers", "top_k", "requests", "request_tokens", "domains", "window_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.top_k < self.experts <= 65_535:
            raise InputError(f"experts must be more than top-k {self.top_k} and at most 65535, got {self.experts}")
        if self.domains > self.requests:
            raise InputError(f"{self.domains} domains need at least as many requests, got {self.requests}")

    @property
    def tokens(self) -> int:
        """T."""
        return self.requests * self.request_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What the generator turns; each is fitted to one statistic (synthetic_fit.py)."""

    sigma_L: tuple[float, ...]
    """[L] spread of the log popularity."""
    drift: float = 0.0
    """0 never changes, 1 is another popularity in every window."""
    coupling: float = 0.0
    """Probability that a token's race goes on in the next layer."""
    repeat: float = 0.0
    """Probability that a token takes the choices of the one before."""
    shift: float = 0.0
    """0: all domains alike, 1: domains have nothing in common."""


def generate(shape: Shape, knobs: Knobs, seed: int) -> Iterator[TokenTable]:
    """The recording in parts of at most CHUNK tokens, in order of arrival. Same seed, same tokens."""
    router = _Router(shape, knobs, seed)
    domain_R = domains_of_requests(shape, seed)
    last: NDArray[np.integer] | None = None
    for begin in range(0, shape.tokens, shape.window_tokens):
        if begin:
            router.drift()
        end = min(begin + shape.window_tokens, shape.tokens)
        for first in range(begin, end, CHUNK):
            at_T = np.arange(first, min(first + CHUNK, end))
            ids_TLK = router.choose(domain_R[at_T // shape.request_tokens])
            last = router.repeat(ids_TLK, at_T % shape.request_tokens == 0, last)
            yield _table(ids_TLK, at_T, shape)


def domains_of_requests(shape: Shape, seed: int) -> NDArray[np.int64]:
    """[R] the domain of every request: equal shares, shuffled or one after the other."""
    blocks = np.sort(np.arange(shape.requests) % shape.domains)
    return blocks if shape.arrival == "blocks" else np.random.default_rng([seed, 1]).permutation(blocks)


def synthetic_spec(shape: Shape, family: str = "synthetic") -> ModelSpec:
    """A decoder of MoE layers only, of no known widths."""
    stack = StackSpec(name="decoder", num_layers=shape.layers, moe_layers=tuple(range(shape.layers)))
    return ModelSpec.of_routing(family, shape.experts, shape.top_k, stack)


class _Router:
    def __init__(self, shape: Shape, knobs: Knobs, seed: int) -> None:
        self.shape, self.knobs = shape, knobs
        # A stream of its own for what must not change with the number of tokens: popularity and permutations.
        self._slow, self._fast = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])
        L, E = shape.layers, shape.experts
        self._z_LE = self._slow.standard_normal((L, E))
        self._own_DLE = self._slow.standard_normal((shape.domains, L, E))
        self._follower_LE = np.stack([self._slow.permutation(E) for _ in range(L)])
        self._set_popularity()

    def drift(self) -> None:
        """Go to the next window."""
        d = self.knobs.drift
        self._z_LE = np.sqrt(1 - d**2) * self._z_LE + d * self._slow.standard_normal(self._z_LE.shape)
        self._set_popularity()

    def choose(self, domain_T: NDArray[np.int64]) -> NDArray[np.uint8 | np.uint16]:
        """[T, L, K] experts of tokens of the given domains, the winner first."""
        s = self.shape
        T, rng = len(domain_T), self._fast
        ids_TLK = np.empty((T, s.layers, s.top_k), id_dtype(s.experts))
        race_TE: Floats = rng.standard_exponential((T, s.experts), np.float32)
        for layer in range(s.layers):
            if layer:
                race_TE = race_TE[:, self._follower_LE[layer]]
                fresh = np.flatnonzero(rng.random(T) >= self.knobs.coupling)
                race_TE[fresh] = rng.standard_exponential((len(fresh), s.experts), np.float32)
            finish_TE = race_TE * self._slowness_DLE[domain_T, layer]
            winners = np.argpartition(finish_TE, s.top_k - 1, axis=1)[:, : s.top_k]
            order = np.argsort(np.take_along_axis(finish_TE, winners, axis=1), axis=1, kind="stable")
            ids_TLK[:, layer] = np.take_along_axis(winners, order, axis=1)
        return ids_TLK

    def repeat(
        self, ids_TLK: NDArray[np.integer], begins_T: NDArray[np.bool_], last_LK: NDArray[np.integer] | None
    ) -> NDArray[np.integer]:
        """Let tokens take the choices of the one before, in place; returns those of the last token."""
        repeats_T = (self._fast.random(len(ids_TLK)) < self.knobs.repeat) & ~begins_T
        source_T = np.maximum.accumulate(np.where(repeats_T, -1, np.arange(len(ids_TLK))))
        ids_TLK[:] = np.where(
            (source_T >= 0)[:, None, None], ids_TLK[source_T], ids_TLK if last_LK is None else last_LK
        )
        return np.array(ids_TLK[-1])

    def _set_popularity(self) -> None:
        m = self.knobs.shift
        z_DLE = np.sqrt(1 - m**2) * self._z_LE + m * self._own_DLE
        self._slowness_DLE: Floats = np.exp(-np.array(self.knobs.sigma_L)[:, None] * z_DLE).astype(np.float32)


def _table(ids_TLK: NDArray[np.uint8 | np.uint16], at_T: NDArray[np.int64], shape: Shape) -> TokenTable:
    T = len(at_T)
    return TokenTable(
        topk_ids=ids_TLK,
        dropped=np.zeros((T, shape.layers), np.bool_),
        request=(at_T // shape.request_tokens).astype(np.int32),
        position=(at_T % shape.request_tokens).astype(np.int32),
        step=(at_T // shape.window_tokens).astype(np.int32),
        phase=np.full(T, Phase.PREFILL, np.uint8),
    )
