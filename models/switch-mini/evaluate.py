"""Measure an exported model: its loss per kind of text and what its routers do with held-out text.

The numbers go into evaluation.json, and as tables between two marks into the model card beside it, so that no
figure of the card is typed by hand. The weights are those of the file (bfloat16), the arithmetic is float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import CorpusError, Split, Tokens, encoder_decoder_ids, load_tokenizer
from sources import KINDS
from switch import Routed, recording, routers, use_sorted_experts
from tokenizers import Tokenizer
from torch import Tensor
from transformers import SwitchTransformersForConditionalGeneration

EXAMPLE = 256  # tokens of an example as in training: half for the encoder, half for the decoder
WINDOW = 512  # tokens that each half of the model routes in one window of the load tables
LOSS_EXAMPLES = 300
BATCH = 8
SPECIAL_TOKENS = 3
SPLITS = ("train", "heldout")
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
Json = dict[str, Any]


def spread(rows: Tokens, most: int) -> Tokens:
    """At most so many rows, evenly spaced, so that a cap does not favour one document."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def bytes_per_token(tokenizer: Tokenizer) -> Tensor:
    """How many bytes of text each token stands for: the length of its byte-level name, none if special."""
    names = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    return torch.tensor([0 if i < SPECIAL_TOKENS else len(name) for i, name in enumerate(names)])


def forward(model: Any, rows: Tokens) -> Iterator[tuple[Tensor, Tensor, dict[str, Routed]]]:
    """Logits, labels and routing by batch; the encoder reads a row's first half, the second is predicted."""
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        source, target, labels = encoder_decoder_ids(part, part.shape[1] // 2)
        with torch.inference_mode(), recording(model) as seen:
            logits = model(input_ids=source, decoder_input_ids=target).logits
        yield logits, labels, seen


def measure_loss(model: Any, rows: Tokens, sizes: Tensor) -> Json:
    """Cross-entropy of the continuation a token and a byte, and the tokens that found their expert full."""
    nats = tokens = size = dropped = routed_tokens = 0.0
    for logits, labels, seen in forward(model, rows):
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        nats += losses.item()
        tokens += labels.numel()
        size += sizes[labels].sum().item()
        for routed in seen.values():
            routed_tokens += routed.expert.numel()
            dropped += routed.expert.numel() - routed.kept.sum().item()
    return {
        "examples": len(rows),
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "dropped_share": dropped / routed_tokens,
    }


def route(model: Any, rows: Tokens) -> tuple[Tensor, Tensor]:
    """Chosen expert (layers, windows, tokens) and how many tokens of each layer and window were dropped."""
    experts, dropped = [], []
    for _, _, seen in forward(model, rows):
        experts.append(torch.stack([routed.expert for routed in seen.values()]))
        dropped.append(torch.stack([WINDOW - routed.kept.sum((1, 2)) for routed in seen.values()]))
    return torch.cat(experts, dim=1), torch.cat(dropped, dim=1)


def load_numbers(choice: Tensor, dropped: Tensor, experts: int) -> Json:
    """One layer's load: (windows, tokens) of chosen experts in, the figures of the card out."""
    counts = torch.nn.functional.one_hot(choice, experts).sum(1).float()
    skew = counts.amax(1) / counts.mean(1)
    total = counts.sum(0)
    share = total / total.sum()
    top = share.topk(3)
    return {
        "window_skew_mean": skew.mean().item(),
        "window_skew_max": skew.max().item(),
        "whole_skew": (total.max() / total.mean()).item(),
        "active_in_window_mean": (counts > 0).sum(1).float().mean().item(),
        "active_experts": int((total > 0).sum()),
        "experts_for_half": int((share.sort(descending=True).values.cumsum(0) < 0.5).sum()) + 1,
        "top": [[int(i), round(s.item(), 3)] for i, s in zip(top.indices, top.values, strict=True)],
        "dropped_share": (dropped.sum() / choice.numel()).item(),
        "share": [round(s, 5) for s in share.tolist()],
    }


def kind_distance(shares: list[Tensor]) -> float:
    """How differently the kinds load one layer, 0 the same to 1 no expert in common, mean over pairs."""
    pairs = [(a, b) for i, a in enumerate(shares) for b in shares[i + 1 :]]
    return sum(0.5 * (a - b).abs().sum().item() for a, b in pairs) / len(pairs)


def next_layer(choices: list[Tensor], layer: int, experts: int, guesses: int = 4) -> Json:
    """How well a token's next expert follows from its present one: learnt on even windows, tried on odd."""
    pairs = torch.zeros(experts, experts)
    for choice in choices:
        here, after = choice[layer, ::2].flatten(), choice[layer + 1, ::2].flatten()
        pairs += torch.bincount(here * experts + after, minlength=experts * experts).view(experts, experts)
    here = torch.cat([choice[layer, 1::2].flatten() for choice in choices])
    after = torch.cat([choice[layer + 1, 1::2].flatten() for choice in choices])

    def hits(ranked: Tensor, count: int) -> float:
        return (ranked[:, :count] == after[:, None]).any(1).float().mean().item()

    known = pairs.argsort(dim=1, descending=True)[here]
    blind = pairs.sum(0).argsort(descending=True).expand(len(here), -1)
    return {"top1": hits(known, 1), f"top{guesses}": hits(known, guesses), "blind_top1": hits(blind, 1)}


def measure_load(model: Any, rows: dict[str, Tokens]) -> Json:
    """Load of every layer by kind, distance between the kinds, predictability from layer to layer."""
    names = [name for name, _ in routers(model)]
    experts = model.config.num_experts
    routed = {kind: route(model, windows) for kind, windows in rows.items()}
    choices = [choice for choice, _ in routed.values()]
    layers: Json = {}
    for index, name in enumerate(names):
        by_kind = {k: load_numbers(c[index], dropped[index], experts) for k, (c, dropped) in routed.items()}
        layers[name] = {
            "kinds": by_kind,
            "kind_distance": kind_distance([torch.tensor(numbers["share"]) for numbers in by_kind.values()]),
        }
        if index + 1 < len(names) and names[index + 1].split(".")[0] == name.split(".")[0]:
            layers[name]["next_layer"] = next_layer(choices, index, experts)
    return {"windows": {kind: len(windows) for kind, windows in rows.items()}, "layers": layers}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def training_table(training: Json, counts: Json) -> str:
    plan, versions = training["plan"], training["versions"]
    facts = {
        "seed": plan["seed"],
        "steps": f"{training['step']} of {plan['steps']}",
        "examples a step, tokens an example": f"{plan['batch']} x {plan['length']}, every fourth step "
        f"{plan['batch'] // 2} x {2 * plan['length']}",
        "tokens seen": f"{training['tokens'] / 1e6:.1f} million",
        "time": f"{training['seconds'] / 60:.0f} minutes on {training['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    rows = [[name, str(value)] for name, value in facts.items()]
    kinds = [
        [kind, *(f"{n[f'{split}_bytes'] / 1e6:.2f} MB, {n[f'{split}_documents']}" for split in SPLITS)]
        for kind, n in counts.items()
    ]
    head = ["kind", "training text, documents", "held-out text, documents"]
    return table(["training", ""], rows) + "\n" + table(head, kinds)


def loss_table(loss: Json) -> str:
    def cells(numbers: Json) -> list[str]:
        return [f"{numbers['nats_per_token']:.3f}", f"{numbers['bits_per_byte']:.3f}"]

    rows = [
        [kind, *cells(n["train"]), *cells(n["heldout"]), f"{n['heldout']['dropped_share']:.2%}"]
        for kind, n in loss.items()
    ]
    train, heldout = ([f"{split} nats/token", "bits/byte"] for split in ("train", "held-out"))
    head = ["kind", *train, *heldout, "dropped"]
    return table(head, rows)


def load_table(load: Json, cell: Callable[[Json], str]) -> str:
    """One table with a row a layer and a column a kind."""
    rows = [[name, *(cell(layer["kinds"][kind]) for kind in KINDS)] for name, layer in load["layers"].items()]
    return table(["layer", *KINDS], rows)


def whole_cell(n: Json) -> str:
    used = f"{n['active_in_window_mean']:.0f} of {n['active_experts']}"
    return f"{n['whole_skew']:.1f}; {used}; {n['experts_for_half']}"


def layer_table(load: Json) -> str:
    rows = []
    for name, layer in load["layers"].items():
        ahead = layer.get("next_layer")
        guesses = [f"{ahead[key]:.0%}" for key in ("blind_top1", "top1", "top4")] if ahead else ["-"] * 3
        rows.append([name, f"{layer['kind_distance']:.2f}", *guesses])
    return table(["layer", "distance between kinds", "next expert, blind", "next expert", "among 4"], rows)


def tables(result: Json) -> str:
    """Everything measured, as the card shows it."""
    load = result["load"]
    windows = ", ".join(f"{count} {kind}" for kind, count in load["windows"].items())
    parts = [
        "### Training\n\n" + training_table(result["training"], result["text"]),
        f"### Loss\n\nOver the last {EXAMPLE // 2} tokens of examples of {EXAMPLE}; dropped: share of routed "
        "tokens that found their expert full, on held-out text.\n\n" + loss_table(result["loss"]),
        f"### Expert load on held-out text\n\nEncoder and decoder each route {WINDOW} tokens a window "
        f"({windows} windows). Fullest expert over the mean of all {result['experts']}, averaged over "
        "windows (largest window in brackets):\n\n"
        + load_table(load, lambda n: f"{n['window_skew_mean']:.1f} ({n['window_skew_max']:.1f})"),
        "Fullest expert over the mean, all windows together; experts used in one window on average, and in "
        "all; experts that take half of the tokens:\n\n" + load_table(load, whole_cell),
        "The three fullest experts and their shares:\n\n"
        + load_table(load, lambda n: ", ".join(f"{i}: {s:.0%}" for i, s in n["top"])),
        f"Tokens dropped in windows of {WINDOW} (capacity {result['capacity']} a sequence):\n\n"
        + load_table(load, lambda n: f"{n['dropped_share']:.1%}"),
        "Distance between the kinds' loads (0 the same, 1 no expert in common, mean over pairs) and how "
        "often a token's expert in the next layer is guessed: blindly (the most used one), from its expert "
        "here, and among the 4 likeliest from its expert here:\n\n" + layer_table(load),
    ]
    return "\n".join(parts)


def write_card(folder: Path, text: str) -> None:
    """Replace what stands between the marks of the card."""
    card = folder / "README.md"
    if not card.is_file():
        return
    old = card.read_text(encoding="utf-8")
    if MARKS[0] in old and MARKS[1] in old:
        before, after = old.split(MARKS[0])[0], old.split(MARKS[1])[1]
        card.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}", encoding="utf-8")


def evaluate(data: Path, folder: Path) -> None:
    """Measure the model in `folder` on the corpus in `data`; write evaluation.json and the card's tables."""
    if not (folder / "config.json").is_file() or not (data / "manifest.json").is_file():
        raise CorpusError(f"{folder} holds no exported model or {data} no corpus")
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    use_sorted_experts(model)
    tokenizer = load_tokenizer(folder)
    sizes = bytes_per_token(tokenizer)
    loss: Json = {}
    rows: dict[str, Tokens] = {}
    for kind in KINDS:
        splits = {name: Split.load(data, kind, name, tokenizer) for name in SPLITS}
        loss[kind] = {
            name: measure_loss(model, spread(split.windows(EXAMPLE), LOSS_EXAMPLES), sizes)
            for name, split in splits.items()
        }
        rows[kind] = spread(splits["heldout"].windows(2 * WINDOW), 64)
    result = {
        "training": json.loads((folder / "training.json").read_text(encoding="utf-8")),
        "text": json.loads((data / "manifest.json").read_text(encoding="utf-8"))["counts"],
        "experts": model.config.num_experts,
        "capacity": model.config.expert_capacity,
        "loss": loss,
        "load": measure_load(model, rows),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_card(folder, tables(result))
