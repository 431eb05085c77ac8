"""Things that break during a run: a GPU that dies or slows down, a link that degrades.

What has begun ends as it would have; what begins after the fault feels it. Of a GPU that dies everything is gone: the
experts that it held, copies from and to it. The requests that it held go on elsewhere, as if their hidden states and KV
cache had been saved, which is optimistic. Policies see which GPUs live and how much slower each is
(`Residency.alive_G`, `slowdown_G`), never what will fail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from moesim.sim.profile import HardwareProfile, Links
from moesim.traces import InputError

LINKS = ("p2p", "host", "all_to_all", "network", "storage")
FORMS = "gpu:3:dies@0.5, gpu:2:x0.5@0.1 (half as fast from 0.1 s on) or link:network:x0.25@1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """At `time_s` a GPU or a link begins to run at `factor` of its speed; 0: the GPU is dead."""

    what: Literal["gpu", "link"]
    where: str
    """The GPU's number, or a field of `Links`."""
    factor: float
    time_s: float

    def text(self) -> str:
        """As `parse_fault` reads it."""
        how = "dies" if self.factor == 0 else f"x{self.factor:g}"
        return f"{self.what}:{self.where}:{how}@{self.time_s:g}"

    def degraded(self, links: Links) -> Links:
        """The links with this one slower; latency stays, unless the link has a measured curve, which is slowed
        whole."""
        link = getattr(links, self.where)
        curve = getattr(link, "curve", None)
        if curve is not None:
            curve = replace(curve, seconds=tuple(seconds / self.factor for seconds in curve.seconds))
        slower = replace(link, bytes_per_s=link.bytes_per_s * self.factor, curve=curve)
        return replace(links, **{self.where: slower})

    def applied(self, profile: HardwareProfile, links: Links) -> HardwareProfile:
        """The profile with other links."""
        return replace(profile, links=links)


def parse_fault(text: str) -> Fault:
    """A fault as people write it. Raises InputError naming the forms."""
    head, _, at = text.partition("@")
    parts = head.split(":")
    try:
        what, where, how = parts
        time_s = float(at)
        factor = 0.0 if how == "dies" else float(how.removeprefix("x"))
        if what not in ("gpu", "link") or not (how == "dies" or how.startswith("x")):
            raise ValueError
    except ValueError:
        raise InputError(f"fault {text!r} is not of the form {FORMS}") from None
    if not (math.isfinite(time_s) and time_s >= 0):
        raise InputError(f"fault {text!r}: the time must be seconds, not negative")
    if not (math.isfinite(factor) and (0 < factor <= 1 or how == "dies")):
        raise InputError(f"fault {text!r}: the speed must lie in (0, 1]; a GPU that stops altogether 'dies'")
    if what == "link" and (where not in LINKS or how == "dies"):
        raise InputError(f"fault {text!r}: links are {', '.join(LINKS)}, and they slow down (x0.5), they do not die")
    if what == "gpu" and not where.isdecimal():
        raise InputError(f"fault {text!r}: {where!r} is not the number of a GPU")
    return Fault(what=cast("Literal['gpu', 'link']", what), where=where, factor=factor, time_s=time_s)


def check_faults(faults: Sequence[Fault], gpus: int, profile: HardwareProfile) -> None:
    """Raise InputError for GPUs or links that are not there, and where nothing would be left."""
    for fault in faults:
        if fault.what == "gpu" and int(fault.where) >= gpus:
            raise InputError(f"fault {fault.text()}: there are GPUs 0 to {gpus - 1}")
        if fault.what == "link" and getattr(profile.links, fault.where) is None:
            raise InputError(f"fault {fault.text()}: profile {profile.name} has no such link")
    if len({fault.where for fault in faults if fault.what == "gpu" and fault.factor == 0}) == gpus:
        raise InputError("all GPUs die: at least one must live")
