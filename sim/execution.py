"""How the model is executed, whatever the policy: dtype, attention, micro-batches, how tokens are sent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from moesim.sim.profile import HardwareProfile
from moesim.traces import InputError

Contention = Literal["none", "pause", "share"]
"""What happens where copies of experts and all-to-alls are under way together (contention.py)."""
Send = Literal["per-expert", "per-gpu", "per-node"]
"""How often a token's hidden vector is sent: for each of its experts; once to each GPU that holds one of them; or once
to each node, whose GPU of the same number passes it on (DeepSeek-V3, arXiv 2412.19437, section 3.2.2)."""

COPY_BYTES = {"int8": 1 + 2 / 128, "int4": 0.5 + 2 / 128, "int2": 0.25 + 2 / 128}
"""Bytes of a weight that is copied in fewer bits; every 128 weights share a scale of two bytes."""


def copy_bytes(params: int, full_bytes: int, precision: str) -> int:
    """Bytes of a copy of an expert of `params` weights, `full_bytes` as it is, in one of residency.PRECISIONS."""
    return full_bytes if precision == "full" else round(params * COPY_BYTES[precision])


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Options of a simulated run."""

    dtype: str | None = None
    """Of weights and activations; None: as recorded."""
    contention: Contention = "none"
    tensor_parallel: int = 1
    """GPUs that share each attention and dense layer (they hold the same requests); 1: data-parallel attention."""
    micro_batches: int = 1
    """Parts of every step, by whole requests."""
    overlap: bool = True
    """Whether micro-batches are in flight together, one computing while another communicates (two-batch overlap), or
    follow each other."""
    send: Send = "per-expert"
    copy_dtype: str | None = None
    """Of copies of experts that the policy does not want in fewer bits itself: one of COPY_BYTES, not exact; None: as
    the weights."""

    def __post_init__(self) -> None:
        if self.contention not in get_args(Contention):
            raise InputError(f"unknown contention {self.contention!r}; known: {', '.join(get_args(Contention))}")
        if self.send not in get_args(Send):
            raise InputError(f"unknown way to send {self.send!r}; known: {', '.join(get_args(Send))}")
        if self.copy_dtype is not None and self.copy_dtype not in COPY_BYTES:
            raise InputError(f"unknown dtype of copies {self.copy_dtype!r}; known: {', '.join(COPY_BYTES)}")
        if self.tensor_parallel < 1 or self.micro_batches < 1:
            raise InputError("tensor_parallel and micro_batches must be at least 1")

    def check(self, gpus: int, profile: HardwareProfile) -> None:
        """Raise InputError where the GPUs cannot be grouped for tensor-parallel attention."""
        n = self.tensor_parallel
        if gpus % n or (n > 1 and profile.node_size % n):
            raise InputError(
                f"tensor-parallel attention over {n} GPUs: {n} must divide the {gpus} GPUs"
                + (f" and the {profile.node_size} of a node" if profile.node_size < gpus else "")
            )

    def lanes(self) -> int:
        """Micro-batches that are in flight together."""
        return self.micro_batches if self.overlap else 1

    def describe(self) -> dict[str, Any]:
        """For reports: what differs from the defaults, and the contention."""
        default = asdict(Execution())
        changed = {k: v for k, v in asdict(self).items() if v != default[k] and k != "dtype"}
        return {"contention": self.contention, **changed}
