"""Train switch-mini, or a smaller model of the same make, and write it in the model library's format.

    train.py tokenizer --data DIR --out FOLDER
    train.py train     --data DIR --tokenizer FOLDER --run RUN --steps 2800
    train.py export    --run RUN --tokenizer FOLDER --out FOLDER
    train.py evaluate  --data DIR --model FOLDER

`train` resumes from the checkpoint in RUN when there is one; Ctrl-C and --time-limit save one and stop. The
learning rate follows the step number, never the clock, so seed and steps alone decide the result.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from corpus import (
    CorpusError,
    Split,
    batch_for_step,
    encoder_decoder_ids,
    load_tokenizer,
    train_tokenizer,
)
from evaluate import evaluate
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from sources import KINDS
from switch import assert_equal_to_library, make_config, make_model, recording, router_losses
from torch import Tensor
from transformers import SwitchTransformersConfig

CHECKPOINT = "checkpoint.safetensors"
LEARNING_RATE = 4e-3
EMBEDDING_FACTOR = 4.0  # the embedding starts 11 times as large as the other matrices
WARMUP_STEPS = 150
CHECKPOINT_EVERY = 150
REPORT_EVERY = 25


class RunError(Exception):
    """The run folder or an option does not fit; the message is for the user."""


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step; relative to the peak."""
    factor = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))
    return factor * min(1.0, (step + 1) / WARMUP_STEPS)


def make_optimizer(model: Any) -> torch.optim.AdamW:
    embedding = [p for name, p in model.named_parameters() if name.startswith("shared.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("shared.")]
    groups = [
        {"params": rest, "factor": 1.0, "weight_decay": 0.01},
        {"params": embedding, "factor": EMBEDDING_FACTOR, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def save_checkpoint(run: Path, model: Any, optimizer: torch.optim.AdamW, facts: dict[str, Any]) -> None:
    """Weights, both moments and the step in one file, replaced at once: a crash leaves the older one."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    partial = run / (CHECKPOINT + ".partial")
    save_file(tensors, partial, {"facts": json.dumps(facts), "config": model.config.to_json_string()})
    partial.replace(run / CHECKPOINT)


def load_checkpoint(run: Path) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """The model of a checkpoint, its tensors by name and the run's facts."""
    path = run / CHECKPOINT
    if not path.is_file():
        raise RunError(f"{path} is missing; train first")
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dictionary
    model = make_model(SwitchTransformersConfig(**json.loads(metadata["config"])), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    return model, tensors, json.loads(metadata["facts"])


def restore_optimizer(optimizer: torch.optim.AdamW, model: Any, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        found = {key: tensors[f"{key}.{name}"].clone() for key in keys if f"{key}.{name}" in tensors}
        if found:
            optimizer.state[parameter] = found


class Trainer:
    """One run: the model, its optimizer, the text, and what has been reached so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.run: Path = options.run
        self.run.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(options.tokenizer)
        self.splits = [Split.load(options.data, kind, "train", tokenizer) for kind in KINDS]
        self.facts: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
        names = ("seed", "steps", "batch", "length")
        self.plan = {name: getattr(options, name) for name in names}
        if (self.run / CHECKPOINT).is_file():
            self.model, tensors, self.facts = load_checkpoint(self.run)
            self.check_plan()
            self.optimizer = make_optimizer(self.model)
            restore_optimizer(self.optimizer, self.model, tensors)
        else:
            vocab = tokenizer.get_vocab_size()
            config = make_config(vocab, options.d_model, options.d_ff, options.layers, options.experts)
            self.model = make_model(config, options.seed)
            self.optimizer = make_optimizer(self.model)
        self.facts |= {"plan": self.plan, "threads": options.threads}
        self.stopped = False

    def check_plan(self) -> None:
        """A resumed run keeps its plan. Raises RunError where it has another."""
        if (old := self.facts["plan"]) != self.plan:
            raise RunError(f"{self.run} holds step {self.facts['step']} of a run with other options: {old}")

    def check_experts(self) -> None:
        """Refuse to train through the faster experts unless they equal the library's on a real batch."""
        rows = batch_for_step(self.splits, self.options.seed, 0, len(KINDS), self.options.length)
        source, target, _ = encoder_decoder_ids(rows, self.options.length // 2)
        assert_equal_to_library(self.model, source, target)

    def step(self, number: int) -> dict[str, Any]:
        """One update; returns what the log wants to know."""
        factor = learning_rate(number, self.options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor * group["factor"]
        rows = batch_for_step(self.splits, self.options.seed, number, self.options.batch, self.options.length)
        source, target, labels = encoder_decoder_ids(rows, rows.shape[1] // 2)
        torch.manual_seed(self.options.seed * 1_000_003 + number)
        with recording(self.model) as seen:
            logits = self.model(input_ids=source, decoder_input_ids=target).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        balance, z_loss = router_losses(seen)
        config, layers = self.model.config, len(seen)
        extra = layers * (config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss)
        self.optimizer.zero_grad()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.facts["tokens"] += rows.size
        report = {"loss": loss.item(), "balance": balance.item(), "z": z_loss.item()}
        return report | (self.skew(seen) if number % REPORT_EVERY == 0 else {})

    def skew(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Per layer: the fullest expert over the mean, for all text and averaged over the kinds alone."""
        whole, alone = [], []
        for routed in seen.values():
            experts = routed.logits.shape[-1]
            parts = routed.expert.chunk(len(KINDS))
            counts = [torch.bincount(part.flatten(), minlength=experts).float() for part in parts]
            total = torch.stack(counts).sum(0)
            whole.append(round((total.max() / total.mean()).item(), 1))
            alone.append(round(sum((c.max() / c.mean()).item() for c in counts) / len(counts), 1))
        return {"skew": whole, "skew_by_kind": alone}

    def save(self) -> None:
        save_checkpoint(self.run, self.model, self.optimizer, self.facts)

    def stop(self, *_: object) -> None:
        """Finish the step in hand, then save and leave."""
        self.stopped = True

    def log(self, number: int, report: dict[str, Any]) -> None:
        line = {"step": number, "seconds": round(self.facts["seconds"], 1), **report}
        with (self.run / "log.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def train(self, console: Console) -> None:
        signal.signal(signal.SIGINT, self.stop)
        signal.signal(signal.SIGTERM, self.stop)
        self.check_experts()
        self.model.train()
        deadline = time.monotonic() + 60 * self.options.time_limit
        bar = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
        columns = (*bar, TextColumn("loss {task.fields[loss]:.3f}"))
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            first = self.facts["step"]
            task = progress.add_task("training", total=self.options.steps, completed=first, loss=float("nan"))
            for number in range(first, self.options.steps):
                began = time.monotonic()
                report = self.step(number)
                self.facts["step"] = number + 1
                self.facts["seconds"] += time.monotonic() - began
                progress.update(task, advance=1, loss=report["loss"])
                if number % REPORT_EVERY == 0:
                    self.log(number, report)
                if self.stopped or time.monotonic() > deadline:
                    break
                if (number + 1) % CHECKPOINT_EVERY == 0:
                    self.save()
        self.save()


def export(options: argparse.Namespace) -> None:
    """Write the weights in bfloat16 beside the tokenizer, with the run's facts for the model card."""
    model, _, facts = load_checkpoint(options.run)
    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    versions = {"torch": torch.__version__, "transformers": sys.modules["transformers"].__version__}
    facts |= {"versions": versions, "device": f"a CPU, {facts.get('threads', options.threads)} threads"}
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (options.tokenizer / name).resolve() != (options.out / name).resolve():
            shutil.copyfile(options.tokenizer / name, options.out / name)


def arguments() -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("command", choices=("tokenizer", "train", "export", "evaluate"))
    for name, meaning in {
        "data": "folder that fetch_data.py filled",
        "tokenizer": "folder with tokenizer.json",
        "run": "folder for checkpoints and the log",
        "out": "folder to write to",
        "model": "folder of an exported model",
    }.items():
        parser.add_argument(f"--{name}", type=Path, help=meaning)
    defaults = {"d_model": 128, "d_ff": 72, "layers": 4, "experts": 32, "vocab": 6000}
    defaults |= {"steps": 2800, "batch": 16, "length": 256, "seed": 1, "threads": 2}
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"default {default}")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="minutes until it saves and stops")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    needs = {"tokenizer": ("data", "out"), "train": ("data", "tokenizer", "run")}
    needs |= {"export": ("run", "tokenizer", "out"), "evaluate": ("data", "model")}
    try:
        missing = [name for name in needs[options.command] if getattr(options, name) is None]
        if missing:
            raise RunError(f"{options.command} needs --{' and --'.join(missing)}")
        if options.command == "tokenizer":
            train_tokenizer(options.data, options.out, options.vocab)
        elif options.command == "train":
            Trainer(options).train(Console(stderr=True))
        elif options.command == "export":
            export(options)
        else:
            evaluate(options.data, options.model)
    except (CorpusError, RunError, OSError) as error:
        sys.stderr.write(f"train: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
