"""What the papers claim about the policies that benchmarks/systems.py runs.

A claim is an ordering: one policy is faster than another (or needs fewer bytes) in a case that resembles the paper's.
Figures are not expected to come out: models, devices and workloads differ. Facts of the papers: docs/systems.md names
the source of each.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        system="SiDA-MoE (arXiv 2310.18859)",
        reports="1.3-3.9x throughput over baselines on Switch-base-128 and 256, SST2 93.6 to 87.0",
        faster="sida",
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
