"""The MoE layer: right in every dtype and by every kernel, then fast, beside the model's own loop and the floor.

Switch-base-128's shapes with random weights and replayed routing (Zipf, whose busiest expert has 6 to 10 times the
mean, and uniform), timed over the weights of six layers in turn, so that no cache holds them. The floor of a layer is
the larger of (bytes of the distinct experts it touches + the router's) / the measured copy rate, bytes read and written
counted, and its FLOPs / the measured rate of a large matrix product.
Shape letters: T tokens, L layers, E experts, D = d_model, F = d_ff.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from shapes import config_of
from timing import Report, Timing, copy_rate, free_memory, guarded, matmul_rate, median_s
from transformers import MixtralConfig, MixtralForCausalLM

from moesim.backend import kernels
from moesim.backend.capture import GraphedCall
from moesim.backend.dropin import GroupedSwitchMLP, Installed, install
from moesim.backend.grouped import ACTIVATIONS, SlotWeights, group_pairs, grouped_mlp
from moesim.backend.random_model import random_switch
from moesim.backend.replay import Replay

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error over largest value of the float64 result."""
ZIPF = 0.6
BATCHES = {4096: 512, 32768: 512, 1024: 512, 64: 64}
"""Tokens and the length of their sequences, the ones that have a target first."""
SMALL_BATCHES = {32: 16, 8: 8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one batch is measured on."""

    tokens: int
    skew: str
    installed: Installed
    x_BSD: torch.Tensor
    distinct_L: list[int]
    max_over_mean: float
    rates: tuple[float, float]
    """Bytes/s and FLOP/s."""

    @property
    def name(self) -> str:
        return f"speed/{self.tokens} tokens/{self.skew}"

    def floor_s(self, router: bool = True) -> float:
        """Seconds that a layer takes at least, mean of the layers."""
        weights = weights_of(self.installed, 0)
        slots, F, D = weights.up_SFD.shape
        read = np.mean(self.distinct_L) * 2 * F * D * weights.up_SFD.itemsize + router * slots * D * 4
        work = self.tokens * (4 * F * D + router * 2 * D * slots)
        return max(float(read) / self.rates[0], work / self.rates[1])


@torch.no_grad()
def run(report: Report, *, device: str, small: bool, budget_s: float) -> None:
    """Errors, speeds as long as there is time, and errors of gated experts."""
    end = time.monotonic() + budget_s
    names = [name for name in ("triton", "grouped_mm", "loop") if name != "triton" or device != "cpu"]
    for dtype in TOLERANCE:
        with guarded(report, f"errors/switch/{short(dtype)}"):
            switch_errors(report, names, dtype, device, small)
    free_memory()
    with guarded(report, "speed"):
        speeds(report, device, small, end)
    for dtype in TOLERANCE:
        with guarded(report, f"errors/gated/{short(dtype)}"):
            gated_errors(report, names, dtype, device)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def model_of(dtype: torch.dtype, device: str, small: bool, layers: int) -> Any:
    return random_switch(config_of(small=small, stacks=("encoder",), layers=layers), dtype, device)


def weights_of(installed: Installed, layer: int) -> SlotWeights:
    return installed.layers("encoder")[layer].weights


def exact(
    x_ND: torch.Tensor, ids_M: torch.Tensor, scale_M: torch.Tensor, weights: SlotWeights, top_k: int = 1
) -> torch.Tensor:
    """[N, D] in float64, expert by expert."""
    out_ND = torch.zeros_like(x_ND, dtype=torch.float64)
    act = ACTIVATIONS[weights.activation]
    for e in range(weights.slots):
        pair = (ids_M == e).nonzero()[:, 0]
        inner = x_ND[pair // top_k].double() @ weights.up_SFD[e].double().t()
        if weights.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = act(gate) * up
        else:
            inner = act(inner)
        y = inner @ weights.down_SDF[e].double().t()
        out_ND.index_add_(0, pair // top_k, y * scale_M[pair, None].double())
    return out_ND


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over the largest value; not a number where one of them is none."""
    return float((got.double().view(want.shape) - want).abs().max() / want.abs().max())


def poison(x_ND: torch.Tensor, width: int) -> None:
    """Fill memory with NaN and free it: the next buffers of these sizes are made of it."""
    sizes = (x_ND.shape[1], x_ND.shape[1], width, width)
    for block in [x_ND.new_full((len(x_ND), size), torch.nan) for size in sizes]:
        del block


def switch_errors(report: Report, names: list[str], dtype: torch.dtype, device: str, small: bool) -> None:
    """With a capacity that drops tokens and with one that does not, against float64 on the same routing."""
    model = model_of(dtype, device, small, 2)
    installed = install(model)
    layer: Any = installed.layers("encoder")[0]
    length = 16 if small else 512
    x_BSD = torch.randn(2, length, layer.weights.up_SFD.shape[2], device=device).to(dtype)
    x_ND, width = x_BSD.view(-1, x_BSD.shape[-1]), layer.weights.up_SFD.shape[1]
    for capacity in (3, length):
        layer.router.expert_capacity = capacity
        mask_BSE, prob_BS1, _ = layer.router(x_BSD)
        none_N = (mask_BSE.sum(-1) == 0).view(-1)
        ids_N = mask_BSE.argmax(-1).view(-1).masked_fill(none_N, layer.weights.slots)
        routed_N = layer._routing(x_BSD)[0].view(-1)
        want = exact(x_ND, ids_N, prob_BS1.reshape(-1), layer.weights)
        for name in names:
            label = f"errors/switch/{short(dtype)}/{name}/{'capacity' if capacity == 3 else 'no capacity'}"
            with guarded(report, label):
                installed.use_kernel(name)
                worst = 0.0
                for _ in range(3):
                    poison(x_ND, width)
                    got = grouped_mlp(
                        x_ND, group_pairs(ids_N, layer.weights.slots), layer.weights, prob_BS1.reshape(-1), kernel=name
                    )
                    worst = max(worst, difference(got, want))
                agree = routed_N == ids_N
                whole = difference(layer(x_BSD).view(x_ND.shape)[agree], want[agree])
                report(
                    label,
                    {
                        "max_error": worst,
                        "max_error_of_layer": whole,
                        "tolerance": TOLERANCE[dtype],
                        "within": max(worst, whole) <= TOLERANCE[dtype],
                        "dropped": int(none_N.sum()),
                        "dropped_are_zero": bool((got[none_N] == 0).all()),
                        "routed_as_the_router": float(agree.double().mean()),
                    },
                )


def gated_errors(report: Report, names: list[str], dtype: torch.dtype, device: str) -> None:
    """Mixtral's block, top-2 of 8 gated experts, against float64 on the same routing."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    with torch.device(device):
        model = MixtralForCausalLM(config).to(dtype).eval()
    block = model.model.layers[0].mlp
    installed = install(model)
    x_BSD = torch.randn(2, 100, 256, device=device).to(dtype)
    x_ND = x_BSD.view(-1, 256)
    _, scale_NK, ids_NK = block.gate(x_BSD)
    want = exact(x_ND, ids_NK.reshape(-1), scale_NK.reshape(-1), installed.sites[0].grouped.weights, 2)
    for name in names:
        with guarded(report, f"errors/gated/{short(dtype)}/{name}"):
            installed.use_kernel(name)
            poison(x_ND.repeat(2, 1), 512)
            worst = difference(block(x_BSD), want)
            numbers = {"max_error": worst, "tolerance": TOLERANCE[dtype], "within": worst <= TOLERANCE[dtype]}
            report(f"errors/gated/{short(dtype)}/{name}", numbers)


def speeds(report: Report, device: str, small: bool, end: float) -> None:
    dtype = torch.bfloat16
    rates = copy_rate(device), matmul_rate(device, dtype)
    report("speed/rates", {"copy_bytes_per_s": rates[0], "matmul_flops": rates[1], "dtype": short(dtype)})
    free_memory()
    model = model_of(dtype, device, small, 4 if small else 12)
    for tokens, length in (SMALL_BATCHES if small else BATCHES).items():
        for skew in ("zipf", "uniform"):
            if time.monotonic() > end:
                report(f"speed/{tokens} tokens/{skew}", {"error": "no time was left"})
                continue
            with guarded(report, f"speed/{tokens} tokens/{skew}"):
                case = case_of(model, tokens, length, skew, device, rates)
                try:
                    measure(report, case, device, end)
                finally:
                    case.installed.remove()


def case_of(model: Any, tokens: int, length: int, skew: str, device: str, rates: tuple[float, float]) -> Case:
    """The model with a replayed routing of its own for every layer."""
    config = model.config
    L, E = config.num_sparse_encoder_layers, config.num_experts
    rng = np.random.default_rng(tokens)
    share_E = np.arange(1, E + 1, dtype=float) ** (-ZIPF if skew == "zipf" else 0)
    share_E /= share_E.sum()
    ids_TL = np.stack([rng.permutation(E)[rng.choice(E, tokens, p=share_E)] for _ in range(L)], axis=1)
    replay = Replay(ids_TL[..., None], E, device=device)
    replay.select(torch.arange(tokens))
    load_LE = np.stack([np.bincount(ids_TL[:, layer], minlength=E) for layer in range(L)])
    generator = torch.Generator(device).manual_seed(tokens)
    shape = (tokens // length, length, config.d_model)
    return Case(
        tokens=tokens,
        skew=skew,
        installed=install(model, routing=replay),
        x_BSD=torch.randn(shape, device=device, generator=generator).bfloat16(),
        distinct_L=(load_LE > 0).sum(axis=1).tolist(),
        max_over_mean=float((load_LE.max(axis=1) / load_LE.mean(axis=1)).mean()),
        rates=rates,
    )


def measure(report: Report, case: Case, device: str, end: float) -> None:
    """The model's own loop, then every kernel: the whole layer, and its experts alone."""
    own_s = None
    with guarded(report, f"{case.name}/own loop"):
        case.installed.enable(False)
        repeats = 3 if case.tokens > 64 else 5
        timing = median_s(lambda: through(case), device, repeats=repeats, warmup=1)
        own_s = timing.median_s / len(case.distinct_L)
        told = numbers(case, "own loop", own_s, timing.repeats)
        report(f"{case.name}/own loop", told | spread(timing, len(case.distinct_L)))
    case.installed.enable()
    for name in kernels_of(device):
        if time.monotonic() > end:
            report(f"{case.name}/{name}", {"error": "no time was left"})
            continue
        with guarded(report, f"{case.name}/{name}"):
            case.installed.use_kernel(name)
            report(f"{case.name}/{name}", ours(case, name, device, own_s))


def kernels_of(device: str) -> list[str]:
    """Those that wait for nothing, so that they can be captured."""
    return [name for name in ("triton", "grouped_mm") if name != "triton" or (device != "cpu" and kernels.HAVE_TRITON)]


def through(case: Case) -> None:
    """All layers, each on the same input."""
    for site in case.installed.sites:
        getattr(site.parent, site.name)(case.x_BSD)


def ours(case: Case, name: str, device: str, own_s: float | None) -> dict[str, Any]:
    L = len(case.distinct_L)
    out_BSD = torch.empty_like(case.x_BSD)

    def layers() -> None:
        for module in case.installed.layers("encoder"):
            out_BSD.copy_(module(case.x_BSD)) if module.layer == 0 else module(case.x_BSD)

    eager = median_s(lambda: through(case), device, repeats=3, warmup=1)
    whole = graphed(layers, device)
    out_BSD.fill_(torch.nan)
    whole()
    worst = difference(out_BSD, expected(case))
    timing = median_s(whole, device, repeats=10, warmup=2)
    whole.close()
    experts = graphed(experts_only(case, name), device)
    alone = median_s(experts, device, repeats=10, warmup=2)
    experts.close()
    told = numbers(case, name, timing.median_s / L, timing.repeats) | spread(timing, L)
    told |= {"eager_s": eager.median_s / L, "experts_s": alone.median_s / L}
    told |= {"experts_over_floor": alone.median_s / L / case.floor_s(router=False), "max_error": worst}
    return told | ({} if own_s is None else {"speedup": own_s / (timing.median_s / L)})


def graphed(body: Callable[[], None], device: str) -> GraphedCall:
    return GraphedCall(body, torch.device(device))


def expected(case: Case) -> torch.Tensor:
    """The first layer's output in float64."""
    layer: Any = case.installed.layers("encoder")[0]
    assert isinstance(layer, GroupedSwitchMLP) and layer.replay is not None
    ids_N = layer.replay.ids(0, case.tokens)[:, 0]
    prob_N = layer._routing(case.x_BSD)[1].reshape(-1)
    return exact(case.x_BSD.view(case.tokens, -1), ids_N, prob_N, layer.weights)


def experts_only(case: Case, name: str) -> Callable[[], None]:
    """The products of all layers, tokens grouped beforehand."""
    x_ND = case.x_BSD.view(case.tokens, -1)
    scale_N = torch.full_like(x_ND[:, 0], 0.5)
    parts = list(grouped_layers(case))

    def body() -> None:
        for groups, weights in parts:
            grouped_mlp(x_ND, groups, weights, scale_N, kernel=name)

    return body


def grouped_layers(case: Case) -> Iterator[tuple[Any, SlotWeights]]:
    for module in case.installed.layers("encoder"):
        assert module.replay is not None
        ids_N = module.replay.ids(module.layer, case.tokens)[:, 0]
        yield group_pairs(ids_N, module.weights.slots), module.weights


def numbers(case: Case, kernel: str, layer_s: float, repeats: int) -> dict[str, Any]:
    return {
        "tokens": case.tokens,
        "skew": case.skew,
        "max_over_mean": case.max_over_mean,
        "distinct_experts": float(np.mean(case.distinct_L)),
        "layers": len(case.distinct_L),
        "kernel": kernel,
        "routing": case.installed.routing,
        "graph": kernel != "own loop",
        "layer_s": layer_s,
        "floor_s": case.floor_s(),
        "over_floor": layer_s / case.floor_s(),
        "repeats": repeats,
    }


def spread(timing: Timing, layers: int) -> dict[str, float]:
    return {"layer_min_s": timing.min_s / layers, "layer_max_s": timing.max_s / layers}
