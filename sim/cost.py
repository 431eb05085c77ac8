"""The cost model: seconds of each phase from token counts, a model spec and a hardware profile. Pure functions.

Every term is a launch overhead plus a roofline, max(FLOPs / rate, bytes / HBM), or a measured curve where the profile
has one that fits (curves.py says how it is read between and beyond its points); a GPU without tokens costs nothing. Not
in the model: embedding and output head, activations' HBM traffic.
Shape letters: E experts, G GPUs, L MoE layers. Knows nothing about time or policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.sim.curves import Bools, ExpertCurve
from moesim.sim.dispatch import Ints
from moesim.sim.profile import Gpu, HardwareProfile
from moesim.traces import ModelSpec, StackSpec, StepTokens, request_lengths
from moesim.traces.spec import DTYPE_BYTES

Seconds = NDArray[np.float64]


def expert_seconds(tokens_EG: Ints, gpu: Gpu, spec: ModelSpec, dtype: str, taken_G: float | Seconds = 0.0) -> Seconds:
    """[G] one layer's experts: launch + expert_s x distinct + max(their weights / HBM, tiled FLOPs / rate).

    Every expert's tokens are rounded up to whole tiles. At few tokens the weights dominate and a replica costs another
    read of them; at many the FLOPs do and a replica pays. With a measured curve: see `expert_seconds_of`. `taken_G`:
    bytes/s of HBM that copies use meanwhile; they leave the experts half of it at least. Where the profile's GPUs are
    partitions of one device, which slow each other down: `together_seconds`.
    """
    distinct_G = (tokens_EG > 0).sum(axis=0)
    rows_G = (-(-tokens_EG // gpu.tile_rows)).sum(axis=0) * gpu.tile_rows
    alone_G = expert_seconds_of(distinct_G, rows_G, gpu, spec, dtype, tokens=tokens_EG.sum(axis=0), taken=taken_G)
    return together_seconds(alone_G, gpu.shared_slowdown) if gpu.shared_slowdown else alone_G


def together_seconds(alone_G: Seconds, slowdown: float) -> Seconds:
    """[..., G] when each GPU ends that would take `alone_G` by itself, if all begin at once and share a memory.

    While n of G compute, each takes 1 + slowdown (n - 1) / (G - 1) times as long; those that end early leave the others
    faster.
    """
    G = alone_G.shape[-1]
    if G == 1:
        return alone_G
    order = np.argsort(alone_G, axis=-1, kind="stable")
    sorted_G = np.take_along_axis(alone_G, order, axis=-1)
    longer_G = 1 + slowdown * np.arange(G - 1, -1, -1) / (G - 1)
    ends_G = np.cumsum(np.diff(sorted_G, axis=-1, prepend=0.0) * longer_G, axis=-1)
    found = np.empty_like(ends_G)
    np.put_along_axis(found, order, ends_G, axis=-1)
    return found


def expert_seconds_of(
    distinct: Ints,
    rows: Ints,
    gpu: Gpu,
    spec: ModelSpec,
    dtype: str,
    *,
    tokens: Ints | None = None,
    taken: float | Seconds = 0.0,
) -> Seconds:
    """`expert_seconds` from the number of distinct experts and of rows in whole tiles, arrays of any one shape.

    A curve of the profile for this shape and dtype goes before the formula. It was measured with equally many tokens
    for each expert; unequal loads are looked up at their mean, tokens / distinct. Tiles are in what was measured, so
    tile_rows is not used: a curve takes `tokens`, not rounded (left out: `rows`, which is the same at tile_rows 1).
    `taken`: bytes/s of HBM that copies use; it lengthens what was measured as it lengthens the formula's.
    """
    curve = expert_curve(gpu, spec, dtype)
    if curve is None:
        return _expert_roofline(distinct, rows, gpu, spec, dtype, taken)
    mean = _mean_tokens(distinct, rows if tokens is None else tokens)
    alone = curve.seconds_at(distinct, mean, lambda d, r: _expert_roofline(d, d * r, gpu, spec, dtype))
    if not np.any(taken):
        return alone
    formula = _expert_roofline(distinct, rows, gpu, spec, dtype)
    longer = _expert_roofline(distinct, rows, gpu, spec, dtype, taken)
    return alone * np.divide(longer, formula, out=np.ones_like(formula), where=formula > 0)


def expert_curve(gpu: Gpu, spec: ModelSpec, dtype: str) -> ExpertCurve | None:
    """The measured curve for experts of this shape and dtype, if the profile has one."""
    if not gpu.expert_curves:
        return None
    widths = spec.sized()
    wanted = (widths.d_model, widths.d_ff, widths.gated, dtype)
    return next((curve for curve in gpu.expert_curves if curve.shape == wanted), None)


def experts_outside(distinct: Ints, tokens: Ints, gpu: Gpu, spec: ModelSpec, dtype: str) -> Bools:
    """Which expert phases `expert_seconds_of` extrapolates, arrays of any one shape; none where no curve is used."""
    curve = expert_curve(gpu, spec, dtype)
    if curve is None:
        return np.zeros(np.shape(distinct), np.bool_)
    return curve.outside(distinct, _mean_tokens(distinct, tokens))


def _mean_tokens(distinct: Ints, tokens: Ints) -> Seconds:
    """Tokens of each expert that has any, on average."""
    return tokens / np.maximum(distinct, 1)


def _expert_roofline(
    distinct: Any, rows: Any, gpu: Gpu, spec: ModelSpec, dtype: str, taken: float | Seconds = 0.0
) -> Seconds:
    """The formula of `expert_seconds` for arrays of any one shape."""
    read = distinct * spec.expert_bytes(dtype) / (gpu.hbm_rate - np.minimum(taken, gpu.hbm_rate / 2))
    compute = rows * (2 * spec.expert_params()) / gpu.matmul_rate(dtype)
    total = gpu.launch_s + gpu.expert_s * distinct + np.maximum(read, compute)
    return np.where(distinct > 0, total, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTokens:
    """What data-parallel attention computes on each rank in a step."""

    tokens_G: Ints
    """[G] tokens, queries of the self attention."""
    pairs_G: Ints
    """[G] query-key pairs: sum over requests of length squared; in decode the sum of the context lengths."""
    cached_G: Ints
    """[G] positions whose keys and values are read from the KV cache, 0 outside decode."""


def rank_tokens(tokens: StepTokens, rank_T: Ints, gpus: int, decode: bool | NDArray[np.bool_]) -> RankTokens:
    """Count what each rank attends over; the tokens of a request stand together.

    c tokens of a request from position s on compute all c (s + c) pairs with what is before them (a causal kernel that
    skips some is not assumed) and read the keys and values of s + c positions where s of them are cached. A whole
    request has s = 0; in decode c = 1. `decode` (of all or of each token [T]): even the first token reads its cache.
    """
    tokens_G = np.bincount(rank_T, minlength=gpus)
    length = request_lengths(tokens.request)
    first = np.cumsum(length) - length
    start = tokens.position[first].astype(np.int64)
    seen = start + length
    pairs_G, cached_G = np.zeros((2, gpus), np.int64)
    np.add.at(pairs_G, rank_T[first], length * seen)
    cached = (start > 0) | np.broadcast_to(decode, rank_T.shape)[first]
    np.add.at(cached_G, rank_T[first], np.where(cached, seen, 0))
    return RankTokens(tokens_G=tokens_G, pairs_G=pairs_G, cached_G=cached_G)


def shared_by(ranks: RankTokens, size: int) -> RankTokens:
    """What groups of `size` GPUs share that hold the same requests: all count what their first one was given."""
    leader = np.arange(len(ranks.tokens_G)) // size * size
    counts = (ranks.tokens_G, ranks.pairs_G, ranks.cached_G)
    tokens_G, pairs_G, cached_G = (count_G[leader] for count_G in counts)
    return RankTokens(tokens_G=tokens_G, pairs_G=pairs_G, cached_G=cached_G)


def layer_seconds(
    ranks: RankTokens, gpu: Gpu, spec: ModelSpec, dtype: str, *, moe: bool, cross: bool, shared: int = 1
) -> Seconds:
    """[G] attention and dense parts of one layer: attention.launch + max(FLOPs / rate, (weights + KV cache) / HBM).

    `moe`: a layer with experts has its router and shared experts here; a dense layer has its own FFN.
    `cross`: the decoder of an encoder-decoder attends to the encoder as well. How long the encoder's input was is not
    in the trace; it is taken to be as long as what self attention sees. In decode its keys and values are cached.
    `shared`: GPUs that split heads, dense weights and KV cache evenly (tensor parallelism); each runs the router.
    """
    w, size = spec.sized(), DTYPE_BYTES[dtype]
    inner = w.num_heads * w.d_kv
    outer, keys = w.d_model * inner, w.d_model * w.kv_width  # one of Q and O; K and V together
    router = w.d_model * spec.num_experts if moe else 0
    dense = (2 * outer + keys + w.ffn_params(w.shared_d_ff if moe else w.dense_d_ff)) / shared + router
    T, pairs, cached = ranks.tokens_G, ranks.pairs_G / shared, ranks.cached_G / shared
    flops_G = 2 * T * dense + 4 * pairs * inner
    read_G = dense * size + cached * w.kv_width * size
    if cross:
        # Q and O of the decoder's tokens; K and V of the encoder's, once, in prefill.
        of_encoder = np.where(cached > 0, 0, T)
        flops_G = flops_G + 2 * (2 * T * outer + of_encoder * keys) / shared + 4 * pairs * inner
        read_G = read_G + (2 * outer + keys) / shared * size + cached * w.kv_width * size
    total_G = gpu.attention.launch_s + np.maximum(flops_G / gpu.attention_rate(dtype), read_G / gpu.hbm_rate)
    return np.where(T > 0, total_G, 0.0)


def dense_layers_before(stack: StackSpec) -> tuple[int, ...]:
    """[L] dense layers whose time counts to each MoE layer: those just before it, and for the last those after it."""
    ends = [*stack.moe_layers]
    starts = [-1, *ends[:-1]]
    between = [end - start - 1 for start, end in zip(starts, ends, strict=True)]
    between[-1] += stack.num_layers - 1 - ends[-1]
    return tuple(between)


def attention_seconds(
    ranks: RankTokens, stack: StackSpec, gpu: Gpu, spec: ModelSpec, dtype: str, shared: int = 1
) -> Seconds:
    """[L, G] what runs between the experts of one MoE layer and the router of the next, see `dense_layers_before`."""
    moe_G, dense_G = layers_seconds(ranks, stack, gpu, spec, dtype, shared)
    return moe_G + np.array(dense_layers_before(stack))[:, None] * dense_G


def layers_seconds(
    ranks: RankTokens, stack: StackSpec, gpu: Gpu, spec: ModelSpec, dtype: str, shared: int = 1
) -> tuple[Seconds, Seconds]:
    """`layer_seconds` of an MoE layer and of a dense one of `stack`, in the shape of the counts."""
    cross = stack.name == "decoder" and len(spec.stacks) == 2
    moe = layer_seconds(ranks, gpu, spec, dtype, moe=True, cross=cross, shared=shared)
    return moe, layer_seconds(ranks, gpu, spec, dtype, moe=False, cross=cross, shared=shared)


def all_reduce_seconds(tokens: int, gpus: int, profile: HardwareProfile, spec: ModelSpec, dtype: str) -> float:
    """One all-reduce of `tokens` hidden vectors over `gpus` GPUs of a node: latency + 2 (n - 1) / n of their bytes over
    the bandwidth of collectives (a ring, or NVLink's own reduction at that rate); nothing on one GPU."""
    if gpus == 1:
        return 0.0
    nbytes = tokens * spec.sized().d_model * DTYPE_BYTES[dtype]
    return float(profile.links.all_to_all.seconds(2 * (gpus - 1) / gpus * nbytes))


def host_seconds(tokens_E: Ints, profile: HardwareProfile, spec: ModelSpec, dtype: str) -> float:
    """Experts on the host's CPU, one after the other: max(weights / memory bandwidth, FLOPs / rate) each, and their
    hidden vectors over the host link and back. Source: Fiddler (arXiv 2402.07033). Raises InputError where the profile
    does not describe the CPU."""
    cpu, used = profile.known_cpu(), tokens_E[tokens_E > 0]
    if not len(used):
        return 0.0
    read_s = spec.expert_bytes(dtype) / cpu.bytes_per_s
    compute = np.maximum(read_s, used * (2 * spec.expert_params()) / cpu.flops_per_s)
    vectors = int(used.sum()) * spec.sized().d_model * DTYPE_BYTES[dtype]
    return float(compute.sum() + 2 * profile.links.host.link.seconds(vectors))


def all_to_all_seconds(send_GG: Ints, profile: HardwareProfile, spec: ModelSpec, dtype: str) -> float:
    """One all-to-all: latency + the most bytes that a GPU sends or receives / bandwidth; nothing on one GPU.

    `send_GG` [from, to] hidden vectors; what stays on its GPU is not sent. With several nodes, what crosses them goes
    through each GPU's network adapter at the same time as the rest goes inside the nodes; the slower part counts. A
    token whose K experts share a GPU is sent K times, as moesim's own executor does. The collective synchronises, so it
    costs its latency even when empty.
    """
    near, far = busiest(send_GG, profile)
    return float(exchange_seconds(near, far, len(send_GG), profile, spec, dtype))


def busiest(send_GG: Ints, profile: HardwareProfile) -> tuple[Ints, Ints]:
    """The most vectors that one GPU sends or receives inside its node, and between nodes; numbers as arrays."""
    G = len(send_GG)
    node_G = np.arange(G) // profile.node_size
    far_GG = node_G[:, None] != node_G[None, :]
    near_GG = ~far_GG & ~np.eye(G, dtype=np.bool_)
    parts = (np.where(part_GG, send_GG, 0) for part_GG in (near_GG, far_GG))
    near, far = (np.array(max(part.sum(axis=0).max(), part.sum(axis=1).max())) for part in parts)
    return near, far


def exchange_seconds(
    near: Ints, far: Ints, gpus: int, profile: HardwareProfile, spec: ModelSpec, dtype: str
) -> Seconds:
    """`all_to_all_seconds` from the most vectors that one GPU sends or receives inside its node and between nodes,
    arrays of any one shape."""
    if gpus == 1:
        return np.zeros(near.shape)
    near_bytes, far_bytes = _exchanged(near, far, spec, dtype)
    near_s: Seconds = profile.links.all_to_all.seconds(near_bytes)
    if profile.links.network is None or gpus <= profile.node_size:
        return near_s
    far_s: Seconds = profile.links.network.seconds(far_bytes)
    return np.maximum(near_s, far_s)


def exchange_outside(near: Ints, far: Ints, gpus: int, profile: HardwareProfile, spec: ModelSpec, dtype: str) -> Bools:
    """Which all-to-alls `exchange_seconds` extrapolates, inside a node or between nodes; in the arguments' shape."""
    if gpus == 1:
        return np.zeros(np.shape(near), np.bool_)
    near_bytes, far_bytes = _exchanged(near, far, spec, dtype)
    found = profile.links.all_to_all.outside(near_bytes)
    if profile.links.network is None or gpus <= profile.node_size:
        return found
    return found | profile.links.network.outside(far_bytes)


def measured_ranges(gpus: int, profile: HardwareProfile, spec: ModelSpec, dtype: str) -> dict[str, str]:
    """What of a simulation on so many GPUs is read off measured curves: experts, all_to_all, network, p2p or host, each
    with the measured range in words."""
    links = profile.links
    used = {"all_to_all": links.all_to_all, **({"p2p": links.p2p} if links.p2p else {"host": links.host.link})}
    if links.network is not None and gpus > profile.node_size:
        used["network"] = links.network
    curves = {"experts": expert_curve(profile.gpu, spec, dtype)}
    of_links = {name: link.curve for name, link in used.items()} if gpus > 1 else {}
    return {name: curve.range_text() for name, curve in {**curves, **of_links}.items() if curve is not None}


def _exchanged(near: Ints, far: Ints, spec: ModelSpec, dtype: str) -> tuple[Ints, Ints]:
    """The same in bytes."""
    vector = spec.sized().d_model * DTYPE_BYTES[dtype]
    return near * vector, far * vector
