"""Whole models: Hugging Face's Switch as shipped against the same model with our MoE layers, kernels and graphs.

As shipped means its own expert loop, eager attention and norms, and `generate` with its own cache. Both run over the
same random weights of Switch-base-128 in bfloat16, and the model's true router routes ("routing": "model"). Encoder
batches hold no padding, and ours is told so. What each part of ours brings is measured too: `moe_only` is the
library's model with our MoE layers, `eager` adds fused attention and norms, `ours` the graph, `graph_unfused` is the
graph without them. Shape letters: B sequences, S their length, D = d_model, N tokens, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from models_library import Loop, generate, load, per_token
from shapes import config_of
from timing import Report, Timing, free_memory, guarded, median_s
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from moesim.backend.attention import fuse
from moesim.backend.capture import GraphPool
from moesim.backend.dropin import Installed, install
from moesim.backend.graphs import GraphedDecoder, GraphedEncoder
from moesim.backend.random_model import random_switch

FEW, MANY = 5, 20
"""Repeats of what is slow, which the library's model is, and of ours."""
TOLERANCE = 2e-2
"""Relative error in bfloat16 beyond which a token is counted: mostly, rounding changed a close choice of expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is run: (batch, length) of encoder batches, batches of decoding, its context and tokens."""

    encoder: tuple[tuple[int, int], ...] = ((1, 64), (4, 256), (8, 512), (64, 512))
    decode: tuple[int, ...] = (1, 16, 64)
    context: int = 128
    steps: int = 32
    exact: tuple[int, int] = (4, 64)


SMALL = Sizes(encoder=((1, 16), (2, 24)), decode=(1, 2), context=12, steps=4, exact=(2, 12))


@dataclass(slots=True)
class Entry:
    """One row of the results, reported whenever a part of it has been measured."""

    report: Report
    name: str
    device: torch.device
    numbers: dict[str, Any] = field(default_factory=dict)

    def tell(self) -> None:
        """Report what there is."""
        self.report(self.name, self.numbers)

    @contextmanager
    def part(self, key: str) -> Iterator[None]:
        """A measurement that may fail without the others; then a row of its own holds the error."""
        with guarded(self.report, f"{self.name}: {key}"):
            yield
            self.tell()

    def time(self, key: str, fn: Callable[[], object], repeats: int, **options: Any) -> Timing:
        timing = median_s(fn, self.device, repeats=repeats, warmup=1 if repeats <= FEW else 3, **options)
        self.numbers[key] = timing.to_dict()
        return timing

    @contextmanager
    def peak(self, key: str) -> Iterator[None]:
        """The most bytes that tensors took on the device within the block, the model's included, and with the cache."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            free_memory()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if on_gpu:
            self.numbers[f"{key}_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            self.numbers[f"{key}_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)

    def ratio(self, key: str, above: str, below: str) -> None:
        """The time of `above` over that of `below`, and its range over their extremes, where both are there."""
        if above in self.numbers and below in self.numbers:
            a, b = self.numbers[above], self.numbers[below]
            self.numbers[f"{key}_range"] = [a["min_s"] / b["max_s"], a["max_s"] / b["min_s"]]
            self.numbers[key] = a["median_s"] / b["median_s"]


@dataclass(slots=True)
class Bench:
    """One model on one device, with our layers in it, and the time that is left."""

    model: Any
    installed: Installed
    device: torch.device
    sizes: Sizes
    ends_at: float
    pool: GraphPool = field(default_factory=GraphPool)

    def ids(self, batch: int, length: int, seed: int) -> torch.Tensor:
        """[B, S] random ids without padding and ends."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, length)
        return torch.randint(2, self.model.config.vocab_size, shape, generator=generator).to(self.device)

    @contextmanager
    def ours(self, *, fused: bool) -> Iterator[None]:
        """Our MoE layers in place within the block, and fused attention and norms where asked for."""
        self.installed.enable(True)
        patch = fuse(self.model) if fused else None
        try:
            yield
        finally:
            if patch is not None:
                patch.remove()
            self.installed.enable(False)


def run(report: Report, *, device: str, small: bool, budget_s: float) -> None:
    """All of it; what comes when the time is over is reported as skipped."""
    ends_at = time.monotonic() + budget_s
    sizes = SMALL if small else Sizes()
    there = torch.device(device)
    with torch.no_grad():
        bench = make_bench(Entry(report, "model", there), sizes, small, ends_at)
        rows: list[tuple[Entry, Callable[[Bench, Entry], None], Callable[[Bench, Entry], None]]] = []
        for batch, length in sizes.encoder:
            entry = Entry(report, f"encoder {batch * length}", there, {"batch": batch, "length": length})
            rows.append((entry, encoder, encoder_parts))
        for batch in sizes.decode:
            about = {"batch": batch, "context": sizes.context, "steps": sizes.steps}
            rows.append((Entry(report, f"decode {batch}", there, about), decode, decode_parts))
        attempt(bench, [(entry, main) for entry, main, _ in rows])
        attempt(bench, [(Entry(report, "exact float32", there, {"small": small}), exact)])
        attempt(bench, [(entry, parts) for entry, _, parts in rows])
        attempt(bench, [(Entry(report, "attention kernels", there), attention_kernels)])


def attempt(bench: Bench, rows: list[tuple[Entry, Callable[[Bench, Entry], None]]]) -> None:
    """Each row on its own: neither a failure nor the end of the time takes what the others measure."""
    for entry, measure in rows:
        if time.monotonic() > bench.ends_at:
            entry.numbers[f"skipped {measure.__name__}"] = "no time was left"
            entry.tell()
            continue
        with guarded(entry.report, f"{entry.name}: {measure.__name__}"):
            measure(bench, entry)
        free_memory()


def make_bench(entry: Entry, sizes: Sizes, small: bool, ends_at: float) -> Bench:
    """The model of all rows but the exact one."""
    dtype = torch.bfloat16
    begin = time.monotonic()
    model = random_switch(config_of(small=small), dtype, entry.device)
    installed = install(model)
    # Random weights say "end" at random: without an end every sequence has as many tokens, in both.
    model.generation_config.eos_token_id = None
    if entry.device.type == "cuda":
        torch.cuda.synchronize()
    installed.enable(False)
    entry.numbers |= {
        "name": "tiny" if small else "switch-base-128",
        "routing": installed.routing,
        "dtype": str(dtype).removeprefix("torch."),
        "parameter_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "made_in_s": time.monotonic() - begin,
    }
    with entry.peak("made"):
        pass
    entry.tell()
    return Bench(model, installed, entry.device, sizes, ends_at)


def encoder(bench: Bench, entry: Entry) -> None:
    """The library's forward pass, ours, and how far the two are apart."""
    batch, length = entry.numbers["batch"], entry.numbers["length"]
    ids_BS = bench.ids(batch, length, seed=batch * length)
    stack = bench.model.encoder
    entry.numbers |= {"tokens": batch * length, "routing": bench.installed.routing}
    wanted = None
    with entry.part("hf"), entry.peak("hf"):
        entry.time("hf", lambda: stack(input_ids=ids_BS), FEW)
        wanted = stack(input_ids=ids_BS).last_hidden_state
        entry.numbers["load"] = load(stack, ids_BS)
    with entry.part("ours"), entry.peak("ours"), bench.ours(fused=True):
        graphed = GraphedEncoder(bench.model, batch, length, pool=bench.pool)
        entry.time("ours", lambda: graphed(ids_BS), MANY)
        if wanted is not None:
            entry.numbers["apart"] = apart(graphed(ids_BS), wanted)
        graphed.close()
    entry.ratio("speedup", "hf", "ours")
    entry.tell()


def encoder_parts(bench: Bench, entry: Entry) -> None:
    """What our MoE layers, the fused kernels and the graph bring, one by one."""
    batch, length = entry.numbers["batch"], entry.numbers["length"]
    ids_BS = bench.ids(batch, length, seed=batch * length)
    for key, fused in (("moe_only", False), ("eager", True)):
        with entry.part(key), bench.ours(fused=fused):
            entry.time(key, lambda: bench.model.encoder(input_ids=ids_BS), FEW)
    with entry.part("graph_unfused"), bench.ours(fused=False):
        graphed = GraphedEncoder(bench.model, batch, length, pool=bench.pool)
        entry.time("graph_unfused", lambda: graphed(ids_BS), FEW)
        graphed.close()


def apart(got: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Relative error of every token, |ours - theirs| / |theirs| over D, in a few numbers."""
    difference_N = (got.float() - wanted.float()).norm(dim=-1).flatten() / wanted.float().norm(dim=-1).flatten()
    return {
        "median": float(difference_N.median()),
        "max": float(difference_N.max()),
        "share_beyond_tolerance": float((difference_N > TOLERANCE).double().mean()),
        "tolerance": TOLERANCE,
    }


def decode(bench: Bench, entry: Entry) -> None:
    """Seconds a token of the library's `generate`, of its decoder in a bare loop, and of ours."""
    batch, steps = entry.numbers["batch"], entry.numbers["steps"]
    ids_BS = bench.ids(batch, entry.numbers["context"], seed=batch)
    entry.numbers |= {"routing": bench.installed.routing}
    wanted = None
    with entry.part("hf"), entry.peak("hf"):
        whole = entry.time("hf_generate", lambda: generate(bench.model, ids_BS, steps + 1), 3)
        wanted = generate(bench.model, ids_BS, steps + 1)
        first = entry.time("hf_generate_one", lambda: generate(bench.model, ids_BS, 1), 3)
        entry.numbers["hf"] = per_token(whole, first, steps)
    with entry.part("hf_loop"):
        bare = Loop(bench.model, ids_BS)
        entry.time("hf_loop", bare.step, 3, setup=bare.begin, calls=steps)
    with entry.part("ours"), entry.peak("ours"), bench.ours(fused=True):
        decoder = GraphedDecoder(bench.model, batch, steps + 1, ids_BS.shape[1], pool=bench.pool)
        entry.time("ours", decoder.step, MANY, setup=lambda: decoder.begin(ids_BS), calls=steps)
        entry.time("ours_generate", lambda: decoder.generate(ids_BS, max_new_tokens=steps + 1), FEW)
        got_BK = decoder.generate(ids_BS, max_new_tokens=steps + 1)
        if wanted is not None:
            same_BK = (got_BK == wanted)[:, 1:].double()
            entry.numbers["same_tokens_share"] = float(same_BK.mean())
            entry.numbers["same_first_tokens_share"] = float(same_BK[:, 0].mean())
        decoder.close()
    entry.ratio("speedup", "hf", "ours")
    entry.ratio("speedup_over_loop", "hf_loop", "ours")
    entry.ratio("speedup_generate", "hf_generate", "ours_generate")
    entry.tell()


def decode_parts(bench: Bench, entry: Entry) -> None:
    """The library's loop with our MoE layers, and our step without a graph."""
    batch, steps = entry.numbers["batch"], entry.numbers["steps"]
    ids_BS = bench.ids(batch, entry.numbers["context"], seed=batch)
    with entry.part("moe_only"), bench.ours(fused=False):
        bare = Loop(bench.model, ids_BS)
        entry.time("moe_only", bare.step, 3, setup=bare.begin, calls=steps)
    with entry.part("eager"), bench.ours(fused=True):
        decoder = GraphedDecoder(bench.model, batch, steps, ids_BS.shape[1], graph=False)
        entry.time("eager", decoder.step, 3, setup=lambda: decoder.begin(ids_BS), calls=steps)


def exact(bench: Bench, entry: Entry) -> None:
    """In float32 and with padding: the encoder's largest error, and whether the tokens are those of the library."""
    small, sizes = entry.numbers["small"], bench.sizes
    model = random_switch(config_of(small=True) if small else "switch-base-8", torch.float32, entry.device)
    installed = install(model)
    installed.enable(False)
    batch, length = sizes.exact
    ids_BS = torch.randint(2, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(5))
    ids_BS = ids_BS.to(entry.device)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[-1, length // 2 :] = 0
    real_BS = mask_BS.bool()
    entry.numbers["routing"] = installed.routing
    wanted = model.encoder(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
    tokens = generate(model, ids_BS, sizes.steps, mask_BS)
    installed.enable(True)
    fuse(model)
    decoder = GraphedDecoder(model, batch, sizes.steps, length, padded=True)
    difference = (decoder.encoder(ids_BS, mask_BS) - wanted)[real_BS].abs().max() / wanted[real_BS].abs().max()
    entry.numbers["encoder_max_relative_error"] = float(difference)
    got = decoder.generate(ids_BS, mask_BS, max_new_tokens=sizes.steps)
    entry.numbers["tokens"] = [got.shape[0], got.shape[1] - 1]
    entry.numbers["tokens_equal"] = got.shape == tokens.shape and bool((got == tokens).all())
    entry.tell()
    decoder.close()


def attention_kernels(bench: Bench, entry: Entry) -> None:
    """Seconds of one encoder layer's attention at the largest batch, by kernel, with the bias broadcast over B."""
    (batch, length), config = bench.sizes.encoder[-1], bench.model.config
    heads, width = config.num_heads, config.d_kv
    dtype, device = torch.bfloat16, entry.device
    query = torch.randn(batch, length, heads, width, dtype=dtype, device=device).transpose(1, 2)
    bias = torch.randn(1, heads, length, length, dtype=dtype, device=device)

    def attention(backend: SDPBackend, given: torch.Tensor | None) -> None:
        with sdpa_kernel(backend):
            functional.scaled_dot_product_attention(query, query, query, attn_mask=given, scale=1.0)

    wide = bias.expand(batch, heads, length, length)
    cases: list[tuple[str, SDPBackend, torch.Tensor | None]] = [
        ("math", SDPBackend.MATH, wide),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION, wide),
        ("cudnn", SDPBackend.CUDNN_ATTENTION, wide),
        ("flash_without_bias", SDPBackend.FLASH_ATTENTION, None),
        ("cudnn_without_bias", SDPBackend.CUDNN_ATTENTION, None),
    ]
    for key, backend, given in cases if device.type == "cuda" else cases[:1]:
        with entry.part(key):
            entry.time(key, partial(attention, backend, given), FEW)
