"""What is asked of an offloading run, beside a job. Imports without torch, so that a wrong option is reported at
once."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.traces import InputError

PHASES = ("encoder", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """What is asked for beside a job."""

    resident: str
    """Slots a layer: a number, or a share of the experts such as 25%."""
    copy_dtype: str | None = None

    def slots(self, experts: int) -> int:
        """Slots a layer. Raises InputError where the text is neither a number nor a share, or is out of range."""
        text = self.resident.strip()
        try:
            found = round(float(text[:-1]) / 100 * experts) if text.endswith("%") else int(text)
        except ValueError:
            raise InputError(f"--resident is a number of slots or a share such as 25%, got {self.resident!r}") from None
        if not 1 <= found <= experts:
            raise InputError(
                f"--resident {self.resident} is {found} slots a layer; {experts} experts take 1 to {experts}"
            )
        return found
