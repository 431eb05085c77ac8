"""What is asked of an offloading run, beside a job. Imports without torch, so that a wrong option is reported at
once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moesim.traces import InputError

PHASES = ("encoder", "decode")
RESIDENT = "contiguous"
"""The policy that keeps every expert on the device, however many slots the others have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """What is asked for beside a job."""

    resident: str
    """Slots a layer: a number, or a share of the experts such as 25%."""
    copy_dtype: str | None = None

    def slots(self, experts: int) -> int:
        """Slots a layer; see `slots_of`."""
        return slots_of(self.resident, experts)


def slots_of(resident: str, experts: int) -> int:
    """Slots a layer. Raises InputError where the text is neither a number nor a share, or is out of range."""
    text = resident.strip()
    share = text.endswith("%")
    try:
        asked = float(text[:-1]) / 100 * experts if share else int(text)
    except ValueError:
        asked = math.nan
    if not math.isfinite(asked):
        raise InputError(f"--resident is a number of slots or a share such as 25%, got {resident!r}")
    found = round(asked)
    if found < 1 or asked > experts:
        is_slots = "more than all" if share and asked > experts else f"{found} slots a layer"
        raise InputError(f"--resident {resident} is {is_slots}; {experts} experts take 1 to {experts}")
    return found
