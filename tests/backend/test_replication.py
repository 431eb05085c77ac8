"""Predictive replication with the true router (arXiv 2605.11537) changes where experts run, and no bit of outputs."""

import json
from pathlib import Path

from moesim.backend.launch import run_ranks


def test_replicas_change_no_bit_of_the_output(tmp_path):
    run_ranks([str(Path(__file__).parent / "replication_cases.py"), str(tmp_path)], 2, tmp_path)
    found = [json.loads((tmp_path / f"replication-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(rank["same"] for rank in found)
    assert sum(rank["tokens"] for rank in found) > 100
    static, replicating = found[0]["transfers"]
    assert static == 0 and replicating > 0, "the case must copy something"
