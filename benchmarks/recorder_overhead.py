"""What recording costs: recorded over unrecorded encoder + prefill forward, pair by pair in one run.

The hooks only keep references; reading the selection out of them (argmax, drops, lookahead gates) is timed with the
forward, as in a real recording. Prints a table, then one JSON line. Usage: recorder_overhead.py [MODEL_FOLDER] [PAIRS]
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from moesim.traces.record import load_model
from moesim.traces.routers import RouterRecorder

SHIPPED = Path(__file__).parents[1] / "models/switch-mini"
BATCH, ENCODER, PROMPT = 16, 128, 33


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(SHIPPED)
    pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    model, _ = load_model(folder, device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (BATCH, ENCODER), generator=generator)
    prompt = torch.randint(2, model.config.vocab_size, (BATCH, PROMPT), generator=generator)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, decoder_input_ids=prompt)

    def recorded(recorder: RouterRecorder) -> None:
        with recorder:
            forward()
        recorder.take("encoder")
        recorder.take("decoder")

    def timed(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    rows = []
    for lookahead in (0, 2):
        recorder = RouterRecorder(model, lookahead=lookahead)
        forward()
        recorded(recorder)
        ratios, plain = [], []
        for pair in range(pairs):
            # Who goes first alternates: the second run of a pair finds warm caches.
            if pair % 2:
                with_it, without = timed(lambda r=recorder: recorded(r)), timed(forward)
            else:
                without, with_it = timed(forward), timed(lambda r=recorder: recorded(r))
            plain.append(without)
            ratios.append(with_it / without)
        q25, q50, q75 = np.percentile(ratios, [25, 50, 75])
        row = {"lookahead": lookahead, "ratio_p25": q25, "ratio_p50": q50, "ratio_p75": q75}
        rows.append({**row, "forward_ms": 1e3 * float(np.median(plain)), "pairs": pairs})
        print(
            f"lookahead {lookahead}: recorded / unrecorded {q50:.3f} (quartiles {q25:.3f} .. {q75:.3f}), "
            f"forward {1e3 * float(np.median(plain)):.1f} ms, {pairs} pairs"
        )
    about = {name: version(name) for name in ("torch", "transformers")}
    shape = {"batch": BATCH, "encoder_tokens": ENCODER, "prompt_tokens": PROMPT, "threads": torch.get_num_threads()}
    machine = {"cpu": cpu_name(), "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "recorder_overhead", "rows": rows, **shape, **about, **machine}))


def cpu_name() -> str:
    """As Linux reports it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
