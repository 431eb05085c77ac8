"""Records a Hugging Face model reading text: encoder, decoder prefill and real decode steps, into a trace.

Each text is cut into requests: a window of tokens for the encoder, the tokens after it as the decoder's prompt, then
tokens that the model itself generates (greedily, so that a recording can be repeated). Knows nothing about terminals.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from moesim.traces.errors import InputError
from moesim.traces.routers import RouterRecorder, Selection
from moesim.traces.tokens import Phase, TokenTable
from moesim.traces.writer import SHARD_TOKENS, TraceWriter

BROKEN_ROUTER = ((5, 0), (5, 18))
"""transformers versions from, below: their Switch router returns its values in another order and drops no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """How texts become requests."""

    encoder_tokens: int = 128
    prefill_tokens: int = 32
    generate: int = 0
    """Tokens to generate per request: one comes out of the prefill, the others of decode steps of one token each."""
    batch: int = 16
    """Requests in one forward pass."""
    max_tokens: int | None = None
    """Most encoder and prompt tokens to record in all."""
    lookahead: int = 2

    def __post_init__(self) -> None:
        for name in ("encoder_tokens", "prefill_tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.generate < 0 or self.lookahead < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise InputError("generate and lookahead must not be negative, max-tokens at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One cut of a text."""

    text: str
    encoder: list[int]
    prompt: list[int]

    @property
    def tokens(self) -> int:
        """Encoder and prompt tokens, the decoder's start token counted."""
        return len(self.encoder) + len(self.prompt) + 1


def pick_device(device: str) -> str:
    """'auto' becomes cuda where there is one. Raises InputError where cuda is asked for and absent."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return ("cuda" if there else "cpu") if device == "auto" else device


def load_model(name: str, *, device: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a hub id or a local folder, in eval mode. Raises InputError in one line where it fails."""
    release = tuple(int(part) for part in version("transformers").split(".")[:2])
    if BROKEN_ROUTER[0] <= release < BROKEN_ROUTER[1]:
        raise InputError(
            f"transformers {version('transformers')} has a Switch router that mixes up its outputs and drops no token; "
            "install transformers>=5.18,<6"
        )
    folder = Path(name)
    if (folder.exists() or name.startswith((".", "/"))) and not (folder / "config.json").is_file():
        raise InputError(f"{name}: no model there (config.json is missing)")
    transformers.utils.logging.disable_progress_bar()  # the command shows its own
    options: dict[str, Any] = {"local_files_only": folder.exists()}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(name, config=config, dtype=getattr(torch, dtype), weights_only=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name}: the model cannot be loaded: {reason}") from None
    return model.to(device).eval(), tokenizer


def read_texts(paths: list[Path]) -> dict[str, str]:
    """Text name to content; a folder stands for its .txt files. Raises InputError: missing, empty, not UTF-8, twice."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: the folder has no .txt file")
        files += found
    texts: dict[str, str] = {}
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")  # line ends stay as they are, and so does the digest
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from None
        if not text.strip():
            raise InputError(f"{file}: the text is empty")
        if file.name in texts:
            raise InputError(f"{file}: two texts are called {file.name}; rename one")
        texts[file.name] = text
    return texts


def cut_requests(texts: dict[str, str], tokenizer: Any, options: RecordOptions) -> list[Request]:
    """Requests of all texts in turn, so that a batch mixes kinds and a limit on tokens cuts all alike.

    Windows do not overlap. The last window of a text may be short. There is always one request, however small
    `max_tokens` is. Raises InputError where no token comes out.
    """
    per_text = []
    span = options.encoder_tokens + options.prefill_tokens
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        windows = [ids[i : i + span] for i in range(0, len(ids), span)]
        cut = options.encoder_tokens
        per_text.append([Request(text=name, encoder=w[:cut], prompt=w[cut:]) for w in windows])
    requests: list[Request] = []
    left = options.max_tokens if options.max_tokens is not None else 1 << 62
    for request in (r for turn in zip_longest(*per_text) for r in turn if r is not None):
        if request.tokens > left and requests:
            break
        left -= request.tokens
        requests.append(request)
    if not requests:
        raise InputError("the texts contain no token")
    return requests


def record(
    model: Any,
    tokenizer: Any,
    texts: dict[str, str],
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
    stays.
    """
    requests = cut_requests(texts, tokenizer, options)
    recorder = RouterRecorder(model, lookahead=options.lookahead)
    about = provenance(model, texts, options, source)
    with recorder, TraceWriter(out, recorder.spec, about, overwrite=overwrite, shard_tokens=shard_tokens) as writer:
        first, forward, done = 0, 0, 0
        total = sum(request.tokens for request in requests)
        for group in _batches(requests, options.batch):
            if progress:
                progress(done, total)
            forward = _record_batch(model, recorder, writer, group, first, forward, options)
            first += len(group)
            done += sum(request.tokens for request in group)
        if progress:
            progress(done, total)
    return out


def provenance(model: Any, texts: dict[str, str], options: RecordOptions, source: str) -> dict[str, Any]:
    """Where a recording comes from: enough to repeat it, no path of the machine."""
    folder = Path(source)
    files = sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]) if folder.is_dir() else []
    return {
        "model": folder.resolve().name if folder.is_dir() else source,
        "model_sha256": {file.name: _digest(file) for file in files},
        "revision": getattr(model.config, "_commit_hash", None),
        "texts": {
            name: {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in texts.items()
        },
        "options": asdict(options),
        "decoding": "greedy",
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


def _batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Neighbours with equally long prompts, so that the decoder needs no padding; encoder windows are padded."""
    group: list[Request] = []
    for request in requests:
        if group and (len(group) == size or len(request.prompt) != len(group[0].prompt)):
            yield group
            group = []
        group.append(request)
    yield group


def _record_batch(
    model: Any,
    recorder: RouterRecorder,
    writer: TraceWriter,
    group: list[Request],
    first: int,
    forward: int,
    options: RecordOptions,
) -> int:
    """Run one batch and append what was routed; returns the number of forward passes so far."""
    pad, start = model.config.pad_token_id or 0, model.config.decoder_start_token_id
    longest = max(len(request.encoder) for request in group)
    encoder = torch.full((len(group), longest), pad)
    mask = torch.zeros_like(encoder)
    for row, request in enumerate(group):
        encoder[row, : len(request.encoder)] = torch.tensor(request.encoder)
        mask[row, : len(request.encoder)] = 1
    prompt = torch.tensor([[start, *request.prompt] for request in group])
    decoded = _forward(
        model, encoder.to(model.device), mask.to(model.device), prompt.to(model.device), options.generate
    )
    numbers = np.arange(first, first + len(group))
    writer.add_requests([request.text for request in group])
    for selection in recorder.take("encoder"):
        real = mask.numpy().astype(bool)
        writer.append("encoder", table_of(selection, encoder.numpy(), real, numbers, forward, Phase.ENCODER))
        forward += 1
    position = 0
    end = model.generation_config.eos_token_id  # what `generate` stops at: None, one id or several
    ended = np.zeros(len(group), bool)
    for selection in recorder.take("decoder"):
        width = selection.ids.shape[1]
        ids = decoded[:, position : position + width]
        phase = Phase.PREFILL if position == 0 else Phase.DECODE
        if phase is Phase.DECODE:
            ended |= np.isin(ids[:, 0], [] if end is None else end)  # the end is not worth a step to a server
        real = np.broadcast_to(~ended[:, None], ids.shape)
        writer.append("decoder", table_of(selection, ids, real, numbers, forward, phase, position))
        position += width
        forward += 1
    return forward


def _forward(model: Any, encoder: Tensor, mask: Tensor, prompt: Tensor, generate: int) -> NDArray[np.int64]:
    """Encoder and decoder passes; returns the decoder's token ids, [B, prompt + generated]."""
    with torch.inference_mode():
        if not generate:
            model(input_ids=encoder, attention_mask=mask, decoder_input_ids=prompt)
            return np.asarray(prompt.cpu().numpy())
        told = model.generate(
            input_ids=encoder,
            attention_mask=mask,
            decoder_input_ids=prompt,
            max_new_tokens=generate,
            do_sample=False,
            num_beams=1,
        )
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
    )
