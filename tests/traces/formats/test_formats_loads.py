"""Loads of the other systems: what contradicts itself is refused, and no small file takes much memory."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from moesim.traces import InputError
from moesim.traces.formats import FORMATS, ImportOptions


def refuse(name, path, message, options=None):
    with pytest.raises(InputError, match=message) as caught:
        list(FORMATS[name].read(path, options or ImportOptions()).parts)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def stats(folder, *changes):
    record = {"record_type": "eplb_load_stats", "version": 1, "step": 0, "num_ranks": 1, "num_layers": 2,
              "expert_load": [[5, 1, 2], [0, 4, 4]], "p2l_map": [[0, 1, 0], [1, 0, 1]]}  # fmt: skip
    (folder / "x.jsonl").write_text("".join(json.dumps(record | change) + "\n" for change in changes))
    return folder / "x.jsonl"


def test_vllm_loads_of_copies_are_added(tmp_path):
    path = stats(tmp_path, {}, {"step": 1, "p2l_map": [[1, 1, 0], [0, 0, 1]]})
    recording = FORMATS["vllm-loads"].read(path, ImportOptions(top_k=1))
    assert [part.load.tolist() for part in recording.parts] == [[[[7, 1], [4, 4]]], [[[2, 6], [4, 4]]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"version": 2}], "line 1: not a record eplb_load_stats of version 1"),
        ([{"expert_load": [[1, 2, 3]]}], r"expert_load is \[1, 3\], p2l_map \[2, 3\]"),
        ([{"expert_load": [[1, 2, 3], [1, 2]]}], "line 1, expert_load: ragged"),
        ([{"expert_load": [[1, 2, -3], [1, 2, 3]]}], "negative or beyond"),
        ([{"expert_load": [[1, 2, 1 << 53], [1, 2, 3]]}], "negative or beyond"),
        ([{"p2l_map": [[0, 1, -1], [1, 0, 1]]}], "negative or beyond"),
        ([{"p2l_map": [[0, 1, 60_000], [1, 0, 1]]}], "the map has 3 physical experts for 60001 logical ones"),
        ([{"p2l_map": [[0, 1, 1 << 40], [1, 0, 1]]}], "names an expert beyond 65535"),
        (
            [{}, {"expert_load": [[1, 2]], "p2l_map": [[0, 1]]}],
            r"row 1 has \[L, E\] = \[1, 2\]",
        ),
        ([{"record_type": "eplb_initial_mapping"}], "has no eplb_load_stats record"),
    ],
)
def test_vllm_records_that_contradict_themselves(tmp_path, changes, message):
    refuse("vllm-loads", stats(tmp_path, *changes), message)


def test_a_wrong_number_of_experts_is_said(tmp_path):
    refuse("vllm-loads", stats(tmp_path, {}), "3 physical experts for 8 logical ones", ImportOptions(experts=8))
    np.save(tmp_path / "x.npy", np.ones((3, 2, 4)))
    refuse("moe-infinity", tmp_path / "x.npy", "counts 4 experts, --experts says 8", ImportOptions(experts=8))


def statistic(folder, *ranks, meta=None):
    (folder / "meta_info.json").write_text(json.dumps(meta or {"num_experts": 4, "num_experts_per_token": 2}))
    for rank, tensors in enumerate(ranks):
        save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder


def test_tensorrt_ranks_are_summed_in_order_of_iteration(tmp_path):
    def of(scale):
        return {f"{step}_{layer}": np.full(4, scale * (step + layer), np.int32) for step in (9, 10) for layer in (3, 5)}

    recording = FORMATS["tensorrt"].read(statistic(tmp_path, of(1), of(10)), ImportOptions())
    loads = np.concatenate([part.load for part in recording.parts])
    assert loads[:, :, 0].tolist() == [[132, 154], [143, 165]]
    assert recording.layers == (3, 5) and recording.num_layers == 6 and recording.top_k == 2


ONE = np.ones(4, np.int32)


@pytest.mark.parametrize(
    ("ranks", "meta", "message"),
    [
        ([{"0_1": ONE, "1_1": ONE, "0_2": ONE}], None, "rank0.safetensors: lacks 1_2"),
        ([{"0_1": ONE, "1_1": ONE}, {"0_1": ONE}], None, "a rank's file lacks an iteration"),
        ([{"0_1": ONE, "1_1": ONE[:3]}], None, "1_1: counts 3 experts, meta_info.json says 4"),
        ([{"0_1": -ONE}], None, "0_1: a count is negative"),
        ([{"0_1": np.full(4, np.nan)}], None, "0_1: a count is not a whole number"),
        ([{"0_1": ONE[None]}], None, "0_1: must have 1 dimensions"),
        ([{"weights": ONE}], None, "its keys must be ITERATION_LAYER"),
        ([{"0_1": ONE}], {"num_experts": 2, "num_experts_per_token": 4}, "must give num_experts"),
        ([{"0_1": ONE}], [1], "must give num_experts"),
        ([], None, r"has no rank0\.safetensors"),
    ],
)
def test_tensorrt_folders_that_contradict_themselves(tmp_path, ranks, meta, message):
    refuse("tensorrt", statistic(tmp_path, *ranks, meta=meta), message)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0,0,-1"], "line 2: layer, expert or count is out of range"),
        (["0,0,1", "9999,0,1"], "line 3: layer, expert or count is out of range"),
        (["0,0,1.5"], "line 2: not a row of whole numbers"),
        (["0,0"], "line 2: not a row of whole numbers"),
        ([f"0,0,{(1 << 53) - 1}", "0,0,1"], "a count beyond 2"),
        ([], "has no rows"),
        ([*(f"{layer},0,1" for layer in range(4096)), "0,60000,1"], "4096 layers of 60001 experts, which no model has"),
    ],
)
def test_csv_rows(tmp_path, rows, message):
    (tmp_path / "x.csv").write_text("\n".join(["layer_id,expert_id,count", *rows]) + "\n")
    refuse("load-csv", tmp_path / "x.csv", message)


def test_csv_pairs_that_are_missing_count_zero(tmp_path):
    (tmp_path / "x.csv").write_text("layer_id,expert_id,count\n4,2,7\n1,0,3\n4,2,1\n")
    recording = FORMATS["load-csv"].read(tmp_path / "x.csv", ImportOptions(experts=4))
    assert next(iter(recording.parts)).load.tolist() == [[[3, 0, 0, 0], [0, 0, 8, 0]]]
    assert recording.layers == (1, 4) and recording.num_layers == 5
