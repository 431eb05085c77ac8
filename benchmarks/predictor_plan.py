"""Which studies of predictors benchmarks/predictors.py runs: recordings, batches, splits, numbers of steps.

Knows nothing about how they are run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moesim.predictors import PREDICTORS
from moesim.traces import Phase, Workload
from moesim.traces.workload import EACH_DATASET

GPUS = 8
EXTRA_SLOTS = (1, 2)
TASKS = ("intent", "law", "summary", "translation")
OURS = ("gate-attention", "ridge", "ridge-online")
"""Those of our own that are shown by layer."""
SMALL_BATCH, BATCH, LARGE_BATCH = 64, 256, 1024

MINI_STEPS, DATASET_STEPS = 16, 8
ESFT_STEPS = 16
DECODE_STEPS, IN_FLIGHT = 100, 8
CROSS_STEPS = 8
STREAM_STEPS = 60
HORIZONS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One recording, fitted and scored in one way."""

    label: str
    group: str
    """Tasks of one group are averaged."""
    trace: str
    workload: Workload
    max_steps: int
    fit_on: tuple[str, ...] = ()
    horizons: tuple[int, ...] = HORIZONS

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on."""
        how = {"trace": self.trace, "fit_on": list(self.fit_on), **self.workload.describe()}
        return {"label": self.label, "group": self.group, "max_steps": self.max_steps, **how} | {
            "horizons": list(self.horizons)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Tasks that belong together."""

    name: str
    title: str
    source: str
    """mini or esft."""
    phase: Phase
    tasks: tuple[Task, ...]
    names: tuple[str, ...] = tuple(PREDICTORS)
    """Those that are not registered or not able are left out."""
    frozen: bool = False
    """Predictors that adapt are scored a second time, kept from it."""
    stream: bool = False
    """Recall step by step instead of scores."""


def chunks(tokens: int) -> Workload:
    return Workload(batch=tokens, chunked=True, split="alternate")


def mini_studies() -> list[Study]:
    """The shipped model."""
    own = Workload(batch=LARGE_BATCH)
    texts = replace(own, split=EACH_DATASET)
    adapting = ("frequency", "token-table", "markov", "window", "ema", "gate-mlp", "gate-mlp-online", *OURS)
    unseen = "a kind of text that was not fitted on"
    return [
        _mini("mini-encoder", "encoder", own, MINI_STEPS),
        _mini("mini-dataset", f"encoder, {unseen}", texts, DATASET_STEPS),
        _mini("mini-decoder", "decoder (prefill)", own, MINI_STEPS, phase=Phase.PREFILL),
        _mini(
            "mini-adapting",
            f"encoder, adapting to {unseen}",
            replace(texts, batch=BATCH),
            STREAM_STEPS,
            names=adapting,
            stream=True,
        ),
    ]


def _mini(
    name: str,
    title: str,
    workload: Workload,
    steps: int,
    *,
    phase: Phase = Phase.ENCODER,
    names: tuple[str, ...] = tuple(PREDICTORS),
    stream: bool = False,
) -> Study:
    group = "stream" if stream else f"{workload.batch:,} tokens"
    task = Task(label=workload.split, group=group, trace="mini", workload=workload, max_steps=steps)
    return Study(
        name=name,
        title=f"switch-mini, {title}",
        source="mini",
        phase=phase,
        tasks=(task,),
        names=names,
        stream=stream,
    )


def esft_studies() -> list[Study]:
    """DeepSeek-V2-Lite on the four ESFT tasks."""
    pairs = [(a, b) for a in TASKS for b in TASKS if a != b]
    ring = list(zip(TASKS, (*TASKS[1:], TASKS[0]), strict=True))  # learning from every step takes minutes a pair
    scored = [(BATCH, HORIZONS), (SMALL_BATCH, (1,)), (LARGE_BATCH, (1,))]
    return [
        Study(
            name="esft",
            title="DeepSeek-V2-Lite, prefill of four tasks, fitted on all four",
            source="esft",
            phase=Phase.PREFILL,
            tasks=tuple(_joint(name, tokens, horizons) for tokens, horizons in scored for name in TASKS),
        ),
        Study(
            name="esft-decode",
            title="DeepSeek-V2-Lite, the same tokens one by one as in decode",
            source="esft",
            phase=Phase.DECODE,
            tasks=tuple(_decoding(name) for name in TASKS),
            names=("frequency", "previous-token", "markov", "ridge", "gru"),
        ),
        _between("esft-cross", "DeepSeek-V2-Lite, fitted on one task and scored on another", pairs),
        _between("esft-adapting", "DeepSeek-V2-Lite, adapting to a task that was not fitted on", ring),
    ]


def _joint(name: str, tokens: int, horizons: tuple[int, ...]) -> Task:
    return Task(
        label=f"{name}, {tokens:,}",
        group=f"{tokens:,} tokens",
        trace=name,
        workload=chunks(tokens),
        max_steps=ESFT_STEPS,
        fit_on=TASKS,
        horizons=horizons,
    )


def _decoding(name: str) -> Task:
    return Task(
        label=name,
        group=f"{IN_FLIGHT} requests in flight",
        trace=f"{name}-decode",
        workload=Workload(batch=IN_FLIGHT, unit="requests", split="alternate"),
        max_steps=DECODE_STEPS,
        fit_on=tuple(f"{other}-decode" for other in TASKS),
        horizons=(1,),
    )


def _between(name: str, title: str, pairs: list[tuple[str, str]]) -> Study:
    """Fitted on one task, run on another: scored, or followed step by step."""
    stream = name.endswith("adapting")
    tasks = [
        Task(
            label=f"{a} to {b}",
            group="stream" if stream else f"{BATCH:,} tokens",
            trace=b,
            workload=chunks(SMALL_BATCH if stream else BATCH),
            max_steps=STREAM_STEPS if stream else CROSS_STEPS,
            fit_on=(a,),
            horizons=(1,),
        )
        for a, b in pairs
    ]
    names = ("frequency", "window", *(("ema",) if stream else ()), "markov", *OURS, "neighbours-online")
    return Study(
        name=name,
        title=title,
        source="esft",
        phase=Phase.PREFILL,
        tasks=tuple(tasks),
        names=names,
        frozen=True,
        stream=stream,
    )


def quickened(study: Study) -> Study:
    """The same in few steps, and of many tasks a few: two pairs, and one task of each size of a batch."""
    few = tuple(replace(task, max_steps=min(task.max_steps, 6 if study.stream else 2)) for task in study.tasks)
    pairs = study.source == "esft" and len(few[0].fit_on) == 1
    return replace(study, tasks=few[:: 6 if pairs else 5])
