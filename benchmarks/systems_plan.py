"""What benchmarks/systems.py runs (what papers claim: systems_claims.py). Knows nothing about how it is run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from moesim.sim.execution import Execution
from moesim.sim.policies import default_baseline
from moesim.traces import Phase, Workload

TASKS = ("intent", "law", "summary", "translation")

TRACES: dict[str, list[str]] = {
    **{
        name: ["trace", "import", f"{{esft}}/{name}.npz", "--experts", "64", "--phase", "prefill"] for name in TASKS
    },
    **{
        f"{name}-decode": ["trace", "import", f"{{esft}}/{name}.npz", "--experts", "64", "--phase", "decode"]
        for name in TASKS
    },
    "esft-stream": ["trace", "concat", *(f"{{runs}}/{name}.moetrace" for name in TASKS)],
    "switch-mini": [
        "record", "--model", "{root}/models/switch-mini", "--text", "{root}/models/switch-mini/samples",
        "--router-input", "--lookahead", "3",
    ],
    "switch-128-like": [
        "trace", "synth", "--experts", "128", "--layers", "6", "--top-k", "1", "--requests", "512",
        "--request-tokens", "128", "--skew", "14.75", "--window-tokens", "4096", "--coupling", "0.5",
        "--overlap", "0.3", "--domains", "2", "--domain-shift", "0.3", "--shapes", "switch-base",
    ],
}  # fmt: skip
"""Recording to the command of moesim that makes it."""

PARALLEL = (
    "contiguous", "balanced", "exflow", "moetuner", "fastermoe", "eplb", "eplb-hierarchical", "lplb",
    "eplb-incremental",
    "moe-gps-distribution", "moe-gps-token", "lina", "libra", "probe-gate", "probe", "predictive-replication",
    "hedged", "weighed", "oracle", "oracle-weighed",
)  # fmt: skip
HISTORY = ("eplb", "eplb-hierarchical", "lplb", "eplb-incremental")
"""They plan every eight steps from the loads of the steps before."""
OFFLOADING = (
    "on-demand", "lfu", "arc", "fiddler", "moe-infinity", "pre-gated", "hobbit-exact", "hobbit", "fate", "sp-moe",
    "diff-moe", "expertflow", "sida", "prefetch-layer", "prefetch-ridge", "belady", "oracle-prefetch",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Policies on recordings under one setting; what a recording cannot feed is said to be missing."""

    name: str
    title: str
    traces: tuple[str, ...]
    phase: Phase
    workload: Workload
    policies: tuple[str, ...]
    profile: str
    gpus: int
    max_steps: int
    shapes: str | None = None
    extra_slots: int = 1
    resident: int | None = None
    execution: Execution = field(default_factory=lambda: Execution(dtype="bfloat16"))

    @property
    def baseline(self) -> str:
        """What speedups refer to."""
        return default_baseline(self.resident)

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {
            "title": self.title,
            "traces": list(self.traces),
            "phase": self.phase.name.lower(),
            **self.workload.describe(),
            "profile": self.profile,
            "gpus": self.gpus,
            "shapes": self.shapes,
            "extra_slots": self.extra_slots,
            "resident": self.resident,
            **self.execution.describe(),
        }


def _esft(tokens: int, steps: int) -> Case:
    return Case(
        name=f"esft-{tokens}",
        title=f"DeepSeek-V2-Lite, prefill of four tasks, {tokens:,} tokens a step",
        traces=TASKS,
        phase=Phase.PREFILL,
        workload=Workload(batch=tokens, chunked=True, split="alternate"),
        policies=PARALLEL,
        profile="8xH100-NVLink",
        gpus=8,
        max_steps=steps,
        shapes="deepseek-v2-lite",
    )


CASES = (
    _esft(64, 24),
    _esft(1024, 8),
    replace(
        _esft(1024, 24),
        name="esft-stream-1024",
        title="the same four tasks one after the other, so that there are steps enough for plans from history",
        traces=("esft-stream",),
        policies=("contiguous", "balanced", "moetuner", *HISTORY, "hedged", "weighed", "oracle", "oracle-weighed"),
    ),
    Case(
        name="switch-128-like",
        title="made-up routing with the skew of Switch-base-128's encoder, 4,096 tokens a step",
        traces=("switch-128-like",),
        phase=Phase.PREFILL,
        workload=Workload(batch=4096),
        policies=PARALLEL,
        profile="8xH100-NVLink",
        gpus=8,
        max_steps=8,
        shapes="switch-base",
    ),
    Case(
        name="switch-mini",
        title="the shipped model's encoder at Switch-base's widths, 1,024 tokens a step",
        traces=("switch-mini",),
        phase=Phase.ENCODER,
        workload=Workload(batch=1024),
        policies=PARALLEL,
        profile="8xA100-NVLink",
        gpus=8,
        max_steps=16,
        shapes="switch-base",
    ),
    Case(
        name="switch-mini-8192",
        title="the same in large batches, 8,192 tokens a step, where tokens weigh more than weights",
        traces=("switch-mini",),
        phase=Phase.ENCODER,
        workload=Workload(batch=8192),
        policies=PARALLEL,
        profile="8xA100-NVLink",
        gpus=8,
        max_steps=12,
        shapes="switch-base",
    ),
    Case(
        name="esft-offload",
        title="DeepSeek-V2-Lite, the tokens one by one as in decode, 16 of 64 experts resident",
        traces=("law-decode",),
        phase=Phase.DECODE,
        workload=Workload(batch=1, unit="requests", split="alternate"),
        policies=tuple(name for name in OFFLOADING if name not in ("diff-moe", "expertflow", "sida")),
        profile="1xRTX4090-PCIe",
        gpus=1,
        max_steps=80,
        shapes="deepseek-v2-lite",
        resident=16,
    ),
    Case(
        name="mini-offload",
        title="the shipped model's encoder at Switch-base's widths, 8 of 32 experts resident, one request a step",
        traces=("switch-mini",),
        phase=Phase.ENCODER,
        workload=Workload(batch=1, unit="requests"),
        policies=OFFLOADING,
        profile="1xRTX4090-PCIe",
        gpus=1,
        max_steps=60,
        shapes="switch-base",
        resident=8,
    ),
)
