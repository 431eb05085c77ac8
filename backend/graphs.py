"""Whole Switch models as CUDA graphs: one launch for an encoder's forward pass, one for a decode step.

At few tokens a forward pass is some thousand kernels of a few microseconds, and launching them takes longer than
running them. A graph is captured once for fixed shapes and replayed on static tensors; where there is no CUDA the same
functions are called directly. The MoE layers must not wait for the device: put `dropin.install` in place first.
The rule of `capture.py` holds: what shares a pool runs one at a time, on one stream. Inputs and outputs live as long as
their object. Shape letters: B sequences, S their length, D = d_model, H heads, K decoder positions, C width of a head,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moesim.backend.attention import ALIGNMENT, aligned, stacks_of
from moesim.backend.blocks import DistanceBias, additive, attended, by_head, in_range
from moesim.backend.capture import GraphedCall, GraphPool
from moesim.traces import InputError


class GraphedEncoder:
    """The encoder of a Switch model for [batch, length] ids.

    The library's own layers run, with whatever attention, norms and MoE layers are in place when this is made. The
    relative position bias depends on the length alone and is computed once. Without `padded` no mask exists at all, so
    that the bias stays one [1, H, S, S] for all sequences; with it the sum of both is made once for all layers.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        *,
        padded: bool = False,
        pool: GraphPool | None = None,
        graph: bool = True,
    ) -> None:
        self._stack = stack_of(model, "encoder")
        weight = self._stack.embed_tokens.weight
        device = weight.device
        self.ids_BS = torch.zeros((batch, length), dtype=torch.int64, device=device)
        self.mask_BS = torch.ones_like(self.ids_BS) if padded else None
        with torch.no_grad():
            self._bias_1HSS = aligned(_first_attention(self._stack).compute_bias(length, length, device=device))
        self.output_BSD = torch.empty((batch, length, weight.shape[1]), dtype=weight.dtype, device=device)
        self._run = GraphedCall(self._forward, device, pool, graph=graph)

    @torch.no_grad()
    def __call__(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        """[B, S, D] the encoder's last hidden state: a static tensor that the next call overwrites.

        `mask_BS` is 1 at real tokens and 0 at padding. Raises InputError where shapes differ from those it was made
        for, or where there is a mask and it was not made for padding.
        """
        _expect("ids", ids_BS, self.ids_BS)
        self.ids_BS.copy_(ids_BS)
        if self.mask_BS is None:
            if mask_BS is not None:
                raise InputError("this encoder was made for batches without padding: make it with padded=True")
        elif mask_BS is None:
            self.mask_BS.fill_(1)
        else:
            _expect("mask", mask_BS, self.mask_BS)
            self.mask_BS.copy_(mask_BS)
        self._run()
        return self.output_BSD

    def _forward(self) -> None:
        hidden_BSD = self._stack.embed_tokens(self.ids_BS)
        bias = self._bias_1HSS
        if self.mask_BS is not None:
            bias = aligned(bias + additive(self.mask_BS, hidden_BSD.dtype))
        for block in self._stack.block:
            hidden_BSD = in_range(block.layer[0](hidden_BSD, position_bias=bias)[0])
            hidden_BSD = in_range(block.layer[1](hidden_BSD))
        self.output_BSD.copy_(self._stack.final_layer_norm(hidden_BSD))

    def close(self) -> None:
        """Give the graph's memory back; the static tensors go with the object."""
        self._run.close()


def stack_of(model: Any, name: str) -> Any:
    """The stack `name` of a Switch model in inference mode.

    Raises InputError where it has none, is another kind of model, or is being trained.
    """
    stack = getattr(model, name, None)
    if stack is None or stack not in stacks_of(model):
        raise InputError(f"{type(model).__name__}: this model has no {name}")
    if stack.training:
        raise InputError("graphs are for inference: call model.eval() first")
    return stack


def _first_attention(stack: Any) -> Any:
    """The self-attention that holds the position bias which all layers of the stack share."""
    return stack.block[0].layer[0].SelfAttention


def _expect(name: str, given: torch.Tensor, static: torch.Tensor) -> None:
    if given.shape != static.shape:
        raise InputError(f"{name}: shape {tuple(given.shape)}, but the graph was made for {tuple(static.shape)}")


class GraphedDecoder:
    """Greedy decoding of a Switch model for `batch` sequences of `enc_len` encoder tokens and up to `max_len` new ones.

    The decode step is written over the library's own modules (projections, norms, feed-forwards, head); its caches,
    masks and position counter are replaced by static tensors: keys and values lie where the device's own counter says,
    and the position bias and causality are one window of a vector that is computed once. A step never waits for the
    host. `padded` says whether encoder batches may hold padding. Raises InputError for models that it cannot decode
    as `generate(do_sample=False)` would.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        max_len: int,
        enc_len: int,
        *,
        padded: bool = False,
        pool: GraphPool | None = None,
        graph: bool = True,
    ) -> None:
        self._stack = stack_of(model, "decoder")
        self._head, self._model_dim = model.lm_head, model.config.d_model
        self._tied = model.config.tie_word_embeddings
        pool = pool or GraphPool()
        self.encoder = GraphedEncoder(model, batch, enc_len, padded=padded, pool=pool, graph=graph)
        self._rules = rules_of(model)
        self.max_len, self._taken = max_len, 0
        self._make_state(batch, -(-max_len // ALIGNMENT) * ALIGNMENT, enc_len)
        device = self.tokens_B.device
        self._begin = GraphedCall(self._begin_body, device, pool, graph=graph)
        self._begin()
        self._step = GraphedCall(self._step_body, device, pool, graph=graph)

    @torch.no_grad()
    def _make_state(self, batch: int, room: int, enc_len: int) -> None:
        """Static tensors: `room` decoder positions (K), the sequences so far, caches [layers, B, H, K, C]."""
        weight, attention = self._stack.embed_tokens.weight, _first_attention(self._stack)
        heads, width, layers = attention.n_heads, attention.key_value_proj_dim, len(self._stack.block)
        device = weight.device
        self.tokens_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.finished_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.out_BK = torch.zeros((batch, room + 1), dtype=torch.int64, device=device)
        self.logits_BV = torch.empty((batch, self._head.weight.shape[0]), dtype=weight.dtype, device=device)
        # Zeros, not whatever lies there: probability zero times NaN is NaN.
        self._keys = weight.new_zeros((layers, batch, heads, room, width))
        self._values = torch.zeros_like(self._keys)
        self._cross_keys = weight.new_empty((layers, batch, heads, enc_len, width))
        self._cross_values = torch.empty_like(self._cross_keys)
        self._cross_bias = None
        if self.encoder.mask_BS is not None:
            self._cross_bias = aligned(additive(self.encoder.mask_BS, weight.dtype))
        self._bias = DistanceBias(attention, room)

    def begin(self, encoder_ids_BS: torch.Tensor, mask_BS: torch.Tensor | None = None) -> None:
        """Encode a batch and stand at the start of decoding it. Raises InputError as `GraphedEncoder` does."""
        self.encoder(encoder_ids_BS, mask_BS)
        self._begin()
        self._taken = 0

    def step(self) -> None:
        """Decode one token of every sequence into `out_BK`; `logits_BV` are its logits, until the next step.

        Raises InputError where `max_len` tokens have been decoded.
        """
        if self._taken == self.max_len:
            raise InputError(f"this decoder was made for {self.max_len} tokens, all of which have been decoded")
        self._step()
        self._taken += 1

    def generate(
        self,
        encoder_ids_BS: torch.Tensor,
        mask_BS: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        check_every: int = 16,
    ) -> torch.Tensor:
        """[B, 1 + n] ids as the library's greedy `generate` gives them: start, tokens, padding after the end.

        Whether all sequences have ended is asked every `check_every` tokens, as asking waits for the device; what was
        decoded beyond the last end is cut off. Raises InputError as `begin` and `step` do.
        """
        if not 0 < max_new_tokens <= self.max_len:
            raise InputError(f"max_new_tokens is {max_new_tokens}, but this decoder was made for 1 to {self.max_len}")
        self.begin(encoder_ids_BS, mask_BS)
        while self._taken < max_new_tokens:
            self.step()
            if self._rules.end_E and self._taken % check_every == 0 and bool(self.finished_B.all()):
                break
        return self._cut(self.out_BK[:, : 1 + self._taken])

    def _cut(self, out_BK: torch.Tensor) -> torch.Tensor:
        """A copy without the columns after the one in which the last sequence ended."""
        ended_BK = torch.zeros_like(out_BK, dtype=torch.bool)
        for end in self._rules.end_E:
            ended_BK[:, 1:] |= out_BK[:, 1:] == end
        over_K = ended_BK.cumsum(dim=1).bool().all(dim=0)
        return out_BK[:, : min(int((~over_K).sum()) + 1, out_BK.shape[1])].clone()

    def _begin_body(self) -> None:
        """Keys and values of the encoder's output for every layer; everything else back to the start."""
        for i, block in enumerate(self._stack.block):
            attention = block.layer[1].EncDecAttention
            self._cross_keys[i].copy_(by_head(attention, attention.k(self.encoder.output_BSD)))
            self._cross_values[i].copy_(by_head(attention, attention.v(self.encoder.output_BSD)))
        if self._cross_bias is not None and self.encoder.mask_BS is not None:
            self._cross_bias.copy_(additive(self.encoder.mask_BS, self._cross_bias.dtype))
        self.position_1.zero_()
        self.finished_B.zero_()
        self.tokens_B.fill_(self._rules.start)
        self.out_BK.fill_(self._rules.pad)
        self.out_BK[:, 0].fill_(self._rules.start)

    def _step_body(self) -> None:
        hidden_B1D = self._stack.embed_tokens(self.tokens_B[:, None])
        bias_1H1K = self._bias.at(self.position_1)
        for i, block in enumerate(self._stack.block):
            hidden_B1D = in_range(self._self_attention(i, block.layer[0], hidden_B1D, bias_1H1K))
            hidden_B1D = in_range(self._cross_attention(i, block.layer[1], hidden_B1D))
            hidden_B1D = in_range(block.layer[2](hidden_B1D))
        hidden_BD = self._stack.final_layer_norm(hidden_B1D)[:, 0]
        if self._tied:
            hidden_BD = hidden_BD * self._model_dim**-0.5
        self.logits_BV.copy_(self._head(hidden_BD))
        self._choose()

    def _self_attention(self, i: int, layer: Any, hidden_B1D: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        attention, x_B1D = layer.SelfAttention, layer.layer_norm(hidden_B1D)
        for cache, project in ((self._keys[i], attention.k), (self._values[i], attention.v)):
            cache.index_copy_(2, self.position_1, by_head(attention, project(x_B1D)))
        return hidden_B1D + attended(attention, x_B1D, self._keys[i], self._values[i], bias)

    def _cross_attention(self, i: int, layer: Any, hidden_B1D: torch.Tensor) -> torch.Tensor:
        read = (self._cross_keys[i], self._cross_values[i], self._cross_bias)
        return hidden_B1D + attended(layer.EncDecAttention, layer.layer_norm(hidden_B1D), *read)

    def _choose(self) -> None:
        """Append the best token, padding to sequences that have ended, and move on by one position."""
        self.tokens_B.copy_(self.logits_BV.argmax(dim=-1).masked_fill_(self.finished_B, self._rules.pad))
        for end in self._rules.end_E:
            self.finished_B |= self.tokens_B == end
        self.position_1 += 1
        self.out_BK.index_copy_(1, self.position_1, self.tokens_B[:, None])

    def close(self) -> None:
        """Give the graphs' memory back; the static tensors go with the object."""
        for call in (self._begin, self._step, self.encoder):
            call.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What greedy decoding needs to know of a model's generation settings, as token ids."""

    start: int
    pad: int
    end_E: tuple[int, ...]


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
}
"""Generation settings that change what greedy decoding gives, and their values that do not."""


def rules_of(model: Any) -> Rules:
    """The model's rules for greedy decoding.

    Raises InputError where its generation settings ask for more than the most likely token.
    """
    config = model.generation_config
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise InputError(f"the model's generation settings say {name}={value}; graphs decode plainly greedy only")
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    if start is None:
        raise InputError("the model's generation settings name no decoder_start_token_id")
    end = config.eos_token_id
    end_E = () if end is None else tuple(end) if isinstance(end, (list, tuple)) else (end,)
    pad = config.pad_token_id
    return Rules(start=start, pad=pad if pad is not None else (*end_E, 0)[0], end_E=end_E)
