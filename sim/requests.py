"""What becomes of requests in an open loop, summed up; its size does not grow with their number.

Times of a request: it arrives, starts (its first tokens are in a step: until then it queues), has its first token (the
step that completes its prompt ends) and is done. TTFT = first token - arrival; TPOT = (done - first token) / further
tokens; latency = done - arrival. An encoder's request has its first token when it is done, and no TPOT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moesim.sim.totals import Quantiles

PERCENTS = (50, 95, 99)


@dataclass(slots=True)
class RequestTotals:
    """Adds up `request done` events."""

    done: int = 0
    good: int = 0
    """Requests that met both targets."""
    tokens: int = 0
    """Output tokens, the first ones included."""
    last_s: float = 0.0
    times: dict[str, Quantiles] = field(
        default_factory=lambda: {name: Quantiles() for name in ("queueing_s", "ttft_s", "tpot_s", "latency_s")}
    )

    def add(self, event: dict[str, Any], targets: dict[str, float]) -> None:
        """Count a request; `targets`: the largest good `ttft_s` and `tpot_s`, where there are any."""
        self.done += 1
        self.tokens += event["output_tokens"]
        self.last_s = event["time_s"]
        more = event["output_tokens"] - 1
        found = {
            "queueing_s": event["start_s"] - event["arrival_s"],
            "ttft_s": event["first_token_s"] - event["arrival_s"],
            "latency_s": event["time_s"] - event["arrival_s"],
        }
        if more:
            found["tpot_s"] = (event["time_s"] - event["first_token_s"]) / more
        for name, seconds in found.items():
            self.times[name].add(seconds)
        self.good += all(found.get(name, 0.0) <= most for name, most in targets.items())

    def summary(self, targets: dict[str, float]) -> dict[str, Any]:
        """Percentiles, throughput and goodput from time 0 to the end of the last request; {} where there were none."""
        if not self.done:
            return {}
        found: dict[str, Any] = {"requests": self.done}
        for name, values in self.times.items():
            if len(values):
                marks = values.percentiles(PERCENTS)
                found[name] = {f"p{percent}": mark for percent, mark in zip(PERCENTS, marks, strict=True)}
        found["requests_per_s"] = self.done / self.last_s
        found["output_tokens_per_s"] = self.tokens / self.last_s
        if targets:
            found["targets"] = targets
            found["goodput_per_s"] = self.good / self.last_s
        return found
