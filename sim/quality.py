"""What a policy that changes what is computed costs in quality, as measured, beside what it gains in time.

`moesim quality` measures and writes; whoever prints a speedup asks `speedup_text` here, so that none of a lossy policy
is ever printed without its quality. Knows nothing about models or devices.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moesim.sim.policies import recipe
from moesim.sim.results import Result
from moesim.traces import InputError, MoesimError

FORMAT, VERSION = "moesim-quality", 2
NOT_MEASURED = "quality not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One policy against the exact model, on held-out requests."""

    policy: str
    policy_digest: str
    """Of its parts (policies/files.py): an edited file is another policy, whatever its name."""
    model_digest: str
    """Of the weights that were run, as traces have it."""
    phase: str
    """How the decoder was run: 'prefill' or 'decode'. The encoder was run before either."""
    resident: int | None
    copy_dtype: str | None
    loss: float
    """Nats a token of the model's own objective, and of the exact model on the same tokens."""
    exact_loss: float
    loss_error: float
    """Standard error, over requests, of the mean difference of the two."""
    top1_agreement: float
    """Share of the output tokens whose likeliest next token is the exact model's."""
    output_error: float
    """Size of the difference of the decoder's last hidden states over the size of the exact ones."""
    shares: dict[str, dict[str, list[float]]]
    """Stack to what became of its pairs, to the share in each layer (backend/tally.py)."""
    config: dict[str, Any]
    """Whatever else the numbers depend on: requests, batch, dtype, device, versions, seed."""

    def text(self) -> str:
        """In a table."""
        return (
            f"loss {self.exact_loss:.3f} {self.loss - self.exact_loss:+.3f}, top-1 {self.top1_agreement:.1%}, "
            f"error {self.output_error:.1%}"
        )

    def is_of(self, result: Result) -> bool:
        """Whether it was measured for what the result is about: policy, weights, slots, precision and phase."""
        c = result.config
        phases = ("prefill", "decode") if c.get("phase") == "encoder" else (c.get("phase"),)
        same = [c.get(name) for name in ("policy_digest", "model_digest", "resident", "copy_dtype")]
        return (
            self.policy == result.policy
            and bool(self.model_digest)
            and same == [self.policy_digest, self.model_digest, self.resident, self.copy_dtype]
            and (self.phase in phases or c.get("phase") == "prefill and decode")
        )


def is_lossy(result: Result) -> bool:
    """Whether what was computed, or would be, is not what the model computes: because the policy says so, or because
    pairs were rounded, skipped or substituted in this run."""
    totals = result.totals
    if totals.rounded_tokens or totals.skipped_tokens or totals.substituted_tokens:
        return True
    try:
        return recipe(result.policy).lossy
    except MoesimError:  # a policy of a file or function that is not here any more
        return False


def quality_of(result: Result, qualities: Sequence[Quality]) -> Quality | None:
    """The first that fits."""
    return next((quality for quality in qualities if quality.is_of(result)), None)


def speedup(result: Result, base: Result) -> float:
    """Time of the baseline / time of the policy; in an open loop, where the arrivals say how long a run takes, of the
    median request's latency."""
    if result.serving:
        return float(base.serving["latency_s"]["p50"] / result.serving["latency_s"]["p50"])
    return base.total_s / result.total_s


def comparable(result: Result, base: Result, qualities: Sequence[Quality]) -> bool:
    """Whether a speedup may be printed: nothing that it compares is lossy without its quality having been measured."""
    return all(not is_lossy(one) or quality_of(one, qualities) is not None for one in (result, base))


def speedup_text(result: Result, base: Result, qualities: Sequence[Quality]) -> tuple[str, str]:
    """(speedup, quality) as a table shows them; a speedup never without the quality that it costs."""
    if not comparable(result, base, qualities):
        return "-", NOT_MEASURED if is_lossy(result) else f"{NOT_MEASURED} of {base.policy}"
    found = quality_of(result, qualities) if is_lossy(result) else None
    return f"{speedup(result, base):.3f}x", found.text() if found else "exact"


def how_to_measure(results: Sequence[Result], qualities: Sequence[Quality]) -> str | None:
    """The command that measures what is missing; None where nothing is."""
    missing = [r for r in results if is_lossy(r) and quality_of(r, qualities) is None]
    if not missing:
        return None
    c = missing[0].config
    given = {"resident": c.get("resident"), "copy-dtype": c.get("copy_dtype")}
    options = "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
    phase = " --phase decode" if c.get("phase") == "decode" else ""
    names = ",".join(result.policy for result in missing)
    return (
        f"{NOT_MEASURED}: moesim quality MODEL --trace TRACE --policy {names}{options}{phase} --out quality.json, then "
        "--quality quality.json. What these policies compute is not what the model computes."
    )


def save_qualities(found: Sequence[Quality], path: Path) -> None:
    """Write them as one JSON file, complete or not at all. Raises InputError where that fails."""
    temporary = path.with_name(path.name + ".partial")
    content = {"format": FORMAT, "version": VERSION, "entries": [asdict(quality) for quality in found]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def load_qualities(path: Path) -> list[Quality]:
    """Read what `save_qualities` wrote. Raises InputError naming the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); write it with moesim quality --out") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{path}: not a file of moesim quality --out")
    if data.get("version") != VERSION:
        raise InputError(f"{path}: version {data.get('version')!r} of its format, this moesim reads {VERSION}")
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise InputError(f"{path}: damaged, it has no entries")
    return [_quality(entry, path) for entry in entries]


def _quality(entry: Any, path: Path) -> Quality:
    names = {field.name for field in fields(Quality)}
    if not isinstance(entry, dict) or entry.keys() != names:
        raise InputError(f"{path}: damaged entry, it must have {', '.join(sorted(names))}")
    for name in ("loss", "exact_loss", "loss_error", "top1_agreement", "output_error"):
        if isinstance(entry[name], bool) or not isinstance(entry[name], int | float):
            raise InputError(f"{path}: damaged entry, {name} is {entry[name]!r} and must be a number")
    return Quality(**entry)
