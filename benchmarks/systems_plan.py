"""What benchmarks/systems.py runs, and what the papers claim about it. Knows nothing about how it is run.

A claim is an ordering: one policy is faster than another (or needs fewer bytes) in a case that resembles the paper's.
Figures are not expected to come out: models, devices and workloads differ. Facts of the papers: docs/systems.md names
the source of each.
"""

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
    "diff-moe", "expertflow", "prefetch-layer", "prefetch-ridge", "belady", "oracle-prefetch",
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
        policies=tuple(name for name in OFFLOADING if name not in ("diff-moe", "expertflow")),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`faster` beats `slower` in each of `cases`, by simulated time."""

    system: str
    reports: str
    faster: str
    slower: str
    cases: tuple[str, ...]


EP = ("esft-64", "esft-1024", "switch-128-like", "switch-mini", "switch-mini-8192")
MINI = ("switch-mini", "switch-mini-8192")
LONG = ("esft-64", "esft-stream-1024", *MINI)
"""Cases of more steps than EPLB's interval."""
OFF = ("esft-offload", "mini-offload")

CLAIMS = (
    Claim(
        system="Predictive replication (arXiv 2605.11537)",
        reports="up to 3x lower latency on Switch-base-128 on one A100, 90-95% of the quality",
        faster="predictive-replication",
        slower="contiguous",
        cases=MINI,
    ),
    Claim(
        system="PROBE (arXiv 2602.00509)",
        reports="prefill up to 1.32x over static expert parallelism; imbalance 2.13 to 1.09",
        faster="probe",
        slower="contiguous",
        cases=MINI,
    ),
    Claim(
        system="PROBE, its frozen gates only",
        reports="a trained correction raises top-k accuracy from 70-80% to 87-94%",
        faster="probe",
        slower="probe-gate",
        cases=MINI,
    ),
    Claim(
        system="PROBE (arXiv 2602.00509)",
        reports="decode up to 1.26x over EPLB",
        faster="probe",
        slower="eplb",
        cases=MINI,
    ),
    Claim(
        system="EPLB (DeepSeek)",
        reports="1.49x prefill, 2.54x decode over none in a deployment on 96 GPUs",
        faster="eplb",
        slower="contiguous",
        cases=LONG,
    ),
    Claim(
        system="LPLB (DeepSeek)",
        reports="an optimal split of each batch over EPLB's replicas",
        faster="lplb",
        slower="eplb",
        cases=LONG,
    ),
    Claim(
        system="eplb-incremental (ours)",
        reports="(this project) few copies that each pay beat a new layout",
        faster="eplb-incremental",
        slower="lplb",
        cases=LONG,
    ),
    Claim(
        system="MoE-GPS",
        reports="the exact forecast wins at high skew or on slow links",
        faster="moe-gps-token",
        slower="moe-gps-distribution",
        cases=MINI,
    ),
    Claim(
        system="Lina (ATC'23)",
        reports="1.45x median, 1.63x 95th percentile over none",
        faster="lina",
        slower="contiguous",
        cases=EP,
    ),
    Claim(
        system="Libra",
        reports="up to +19.2% on 8xH200",
        faster="libra",
        slower="contiguous",
        cases=MINI,
    ),
    Claim(
        system="FasterMoE, FlexMoE, Prophet",
        reports="shadowing hot experts speeds training up",
        faster="fastermoe",
        slower="contiguous",
        cases=EP,
    ),
    Claim(
        system="ExFlow, MoETuner",
        reports="67% less routing across GPUs, 9-17% end to end",
        faster="moetuner",
        slower="contiguous",
        cases=EP,
    ),
    Claim(
        system="hedged, weighed (ours)",
        reports="(this project) better than what plans from history",
        faster="weighed",
        slower="eplb",
        cases=LONG,
    ),
    Claim(
        system="SP-MoE (arXiv 2510.10302)",
        reports="1.07-3.5x time per output token over offloading baselines",
        faster="sp-moe",
        slower="on-demand",
        cases=("mini-offload",),
    ),
    Claim(
        system="HOBBIT (arXiv 2411.01433)",
        reports="prefetching alone about 1.01x",
        faster="hobbit-exact",
        slower="on-demand",
        cases=("mini-offload",),
    ),
    Claim(
        system="Fate (arXiv 2502.12224)",
        reports="up to 4.1x in decode over loading on demand, in int4",
        faster="fate",
        slower="on-demand",
        cases=("mini-offload",),
    ),
    Claim(
        system="Pre-gated MoE",
        reports="81% of all-resident throughput with 23% of the memory",
        faster="pre-gated",
        slower="on-demand",
        cases=("mini-offload",),
    ),
    Claim(
        system="MoE-Infinity",
        reports="3.1-16.7x latency over offloading baselines",
        faster="moe-infinity",
        slower="on-demand",
        cases=OFF,
    ),
    Claim(
        system="Diff-MoE (SC'25)",
        reports="1.55x over MoE-Infinity, Switch-base on H200",
        faster="diff-moe",
        slower="moe-infinity",
        cases=("mini-offload",),
    ),
    Claim(
        system="ExpertFlow",
        reports="91.9% hits on Switch-32",
        faster="expertflow",
        slower="on-demand",
        cases=("mini-offload",),
    ),
    Claim(
        system="Fiddler",
        reports="running a missing expert on the CPU beats moving it at few tokens",
        faster="fiddler",
        slower="on-demand",
        cases=OFF,
    ),
    Claim(
        system="LRU, LFU, ARC, Belady",
        reports="Belady bounds every cache",
        faster="belady",
        slower="arc",
        cases=OFF,
    ),
)
