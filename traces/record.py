"""Records a Hugging Face model reading text: encoder, prefill and real decode steps, into a trace.

Each text is cut into requests. For an encoder-decoder model that is a window of tokens for the encoder and the tokens
after it as the decoder's prompt; for a decoder-only model one window as the prompt. Then come tokens that the model
itself generates (greedily, so that a recording can be repeated). Knows nothing about terminals.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from moesim.traces.adapters import adapter_for, cannot_load, load_config
from moesim.traces.errors import InputError
from moesim.traces.routers import RouterRecorder, Selection
from moesim.traces.spec import ModelSpec
from moesim.traces.texts import Text
from moesim.traces.tokens import Phase, TokenTable
from moesim.traces.versions import version
from moesim.traces.writer import SHARD_TOKENS, TraceWriter

ENCODER_TOKENS, DECODER_PROMPT, PROMPT = 128, 32, 128
"""Tokens of a request where the options do not say: encoder window, prompt after it, prompt of a decoder-only model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """How texts become requests."""

    encoder_tokens: int | None = None
    """Encoder tokens of a request; None is 128, or nothing where the model has no encoder."""
    prefill_tokens: int | None = None
    """Prompt tokens of a request, start token not counted; None is 32, or 128 where the model has no encoder."""
    generate: int = 0
    """Tokens to generate per request: one comes out of the prefill, the others of decode steps of one token each."""
    batch: int = 16
    """Requests in one forward pass."""
    max_tokens: int | None = None
    """Most encoder and prompt tokens to record in all."""
    lookahead: int = 2
    router_input: bool = False
    """Record what the routers were given as well, and their gates: 2 d_model bytes a token and layer."""

    def __post_init__(self) -> None:
        for name in ("encoder_tokens", "prefill_tokens", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.generate < 0 or self.lookahead < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise InputError("generate and lookahead must not be negative, max-tokens at least 1")

    def resolved(self, encoder_decoder: bool) -> RecordOptions:
        """With the numbers that the kind of model implies. Raises InputError for encoder tokens without an encoder."""
        if encoder_decoder:
            encoder = self.encoder_tokens or ENCODER_TOKENS
            return replace(self, encoder_tokens=encoder, prefill_tokens=self.prefill_tokens or DECODER_PROMPT)
        if self.encoder_tokens is not None:
            raise InputError("--encoder-tokens: this model has no encoder; give --prefill-tokens alone")
        return replace(self, prefill_tokens=self.prefill_tokens or PROMPT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One cut of a text."""

    text: str
    encoder: list[int]
    """Empty where the model has no encoder."""
    prompt: list[int]
    """With the token that the model starts with, where it has one."""

    @property
    def tokens(self) -> int:
        """Encoder and prompt tokens."""
        return len(self.encoder) + len(self.prompt)


def pick_device(device: str) -> str:
    """'auto' becomes cuda where there is one. Raises InputError where cuda is asked for and absent."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return ("cuda" if there else "cpu") if device == "auto" else device


def load_model(name: str, *, device: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a hub id or a local folder, in eval mode. Raises InputError in one line where it fails.

    A model of no known family is refused before its weights are fetched.
    """
    config = load_config(name)
    if problem := adapter_for(config).library_problem():
        raise InputError(problem)
    transformers.utils.logging.disable_progress_bar()  # the command shows its own
    options: dict[str, Any] = {"local_files_only": Path(name).exists(), "trust_remote_code": False}
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), weights_only=True, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # damaged files raise what the readers of weights and tokenizers raise
        raise cannot_load(name, error) from None
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{name}: {len(missing)} weights are missing ({missing[0]}), so its routing would be random")
    return model.to(device).eval(), tokenizer


def start_tokens(config: Any, tokenizer: Any) -> list[int]:
    """What every prompt starts with: the decoder's start token, or the BOS of the tokenizer, else of the model; a
    decoder-only model may have none."""
    if config.is_encoder_decoder:
        return [config.decoder_start_token_id]
    known = (tokenizer.bos_token_id, config.bos_token_id)
    return [token for token in known if token is not None][:1]


def cut_requests(texts: list[Text], tokenizer: Any, options: RecordOptions, start: list[int]) -> list[Request]:
    """Requests of all texts in turn, so that a batch mixes kinds and a limit on tokens cuts all alike.

    `options` are resolved ones. Windows do not overlap nor cross documents; the last one of a document may be short.
    Documents are read no further than `max_tokens` needs. There is always one request, however small that is. Raises
    InputError where no token comes out.
    """
    requests: list[Request] = []
    left = options.max_tokens if options.max_tokens is not None else 1 << 62
    cuts = [_cut_text(text, tokenizer, options, start) for text in texts]
    for request in (r for turn in zip_longest(*cuts) for r in turn if r is not None):
        if request.tokens > left and requests:
            break
        left -= request.tokens
        requests.append(request)
    if not requests:
        raise InputError("the texts contain no token")
    return requests


def _cut_text(text: Text, tokenizer: Any, options: RecordOptions, start: list[int]) -> Iterator[Request]:
    assert options.prefill_tokens is not None, "cut with resolved options"
    encoder = options.encoder_tokens or 0
    span = encoder + options.prefill_tokens
    for document in text.documents():
        ids = tokenizer(document, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        for i in range(0, len(ids), span):
            window = ids[i : i + span]
            yield Request(text=text.name, encoder=window[:encoder], prompt=[*start, *window[encoder:]])


def record(
    model: Any,
    tokenizer: Any,
    texts: list[Text],
    out: Path,
    options: RecordOptions,
    *,
    source: str,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Record `model` on `texts` into the trace `out` and return its path.

    `progress` is called with (encoder and prompt tokens done, in all). Interrupted at any moment, what was written
    stays. Raises InputError where the options, the texts or the tokenizer do not suit the model.
    """
    recorder = RouterRecorder(model, lookahead=options.lookahead, router_input=options.router_input)
    options = options.resolved(model.config.is_encoder_decoder)
    requests = cut_requests(texts, tokenizer, options, start_tokens(model.config, tokenizer))
    _check_vocabulary(requests, recorder.spec)
    about = provenance(model, texts, options, source, recorder.adapter.caveat(recorder.routers))
    gates = recorder.gates() if options.router_input else None
    writer = TraceWriter(out, recorder.spec, about, overwrite=overwrite, shard_tokens=shard_tokens, gates=gates)
    with recorder, writer:
        first, forward, done = 0, 0, 0
        total = sum(request.tokens for request in requests)
        for group in batch_requests(requests, options.batch):
            if progress:
                progress(done, total)
            forward = _record_batch(model, recorder, writer, group, first, forward, options.generate)
            first += len(group)
            done += sum(request.tokens for request in group)
        if progress:
            progress(done, total)
    return out


def _check_vocabulary(requests: list[Request], spec: ModelSpec) -> None:
    highest = max(chain.from_iterable((*r.encoder, *r.prompt) for r in requests))
    if spec.vocab_size is not None and highest >= spec.vocab_size:
        raise InputError(
            f"the tokenizer gives token {highest}, the model knows {spec.vocab_size}: they do not belong together"
        )


def provenance(
    model: Any, texts: list[Text], options: RecordOptions, source: str, caveat: str | None = None
) -> dict[str, Any]:
    """Where a recording comes from: enough to repeat it, no path of the machine. `texts` have been read."""
    folder = Path(source)
    files = sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]) if folder.is_dir() else []
    return {
        "model": folder.resolve().name if folder.is_dir() else source,
        "model_sha256": {file.name: _digest(file) for file in files},
        "revision": getattr(model.config, "_commit_hash", None),
        "texts": {text.name: text.about() for text in texts},
        "options": asdict(options),
        "decoding": "greedy",
        "caveats": [caveat] if caveat else [],
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            **{name: version(name) for name in ("moesim", "torch", "transformers", "numpy")},
            "python": platform.python_version(),
        },
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()  # in blocks: weights may not fit in memory


def batch_requests(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Batches of at most `size` with equally long prompts, so that the decoder needs no padding; encoder windows are
    padded. A batch runs when it is full; those that never are run at the end."""
    waiting: dict[int, list[Request]] = {}
    for request in requests:
        group = waiting.setdefault(len(request.prompt), [])
        group.append(request)
        if len(group) == size:
            yield waiting.pop(len(request.prompt))
    yield from waiting.values()


def _record_batch(
    model: Any,
    recorder: RouterRecorder,
    writer: TraceWriter,
    group: list[Request],
    first: int,
    forward: int,
    generate: int,
) -> int:
    """Run one batch and append what was routed; returns the number of forward passes so far."""
    prompt_BS = torch.tensor([request.prompt for request in group])
    inputs = _encoder_inputs(model, group) if model.config.is_encoder_decoder else {}
    decoded_BS = _forward(model, inputs, prompt_BS, generate)
    numbers_B = np.arange(first, first + len(group))
    writer.add_requests([request.text for request in group])
    for selection in recorder.take("encoder"):
        ids_BS, real_BS = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy().astype(bool)
        writer.append("encoder", table_of(selection, ids_BS, real_BS, numbers_B, forward, Phase.ENCODER))
        forward += 1
    position = 0
    end = model.generation_config.eos_token_id  # what `generate` stops at: None, one id or several
    ended_B = np.zeros(len(group), bool)
    for selection in recorder.take("decoder"):
        width = selection.ids.shape[1]
        ids_BS = decoded_BS[:, position : position + width]
        phase = Phase.PREFILL if position == 0 else Phase.DECODE
        if phase is Phase.DECODE:
            ended_B |= np.isin(ids_BS[:, 0], [] if end is None else end)  # the end is not worth a step to a server
        real_BS = np.broadcast_to(~ended_B[:, None], ids_BS.shape)
        writer.append("decoder", table_of(selection, ids_BS, real_BS, numbers_B, forward, phase, position))
        position += width
        forward += 1
    return forward


def _encoder_inputs(model: Any, group: list[Request]) -> dict[str, Tensor]:
    """Encoder windows, padded to the longest."""
    longest = max(len(request.encoder) for request in group)
    ids_BS = torch.full((len(group), longest), model.config.pad_token_id or 0)
    mask_BS = torch.zeros_like(ids_BS)
    for row, request in enumerate(group):
        ids_BS[row, : len(request.encoder)] = torch.tensor(request.encoder)
        mask_BS[row, : len(request.encoder)] = 1
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def _forward(model: Any, encoder: dict[str, Tensor], prompt_BS: Tensor, generate: int) -> NDArray[np.int64]:
    """All passes of a batch; returns the decoder's token ids, [B, prompt + generated]. Prompts need no padding."""
    if encoder:
        inputs = {**encoder, "decoder_input_ids": prompt_BS}
    else:
        inputs = {"input_ids": prompt_BS, "attention_mask": torch.ones_like(prompt_BS)}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        if not generate:
            model(**inputs, **({} if encoder else {"logits_to_keep": 1}))  # the logits of a long prompt are large
            return np.asarray(prompt_BS.numpy())
        config = model.generation_config
        pad = config.pad_token_id if config.pad_token_id is not None else 0  # after an end; never recorded
        told = model.generate(**inputs, max_new_tokens=generate, do_sample=False, num_beams=1, pad_token_id=pad)
    return np.asarray(told.cpu().numpy())


def table_of(
    selection: Selection,
    ids_BS: NDArray[np.integer],
    real_BS: NDArray[np.bool_],
    request_B: NDArray[np.integer],
    step: int,
    phase: Phase,
    first_position: int = 0,
) -> TokenTable:
    """The real (not padded) tokens of one forward pass, request by request; positions count real tokens only."""
    position = np.cumsum(real_BS, axis=1) - 1 + first_position
    count = int(real_BS.sum())
    return TokenTable(
        topk_ids=selection.ids[real_BS],
        topk_weights=selection.weights[real_BS],
        dropped=selection.dropped[real_BS],
        token_id=ids_BS[real_BS].astype(np.int32),
        request=np.broadcast_to(request_B[:, None], ids_BS.shape)[real_BS].astype(np.int32),
        position=position[real_BS].astype(np.int32),
        step=np.full(count, step, np.int32),
        phase=np.full(count, phase, np.uint8),
        lookahead_ids=None if selection.lookahead is None else selection.lookahead[real_BS],
        router_input=None if selection.router_input is None else selection.router_input[real_BS],
    )
