"""Hardware profiles: what the cost model knows of a node, read from and written to JSON.

A profile says how fast, never what runs. Rates are those of the data sheet or of the measurement; each has an
efficiency beside it (the share of it that a kernel reaches, 1 where the rate was measured). Measured curves go before
rates. Knows nothing about models.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moesim.sim.curves import Bools, ExpertCurve, MessageCurve
from moesim.sim.records import record
from moesim.traces import InputError

FORMAT, VERSION = "moesim-profile", 1
KINDS = ("spec-sheet", "measured")
EXECUTORS = ("ranks", "partitions", "offload")
"""What runs policies on devices, each with costs of its own."""
SHIPPED = Path(__file__).with_name("profiles")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the numbers come from."""

    kind: str
    """'spec-sheet' or 'measured'."""
    device: str
    date: str
    driver: str = ""
    sources: tuple[str, ...] = ()
    """Documents or measurements, in words."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library name to version, for measurements."""
    notes: str = ""
    executor: str = ""
    """Which of EXECUTORS was measured, where it was said."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.executor not in ("", *EXECUTORS):
            raise InputError(f"executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention and dense parts of one layer."""

    launch_s: float
    """Fixed overhead of one layer (all its kernels together)."""
    efficiency: float
    """Share of the matmul rate that attention and dense parts reach."""

    def __post_init__(self) -> None:
        _not_negative(self, "launch_s")
        _share(self, "efficiency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device; all devices of a profile are alike."""

    memory_bytes: int
    hbm_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]
    """Dense rate by dtype (float32, bfloat16, float16); a multiply-add is two FLOPs."""
    tile_rows: int
    """Rows that a matmul tile computes whether they are there or not; 1: no such steps (CPU)."""
    launch_s: float
    """Fixed overhead of one layer's expert phase."""
    expert_s: float
    """Further overhead for each distinct expert that has tokens: 0 for a grouped kernel, a Python loop has one."""
    attention: Attention
    matmul_efficiency: float = 1.0
    """Share of `matmul_flops_per_s` that the expert matmuls reach."""
    hbm_efficiency: float = 1.0
    expert_curves: tuple[ExpertCurve, ...] = ()
    """Measured expert phases, one curve for a shape and dtype; other experts are timed by the terms above."""
    shared_slowdown: float = 0.0
    """Of partitions, which share a memory: how much longer experts take while all compute than alone, as a share."""

    def __post_init__(self) -> None:
        _positive(self, "memory_bytes", "hbm_bytes_per_s", "tile_rows")
        _not_negative(self, "launch_s", "expert_s", "shared_slowdown")
        _share(self, "matmul_efficiency", "hbm_efficiency")
        if not self.matmul_flops_per_s:
            raise InputError("matmul_flops_per_s must name at least one dtype")
        for dtype, rate in self.matmul_flops_per_s.items():
            if not (_finite(rate) and rate > 0):
                raise InputError(f"matmul_flops_per_s.{dtype} must be a positive number, got {rate!r}")
        for i, curve in enumerate(self.expert_curves):
            # Beyond its points a curve goes on like the roofline, which needs the rate.
            if curve.dtype not in self.matmul_flops_per_s:
                raise InputError(f"expert_curves[{i}].dtype {curve.dtype} is not among matmul_flops_per_s")
            if curve.shape in [other.shape for other in self.expert_curves[:i]]:
                raise InputError(f"expert_curves[{i}] is a second curve for one shape and dtype")

    def matmul_rate(self, dtype: str) -> float:
        """FLOP/s of expert matmuls in `dtype`. Raises InputError naming the dtypes that the profile has."""
        return self._peak(dtype) * self.matmul_efficiency

    def attention_rate(self, dtype: str) -> float:
        """FLOP/s of attention and dense parts in `dtype`. Raises InputError as `matmul_rate`."""
        return self._peak(dtype) * self.attention.efficiency

    def _peak(self, dtype: str) -> float:
        if dtype not in self.matmul_flops_per_s:
            known = ", ".join(self.matmul_flops_per_s)
            raise InputError(f"the profile has no matmul rate for {dtype}; it has: {known} (choose one with --dtype)")
        return self.matmul_flops_per_s[dtype]

    @property
    def hbm_rate(self) -> float:
        """Bytes/s at which weights and KV cache are read."""
        return self.hbm_bytes_per_s * self.hbm_efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection of one GPU in one direction."""

    latency_s: float
    bytes_per_s: float
    efficiency: float = 1.0
    curve: MessageCurve | None = None
    """Measured messages; where there is a curve, latency, rate and efficiency are not used."""

    def __post_init__(self) -> None:
        _not_negative(self, "latency_s")
        _positive(self, "bytes_per_s")
        _share(self, "efficiency")

    def seconds(self, nbytes: Any) -> Any:
        """Time of one message of `nbytes` bytes (a number, or an array of them) that has the link to itself."""
        if self.curve is not None:
            return self.curve.seconds_at(nbytes)
        return self.latency_s + nbytes / (self.bytes_per_s * self.efficiency)

    def outside(self, nbytes: ArrayLike) -> Bools:
        """Which of these messages lie beyond the curve, in the shape of `nbytes`; none where there is no curve."""
        return np.zeros(np.shape(nbytes), np.bool_) if self.curve is None else self.curve.outside(nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLink:
    """The connection between host and GPUs (PCIe)."""

    latency_s: float
    bytes_per_s: float
    efficiency: float = 1.0
    shared_by: int = 1
    """How many neighbouring GPUs share one root: GPUs 0..n-1 the first, n..2n-1 the second."""
    curve: MessageCurve | None = None
    """As in `Link`."""

    def __post_init__(self) -> None:
        _not_negative(self, "latency_s")
        _positive(self, "bytes_per_s", "shared_by")
        _share(self, "efficiency")

    @property
    def link(self) -> Link:
        """The same without the sharing."""
        return Link(
            latency_s=self.latency_s, bytes_per_s=self.bytes_per_s, efficiency=self.efficiency, curve=self.curve
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The host of one node: memory that backs the GPUs', and cores that can run an expert."""

    memory_bytes: int
    bytes_per_s: float
    """Memory bandwidth that all cores together reach."""
    flops_per_s: float
    """Rate of an expert's matmuls on all cores, in the model's dtype."""

    def __post_init__(self) -> None:
        _positive(self, "memory_bytes", "bytes_per_s", "flops_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Connections inside a node, and between nodes."""

    p2p: Link | None
    """GPU to GPU, per GPU and direction; None: copies between GPUs go through the host link's root."""
    host: HostLink
    all_to_all: Link
    """Latency of one collective, and the bandwidth that each GPU reaches in it, per direction, inside a node."""
    network: Link | None = None
    """Between nodes (InfiniBand, RoCE): each GPU's own adapter, per direction; None in a single node."""
    storage: Link | None = None
    """From SSD to the host's memory, one queue a node; None: the host's memory holds everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """`gpus` equal GPUs in one node, or in several equal ones."""

    name: str
    provenance: Provenance
    gpus: int
    gpu: Gpu
    links: Links
    decide_s: dict[str, float] = field(default_factory=dict)
    """Policy name to measured seconds of one decision point (L + 1 a step: forecasts, planning, and from the second on
    the split of a layer). A policy that is missing is simulated as if it decided in no time, and reports say so."""
    gpus_per_node: int | None = None
    """GPUs 0..n-1 are the first node, and so on; None: all are in one."""
    cpu: Cpu | None = None
    """Each node's host; None: not known, its memory is taken to hold everything and it runs no experts."""

    def __post_init__(self) -> None:
        _positive(self, "gpus")
        if self.gpus_per_node is not None:
            _positive(self, "gpus_per_node")
        if self.gpus % self.node_size:
            raise InputError(f"gpus_per_node {self.node_size} does not divide {self.gpus} GPUs")
        if self.gpus > self.node_size and self.links.network is None:
            raise InputError(f"{self.gpus // self.node_size} nodes need links.network: how fast is it between them?")
        for policy, seconds in self.decide_s.items():
            if not (_finite(seconds) and seconds >= 0):
                raise InputError(f"decide_s.{policy} must be a number of seconds, not negative, got {seconds!r}")

    @property
    def node_size(self) -> int:
        """GPUs of one node."""
        return self.gpus if self.gpus_per_node is None else self.gpus_per_node

    def known_cpu(self) -> Cpu:
        """The host. Raises InputError where the profile does not describe it."""
        if self.cpu is None:
            raise InputError(
                f"profile {self.name} does not describe the host's CPU, so no expert can run there: add its field 'cpu'"
            )
        return self.cpu

    @property
    def measured(self) -> bool:
        """True where the numbers were measured, False where they were read off data sheets."""
        return self.provenance.kind == "measured"

    def check_gpus(self, gpus: int) -> None:
        """Raise InputError unless the node has that many GPUs."""
        if not 1 <= gpus <= self.gpus:
            raise InputError(f"profile {self.name} has {self.gpus} GPUs, {gpus} cannot be simulated on it")

    def save(self, path: Path) -> None:
        """Write the profile as JSON, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """Read a shipped profile by name, or any by path.

    Raises InputError in one line naming the file and the field, or the shipped names where there is no such profile.
    """
    path = Path(name_or_path)
    if str(name_or_path) in shipped_profiles():
        path = SHIPPED / f"{name_or_path}.json"
    elif not path.is_file():
        known = ", ".join(shipped_profiles())
        raise InputError(f"no profile {str(name_or_path)!r}: neither a file nor a shipped profile ({known})")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise InputError(f"{path}: not a hardware profile (field 'format' is not {FORMAT!r})")
    version = data.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise InputError(f"{path}: field 'version' is {version!r}, this moesim reads {VERSION}")
    try:
        return record(HardwareProfile, data, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _positive(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not (_finite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, got {value!r}")


def _not_negative(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not (_finite(value) and value >= 0):
            raise InputError(f"{name} must be a number, not negative, got {value!r}")


def _share(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not 0 < value <= 1:
            raise InputError(f"{name} must lie in (0, 1], got {value!r}")
