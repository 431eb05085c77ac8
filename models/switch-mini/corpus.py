"""Tokens of the corpus: the tokenizer, the encoded documents and the examples drawn from them.

An example never crosses a document's end, so held-out documents stay unseen. Which examples a training step
sees depends on the seed and the step's number alone: a run that was stopped and resumed is the same run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sources import KINDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
PAD_ID, EOS_ID = 0, 1
Tokens = npt.NDArray[np.int64]


class CorpusError(Exception):
    """The data folder lacks something; the message is for the user."""


def documents(data: Path, kind: str, split: str) -> list[str]:
    """The texts of one kind and split, as fetch_data.py wrote them."""
    path = data / f"{kind}.{split}.jsonl"
    if not path.is_file():
        raise CorpusError(f"{path} is missing; run fetch_data.py --data {data} first")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(data: Path, folder: Path, vocab_size: int, bytes_per_kind: int = 3_000_000) -> None:
    """Train a byte-level BPE on equal parts of each kind, so that none gets the vocabulary to itself."""

    def texts() -> Iterator[str]:
        for kind in KINDS:
            used = 0
            for text in documents(data, kind, "train"):
                if used < bytes_per_kind:
                    used += len(text.encode())
                    yield text

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    names = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    fast.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer alone, without the model library's wrapper."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CorpusError(f"{path} is missing; run train.py tokenizer first")
    return Tokenizer.from_file(str(path))


@dataclass(frozen=True)
class Split:
    """All documents of one kind and split, end to end, each closed by the end-of-text token."""

    tokens: Tokens
    starts: Tokens  # where each document begins; one entry more than there are documents

    @classmethod
    def load(cls, data: Path, kind: str, split: str, tokenizer: Tokenizer) -> Split:
        encodings = tokenizer.encode_batch(documents(data, kind, split), add_special_tokens=False)
        parts = [np.array([*encoding.ids, EOS_ID], dtype=np.int64) for encoding in encodings]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        return cls(np.concatenate(parts), starts.astype(np.int64))

    def draw(self, rng: np.random.Generator, count: int, length: int) -> Tokens:
        """Examples of consecutive tokens, each equally likely among all that fit into a document."""
        room = np.maximum(np.diff(self.starts) - length + 1, 0)
        ends = np.cumsum(room)
        picks = rng.integers(0, ends[-1], size=count)
        chosen = np.searchsorted(ends, picks, side="right")
        begins = self.starts[chosen] + picks - (ends[chosen] - room[chosen])
        rows: Tokens = self.tokens[begins[:, None] + np.arange(length)]
        return rows

    def windows(self, length: int) -> Tokens:
        """Every document cut into windows without overlap; what does not fill a window is left out."""
        rows = [
            self.tokens[begin : begin + length]
            for start, end in zip(self.starts[:-1], self.starts[1:], strict=True)
            for begin in range(start, end - length + 1, length)
        ]
        return np.stack(rows) if rows else np.empty((0, length), dtype=np.int64)


def encoder_decoder_ids(rows: Tokens, prefix: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefix for the encoder, its continuation as labels, and the labels shifted right for the decoder."""
    tokens = torch.from_numpy(rows)
    source, labels = tokens[:, :prefix], tokens[:, prefix:]
    start = torch.full_like(labels[:, :1], PAD_ID)
    return source, torch.cat([start, labels[:, :-1]], dim=1), labels


def batch_for_step(splits: list[Split], seed: int, step: int, batch: int, length: int) -> Tokens:
    """One step's examples, the kinds in equal parts; every fourth step has half as many, twice as long.

    The long ones keep windows of 512 tokens, which the simulator records, inside what was trained.
    """
    rng = np.random.default_rng([seed, step])
    long = step % 4 == 3
    count, size = (batch // 2, length * 2) if long else (batch, length)
    return np.concatenate([split.draw(rng, count // len(splits), size) for split in splits])
