"""The feed-forward of routed experts over contiguous weights: group the tokens by expert, multiply, scale, put back.

Sizes of groups stay on the device: nothing here waits for it but the kernel "loop", which is the reference, and the
way on a CPU. So a forward pass can be captured in a CUDA graph. Who chooses the experts is not known here.
Shape letters: N tokens, K experts a token, M = N K pairs (pair p belongs to token p // K), X groups, E experts,
S slots, D = d_model, F = d_ff, P weights of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from moesim.backend import kernels, routing_kernels
from moesim.traces import InputError

Activation = Callable[[torch.Tensor], torch.Tensor]

KERNELS = ("auto", "triton", "grouped_mm", "loop")


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
}
SYNONYMS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python": "gelu"}
CLASSES = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "GELUTanh": "gelu_new",
}
"""The modules that transformers makes of these names."""


def activation_name(activation: Activation | str) -> str:
    """The name in ACTIVATIONS of a function, a module, or what a config calls it. Raises InputError for another."""
    if isinstance(activation, str):
        name = SYNONYMS.get(activation, activation)
    else:
        known = {function: name for name, function in ACTIVATIONS.items()}
        name = known.get(activation) or CLASSES.get(type(activation).__name__) or repr(activation)
    if name not in ACTIVATIONS:
        raise InputError(f"experts with the activation {name} are not supported; known: {', '.join(ACTIVATIONS)}")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotWeights:
    """The experts' matrices in S slots."""

    up_SFD: torch.Tensor
    """[S, F, D], or gated [S, 2F, D]: the rows of the gate, then those of the other."""
    down_SDF: torch.Tensor
    activation: str
    """A name in ACTIVATIONS."""
    gated: bool = False

    @classmethod
    def of_rows(cls, rows_SP: torch.Tensor, *, d_model: int, d_ff: int, activation: str, gated: bool) -> SlotWeights:
        """Views of rows that hold one expert each: up, then down."""
        width = 2 * d_ff if gated else d_ff
        up_SP, down_SP = rows_SP[:, : width * d_model], rows_SP[:, width * d_model :]
        return cls(
            up_SFD=up_SP.view(len(rows_SP), width, d_model),
            down_SDF=down_SP.view(len(rows_SP), d_model, d_ff),
            activation=activation,
            gated=gated,
        )

    @property
    def slots(self) -> int:
        """S."""
        return len(self.up_SFD)

    def window(self, first: int, end: int) -> SlotWeights:
        """Those from `first` to before `end`."""
        return replace(self, up_SFD=self.up_SFD[first:end], down_SDF=self.down_SDF[first:end])

    def act(self, inner: torch.Tensor) -> torch.Tensor:
        """[..., F] activation, and gate, of the first product [..., F or 2F]."""
        function = ACTIVATIONS[self.activation]
        if not self.gated:
            return function(inner)
        gate, up = inner.chunk(2, dim=-1)
        return function(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The pairs of tokens and experts, expert by expert."""

    order_M: torch.Tensor
    """int64 pair indices, sorted by group, ties in their own order; those of no expert last."""
    offsets_X1: torch.Tensor
    """int32: group g is order[offsets[g]:offsets[g + 1]]; pairs past offsets[X] belong to no expert."""
    slot_X: torch.Tensor
    """int32: the slot that holds the weights of every group."""
    every_slot: bool
    """Group g has slot g, and there are no other slots, as far as is known without asking the device."""


def sort_key(ids_M: torch.Tensor, experts: int) -> torch.Tensor:
    """The ids, 0 to `experts`, in the narrowest dtype that holds them: a radix sort goes over them byte by byte."""
    return ids_M.to(torch.uint8 if experts <= 255 else torch.int16 if experts < 2**15 else torch.int32)


def group_pairs(
    ids_M: torch.Tensor, experts: int, slot_X: torch.Tensor | None = None, *, every_slot: bool = False
) -> Groups:
    """Sort pairs by their expert; ids below 0 or from `experts` on mean none. Does not wait for the device.

    `slot_X` int32 [experts]: where each expert's weights are, by default slot e for expert e; `every_slot` says that
    it is just that, made beforehand.
    """
    if slot_X is None:
        slot_X, every_slot = torch.arange(experts, dtype=torch.int32, device=ids_M.device), True
    if kernels.HAVE_TRITON and ids_M.is_cuda and len(ids_M) <= routing_kernels.MOST_PAIRS:
        order_M, offsets_X1 = routing_kernels.group(ids_M.contiguous(), experts)
    else:
        order_M, offsets_X1 = _sorted(ids_M, experts)
    return Groups(order_M=order_M, offsets_X1=offsets_X1, slot_X=slot_X, every_slot=every_slot)


def _sorted(ids_M: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [M], offsets [X + 1]) by a stable sort."""
    if ids_M.dtype != torch.uint8 or experts > 255:
        ids_M = ids_M.to(torch.int32).clamp(-1, experts).remainder(experts + 1)  # -1 becomes `experts`
        ids_M = sort_key(ids_M, experts)
    sorted_M, order_M = torch.sort(ids_M, stable=True)
    bounds_X = torch.arange(experts, dtype=sorted_M.dtype, device=ids_M.device)
    ends_X = torch.searchsorted(sorted_M, bounds_X, right=True, out_int32=True)
    return order_M, functional.pad(ends_X, (1, 0))


def grouped_mlp(
    x_ND: torch.Tensor,
    groups: Groups,
    weights: SlotWeights,
    scale_M: torch.Tensor | None = None,
    *,
    top_k: int = 1,
    kernel: str = "auto",
) -> torch.Tensor:
    """[N, D] sum over each token's experts of scale times output, zero for a token with none.

    A product with its scale is rounded to x's dtype, as Hugging Face's layers do it. Raises InputError where the kernel
    is not there.
    """
    function = {"triton": _triton, "grouped_mm": _grouped_mm, "loop": _loop}
    return function[choose(kernel, x_ND, weights)](x_ND, groups, weights, scale_M, top_k)


def choose(kernel: str, x_ND: torch.Tensor, weights: SlotWeights) -> str:
    """The kernel that "auto" stands for here, or the one asked for. Raises InputError where that cannot run."""
    on_gpu = x_ND.device.type == "cuda"
    triton = kernels.HAVE_TRITON and on_gpu and weights.activation in kernels.ACTIVATIONS
    triton = triton and x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if kernel == "auto":
        # On a GPU torch's own grouped product is one kernel for bfloat16 only (torch 2.9 to 2.11); for other dtypes it
        # is a loop that waits for the sizes, no better than ours.
        return "triton" if triton else "grouped_mm" if on_gpu and x_ND.dtype == torch.bfloat16 else "loop"
    if kernel not in KERNELS:
        raise InputError(f"unknown kernel {kernel}; known: {', '.join(KERNELS)}")
    if kernel == "triton" and not triton:
        raise InputError(
            f"no Triton kernel for {weights.activation} experts in {x_ND.dtype} on {x_ND.device.type} here"
        )
    if kernel == "grouped_mm" and _product() is None:
        raise InputError(f"torch {torch.__version__} has no grouped matrix product; use the kernel loop")
    return kernel


def _triton(
    x_ND: torch.Tensor, groups: Groups, weights: SlotWeights, scale_M: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    """Gathers and scatters inside the products: no permuted copy of x or of the output is made."""
    order_M, bounds = groups.order_M, (groups.offsets_X1, groups.slot_X)
    source_M = order_M if top_k == 1 else order_M // top_k
    # Scales that are wider than x multiply in their own dtype there too: the kernel works in float32.
    h_MF = kernels.grouped_up(
        x_ND.contiguous(), source_M, *bounds, weights.up_SFD, activation=weights.activation, gated=weights.gated
    )
    out_MD = x_ND.new_zeros((len(order_M), x_ND.shape[1]))
    kernels.grouped_down(h_MF, order_M, scale_M, *bounds, weights.down_SDF, out_MD)
    return out_MD if top_k == 1 else out_MD.view(len(x_ND), top_k, -1).sum(dim=1)


def _grouped_mm(
    x_ND: torch.Tensor, groups: Groups, weights: SlotWeights, scale_M: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    product = _product()
    assert product is not None
    groups = groups if groups.every_slot else _by_slot(groups, weights.slots)
    order_M, ends_X = groups.order_M, groups.offsets_X1[1:]
    x_MD = x_ND.index_select(0, order_M if top_k == 1 else order_M // top_k)
    inner_MF = weights.act(product(x_MD, weights.up_SFD.transpose(1, 2), offs=ends_X))
    y_MD = product(inner_MF, weights.down_SDF.transpose(1, 2), offs=ends_X)
    if scale_M is not None:
        y_MD = (y_MD * scale_M.index_select(0, order_M)[:, None]).to(x_ND.dtype)
    # Rows of no expert are not computed: what stands there is whatever was in memory.
    row_M = torch.arange(len(order_M), dtype=torch.int32, device=x_ND.device)
    y_MD = y_MD.masked_fill_((row_M >= ends_X[-1])[:, None], 0)
    out_MD = torch.empty_like(y_MD).index_copy_(0, order_M, y_MD)
    return out_MD if top_k == 1 else out_MD.view(len(x_ND), top_k, -1).sum(dim=1)


def _by_slot(groups: Groups, slots: int) -> Groups:
    """The same pairs with one group for every slot, in the order of the slots: torch's product knows no other."""
    order_M, offsets_X1, slot_X = groups.order_M, groups.offsets_X1, groups.slot_X
    row_M = torch.arange(len(order_M), dtype=torch.int32, device=order_M.device)
    group_M = torch.searchsorted(offsets_X1[1:], row_M, right=True)
    slot_M = functional.pad(slot_X, (0, 1), value=slots).index_select(0, group_M)
    by_slot = group_pairs(slot_M, slots)
    return Groups(
        order_M=order_M.index_select(0, by_slot.order_M),
        offsets_X1=by_slot.offsets_X1,
        slot_X=by_slot.slot_X,
        every_slot=True,
    )


def _product() -> Callable[..., torch.Tensor] | None:
    """Grouped matrix product: public since torch 2.10, before that under another name."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _loop(
    x_ND: torch.Tensor, groups: Groups, weights: SlotWeights, scale_M: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    """One group after the other, sums in their order: bit for bit what a loop over the experts gives."""
    out_ND = torch.zeros_like(x_ND)
    offsets, slots = groups.offsets_X1.tolist(), groups.slot_X.tolist()
    for g, slot in enumerate(slots):
        pair = groups.order_M[offsets[g] : offsets[g + 1]]
        if not len(pair):
            continue
        token = pair // top_k
        inner = weights.act(functional.linear(x_ND[token], weights.up_SFD[slot]))
        y = functional.linear(inner, weights.down_SDF[slot])
        if scale_M is not None:
            y = y * scale_M[pair, None]
        out_ND.index_add_(0, token, y.to(x_ND.dtype))
    return out_ND
