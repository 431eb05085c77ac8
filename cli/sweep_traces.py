"""Made-up traces of a sweep: one for each skew, in the sweep's folder, made once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from moesim.cli.trace_synth import make_trace
from moesim.sim.sweep_store import TRACES
from moesim.traces import InputError
from moesim.traces.synthetic import Shape, synthetic_spec
from moesim.traces.synthetic_fit import Statistics

STATISTICS = {"drift": "drift", "coupling": "next_layer", "overlap": "adjacent"}
"""Name as an option of `moesim trace synth`, to name as a statistic."""
SIZES = tuple(one.name for one in fields(Shape))


def made_up_traces(asked: dict[str, Any], out: Path) -> list[Path]:
    """The traces, `skew` being a list and the rest as in `moesim trace synth`; what exists is taken. A trace's name
    says its skew and, shortened, what else was asked for. Raises InputError for what cannot be made."""
    for name in asked:
        if name not in ("skew", "seed", *SIZES, *STATISTICS):
            known = ", ".join(["skew", "seed", *SIZES, *STATISTICS])
            raise InputError(f"[synthetic] {name} is not known; known: {known}")
    skews = asked.get("skew", [])
    if not isinstance(skews, list) or not skews or not all(type(one) in (int, float) for one in skews):
        raise InputError("[synthetic] skew: give numbers, as skew = [2, 4, 8]")
    shape = Shape(**{name: asked[name] for name in SIZES if name in asked})
    wanted = {statistic: asked[name] for name, statistic in STATISTICS.items() if name in asked}
    seed = asked.get("seed", 0)
    others = hashlib.sha256(json.dumps({**asked, "skew": None}, sort_keys=True).encode()).hexdigest()[:8]
    found = []
    for skew in skews:
        path = out / TRACES / f"synthetic-skew-{skew:g}-{others}.moetrace"
        if not path.exists():
            # Under another name until it is complete: a trace whose writer was killed can be read, and is too short.
            partial = path.with_name(path.name + ".partial")
            target = Statistics(skew=(float(skew),) * shape.layers, **wanted)
            make_trace(synthetic_spec(shape), shape, target, seed, partial, None, force=True)
            partial.replace(path)
        found.append(path)
    return found
