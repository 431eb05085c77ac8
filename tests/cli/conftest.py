"""A tiny model and its recordings, for the commands that run models."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moesim.traces.writer import TraceWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "backend"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(model folder, its trace, the trace without words and widths, as imports are) of a tiny random Switch model."""
    import cases

    folder = tmp_path_factory.mktemp("tiny")
    model = cases.tiny_model()
    spec = cases.spec_of(model)
    recording, _ = cases.recorded(model, False)
    bare = replace(recording, token_id=None), replace(spec, widths=None, vocab_size=None)
    for name, (table, of) in {"tiny": (recording, spec), "bare": bare}.items():
        with TraceWriter(folder / f"{name}.moetrace", of, {}) as writer:
            writer.append("encoder", table)
    cases.tiny_model().save_pretrained(folder / "model")
    return folder / "model", folder / "tiny.moetrace", folder / "bare.moetrace"
