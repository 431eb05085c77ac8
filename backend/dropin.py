"""Grouped expert layers in the place of a Hugging Face model's own, over the same weights.

`install` patches a Switch model (both stacks), or one whose experts are stacked tensors with a gate as Mixtral's are
(Qwen2/3-MoE, OLMoE, DeepSeek and others), and gives the model's own layers back on demand. The router and all else stay
the model's. Switch experts move into one tensor [E, P] a layer, one expert at a time, and the model's parameters become
views of it; stacked ones stay where they are. For inference: where gradients are recorded the model's own layers run.
Shape letters: B sequences of length S, N = B S tokens, K experts a token, E experts, D = d_model, F = d_ff, P = 2 D F.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moesim.backend.grouped import KERNELS, SlotWeights, activation_name, group_pairs, grouped_mlp
from moesim.backend.replay import Replay
from moesim.backend.routing import SwitchRouting, one_hot
from moesim.traces import InputError

EXPERTS_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
SWITCH_MLP, SWITCH_EXPERT = "SwitchTransformersSparseMLP", "SwitchTransformersDenseActDense"


class GroupedSwitchMLP(nn.Module):
    """Stands where a Switch model's sparse MLP stood; has its router and experts under the same names."""

    def __init__(self, mlp: nn.Module, replay: Replay | None, layer: int, kernel: str) -> None:
        super().__init__()
        own: Any = mlp
        self.router, self.experts = own.router, own.experts
        self.kernel, self.layer, self.replay = kernel, layer, replay
        self._own = (mlp,)  # in a tuple, so that it is no submodule: its parameters have their names already
        self._gather()
        self.train(mlp.training)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] zero at tokens over capacity, which take the residual path only."""
        if self.training or _recording(x_BSD, self.router.classifier.weight):
            out: torch.Tensor = self._own[0](x_BSD)
            return out
        ids_BS, prob_BS = self._routing(x_BSD)
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        ids_N = ids_BS.reshape(-1) if self.replay is None else self.replay.ids(self.layer, len(x_ND))[:, 0]
        groups = group_pairs(ids_N, self.weights.slots, self._slots_E, every_slot=True)
        return grouped_mlp(x_ND, groups, self.weights, prob_BS.reshape(-1), kernel=self.kernel).view(x_BSD.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Moved or converted parameters are no views any more: gather them again."""
        base: Any = super()  # torch leaves it without types
        base._apply(fn, recurse)
        self._gather()
        return self

    def _gather(self) -> None:
        self.weights = pack(self.experts)
        self._slots_E = torch.arange(self.weights.slots, dtype=torch.int32, device=self.weights.up_SFD.device)
        self._routing = SwitchRouting(self.router)


class GroupedExperts(nn.Module):
    """Stands where a module of stacked, gated experts stood; has its parameters under the same names."""

    def __init__(self, experts: nn.Module, replay: Replay | None, layer: int, kernel: str) -> None:
        super().__init__()
        self._own = (experts,)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        own: Any = experts
        self.num_experts, self.act_fn = own.num_experts, own.act_fn
        self.kernel, self.layer, self.replay = kernel, layer, replay
        self._activation = activation_name(own.act_fn)
        self.train(experts.training)

    @property
    def weights(self) -> SlotWeights:
        """The parameters as they are now."""
        up, down = self.get_parameter("gate_up_proj"), self.get_parameter("down_proj")
        return SlotWeights(up_SFD=up.detach(), down_SDF=down.detach(), activation=self._activation, gated=True)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[N, D] sum of each token's experts, from [N, D], ids [N, K] (from E on: none) and weights [N, K]."""
        if self.training or _recording(hidden_states, self.get_parameter("gate_up_proj")):
            out: torch.Tensor = self._own[0](hidden_states, top_k_index, top_k_weights)
            return out
        ids_NK = top_k_index if self.replay is None else self.replay.ids(self.layer, len(hidden_states))
        weights = self.weights
        groups = group_pairs(ids_NK.reshape(-1), weights.slots)
        top_k, scale_M = ids_NK.shape[1], top_k_weights.reshape(-1)
        return grouped_mlp(hidden_states, groups, weights, scale_M, top_k=top_k, kernel=self.kernel)


def _recording(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether gradients are: the grouped kernels have none, and zeros in their place would not be noticed."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One MoE layer of a model."""

    stack: str
    layer: int
    """Among the MoE layers of its stack."""
    parent: nn.Module
    name: str
    own: nn.Module
    """The model's own module."""
    grouped: GroupedSwitchMLP | GroupedExperts
    """Ours."""


@dataclass(slots=True, kw_only=True)
class Installed:
    """What `install` did to a model."""

    sites: tuple[Site, ...]
    kernel: str
    replays: Mapping[str, Replay]
    """By stack."""
    enabled: bool = False
    _hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def routing(self) -> str:
        """The label of results: "model", or "replay" where any stack's is forced."""
        return "replay" if self.replays else "model"

    def layers(self, stack: str) -> list[GroupedSwitchMLP | GroupedExperts]:
        """Our modules of one stack, in its order."""
        return [site.grouped for site in self.sites if site.stack == stack]

    def enable(self, on: bool = True) -> None:
        """Run our layers, or the model's own over the same weights and, where it is replayed, the same routing."""
        while self._hooks:
            self._hooks.pop().remove()
        for site in self.sites:
            setattr(site.parent, site.name, site.grouped if on else site.own)
            if not on and site.grouped.replay is not None:
                self._hooks.append(_force(site, site.grouped.replay))
        self.enabled = on

    def use_kernel(self, kernel: str) -> None:
        """Compute with another kernel from now on. Raises InputError where there is none of that name."""
        if kernel not in KERNELS:
            raise InputError(f"unknown kernel {kernel}; known: {', '.join(KERNELS)}")
        self.kernel = kernel
        for site in self.sites:
            site.grouped.kernel = kernel

    def remove(self) -> None:
        """Leave the model's own layers in place and their routing to them; their weights stay where they are now."""
        self.enable(False)
        while self._hooks:
            self._hooks.pop().remove()


def install(
    model: nn.Module, *, kernel: str = "auto", routing: Replay | Mapping[str, Replay] | None = None
) -> Installed:
    """Replace the MoE layers of `model` in place, on the device and in the dtype that it has.

    `routing` forces a recorded one onto its stack (several: by stack). Raises InputError where the model has no MoE
    layers, none of a kind that is known here, or other ones than the recording.
    """
    replays = {} if routing is None else {routing.stack: routing} if isinstance(routing, Replay) else dict(routing)
    sites, count = [], Counter[str]()
    for stack, parent, name, own in list(_moe_layers(model)):
        kind = GroupedSwitchMLP if type(own).__name__ == SWITCH_MLP else GroupedExperts
        grouped = kind(own, replays.get(stack), count[stack], kernel)
        sites.append(Site(stack=stack, layer=count[stack], parent=parent, name=name, own=own, grouped=grouped))
        count[stack] += 1
        if grouped.weights.up_SFD.is_cuda:
            # The experts lay in small blocks, which the allocator would keep beside the large one they are in now.
            torch.cuda.empty_cache()
    if not sites:
        raise InputError(
            f"{type(model).__name__}: no MoE layers that can be replaced (Switch, or stacked gated experts)"
        )
    for stack, replay in replays.items():
        if replay.layers != count[stack]:
            raise InputError(f"the routing has {replay.layers} MoE layers, the model's {stack} has {count[stack]}")
    installed = Installed(sites=tuple(sites), kernel=kernel, replays=replays)
    installed.use_kernel(kernel)
    installed.enable()
    return installed


def _moe_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(stack, parent, name in it, module) of every layer that can be replaced, in the order of the model."""
    for path, module in model.named_modules():
        if type(module).__name__ == SWITCH_MLP or _is_stacked(module):
            parent, _, name = path.rpartition(".")
            yield _stack_of(model, path), model.get_submodule(parent), name, module


def _stack_of(model: nn.Module, path: str) -> str:
    parts = path.split(".")
    if "encoder" in parts:
        return "encoder"
    alone = type(model).__name__.endswith("Stack") and not getattr(model, "is_decoder", True)
    return "encoder" if alone and "decoder" not in parts else "decoder"


def _is_stacked(module: nn.Module) -> bool:
    """Mixtral's layout: gate_up_proj [E, 2F, D] (gate, then up) and down_proj [E, D, F], no bias, the common gate."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter) or up.ndim != 3:
        return False
    told: Any = module
    gate = getattr(getattr(type(module), "_apply_gate", None), "__name__", "")
    plain = getattr(told, "is_concatenated", False) and getattr(told, "has_gate", False)
    odd = ("is_transposed", "has_bias", "has_post_expert_norm", "_is_expert_parallel")
    plain = plain and not any(getattr(told, name, False) for name in odd) and gate == "_default_apply_gate"
    return plain and up.shape[1:] == (2 * down.shape[2], down.shape[1])


def _force(site: Site, replay: Replay) -> RemovableHandle:
    """Make the model's own layer follow the recording: its router's mask, or its experts' ids, are replaced."""
    own: Any = site.own
    if not isinstance(site.grouped, GroupedSwitchMLP):

        def choose(
            _experts: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = dict(zip(EXPERTS_ARGUMENTS, args, strict=False)) | named
            given["top_k_index"] = replay.ids(site.layer, len(given["hidden_states"]))
            return (), given

        told: RemovableHandle = own.register_forward_pre_hook(choose, with_kwargs=True)
        return told

    def mask(_router: nn.Module, _args: tuple[Any, ...], said: tuple[Any, ...]) -> tuple[Any, ...]:
        ids_N = replay.ids(site.layer, said[0].shape[0] * said[0].shape[1])[:, 0]
        return (one_hot(ids_N, replay.experts).view(said[0].shape), *said[1:])

    handle: RemovableHandle = own.router.register_forward_hook(mask)
    return handle


def pack(experts: nn.Module) -> SlotWeights:
    """The experts of a Switch layer as views of one tensor [E, P], which their parameters become views of too.

    One expert after the other: beside the rows of its layer never more than one is there twice. Experts that lie so
    already stay. Raises InputError where they are of another kind.
    """
    modules, like = _switch_experts(experts)
    rows_EP = _packed(modules)
    if rows_EP is not None:
        return _views(modules, rows_EP)
    weights = _views(modules, torch.empty((len(modules), 2 * like.numel()), dtype=like.dtype, device=like.device))
    for e, module in enumerate(modules):
        for linear, view in ((module.wi, weights.up_SFD[e]), (module.wo, weights.down_SDF[e])):
            linear.weight.data = view.copy_(linear.weight.data)
    return weights


def place(experts: nn.Module, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give the experts of a Switch layer, wherever they are, new and unset memory as `pack` lays it out."""
    modules, like = _switch_experts(experts)
    weights = _views(modules, torch.empty((len(modules), 2 * like.numel()), dtype=dtype, device=device))
    for e, module in enumerate(modules):
        module.wi.weight, module.wo.weight = nn.Parameter(weights.up_SFD[e]), nn.Parameter(weights.down_SDF[e])


def _switch_experts(experts: nn.Module) -> tuple[list[Any], torch.Tensor]:
    """The experts, and the first one's first matrix [F, D]. Raises InputError where they are of another kind."""
    modules: list[Any] = list(experts.children())
    if any(type(module).__name__ != SWITCH_EXPERT for module in modules):
        raise InputError(f"experts of the kind {type(modules[0]).__name__} cannot be replaced")
    return modules, modules[0].wi.weight


def _views(modules: list[Any], rows_EP: torch.Tensor) -> SlotWeights:
    (d_ff, d_model), activation = modules[0].wi.weight.shape, activation_name(modules[0].act)
    return SlotWeights.of_rows(rows_EP, d_model=d_model, d_ff=d_ff, activation=activation, gated=False)


def _packed(modules: list[Any]) -> torch.Tensor | None:
    """[E, P] the rows that the experts lie in, if they do."""
    first: torch.Tensor = modules[0].wi.weight.data
    params = 2 * first.numel()
    room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if room < len(modules) * params:
        return None
    rows_EP = first.as_strided((len(modules), params), (params, 1))
    step = params * first.element_size()
    for e, module in enumerate(modules):
        at = first.data_ptr() + e * step
        if module.wi.weight.data_ptr() != at or module.wo.weight.data_ptr() != at + step // 2:
            return None
    return rows_EP
