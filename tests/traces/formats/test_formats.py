"""Every foreign format, as its system writes it: recognised, and the arrays that must come out."""

import json

import numpy as np
import pytest

import samples
from moesim.traces import InputError, Phase, concat, concat_loads, total_load_LE
from moesim.traces.formats import FORMATS, ImportOptions, recognise
from moesim.traces.formats.routed import read_map
from samples import IDS, PAIRS, STEPS, TOKENS, TOTAL, WEIGHTS, E, K, L, T

KNOWN = ImportOptions(experts=E, top_k=K, layers=L)


def read(sample, folder, options=KNOWN):
    path = sample(folder)
    recording = recognise(path).read(path, options)
    parts = list(recording.parts)
    return recording, concat_loads(parts) if recording.kind == "loads" else concat(parts)


@pytest.mark.parametrize(("name", "sample"), PAIRS, ids=[sample.__name__ for _, sample in PAIRS])
def test_recognised_by_content(name, sample, tmp_path):
    """No other format claims the sample, so `--format` is for overriding only."""
    path = sample(tmp_path)
    assert recognise(path).name == name
    assert [f.name for f in FORMATS.values() if f.read and f.recognise(path)] == [name]


@pytest.mark.parametrize(("name", "sample"), PAIRS, ids=[sample.__name__ for _, sample in PAIRS])
def test_the_load_of_every_expert_comes_out(name, sample, tmp_path):
    recording, table = read(sample, tmp_path)
    assert recording.num_experts == E and recording.top_k == K and len(recording.layers) == L
    assert (total_load_LE(table, E) == TOTAL).all()


@pytest.mark.parametrize("sample", [samples.sglang_stat, samples.sglang_per_pass, samples.sglang_plan,
                                    samples.vllm_loads, samples.tensorrt, samples.moe_infinity])  # fmt: skip
def test_steps_stay_apart(sample, tmp_path):
    _, table = read(sample, tmp_path)
    assert (table.load == STEPS).all() and table.step.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("sample", "requests", "phases"),
    [
        (samples.vllm_npy, [T], [(Phase.PREFILL, T)]),
        (samples.vllm_folder, [5, 7], [(Phase.PREFILL, T)]),
        (samples.vllm_responses, [7, 5], [(Phase.PREFILL, 4), (Phase.DECODE, 3), (Phase.PREFILL, 5)]),
        (samples.sglang_requests, [T], [(Phase.PREFILL, 10), (Phase.DECODE, 2)]),
        (samples.esft, [5, 7], [(Phase.PREFILL, T)]),
        (samples.npz, [5, 7], [(Phase.PREFILL, T)]),
        (samples.moe_balance, [7, 5], [(Phase.PREFILL, 4), (Phase.DECODE, 3), (Phase.PREFILL, 3), (Phase.DECODE, 2)]),
        (samples.megatron, [2] * 6, [(Phase.PREFILL, T)]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_tokens_in_order(sample, requests, phases, tmp_path):
    _, table = read(sample, tmp_path)
    assert (table.topk_ids == IDS).all()
    assert np.bincount(table.request).tolist() == requests
    assert table.position.tolist() == [p for n in requests for p in range(n)]
    assert table.phase.tolist() == [phase for phase, n in phases for _ in range(n)]


def test_what_else_a_format_knows(tmp_path):
    for sample in (samples.vllm_responses, samples.moe_balance):
        folder = tmp_path / sample.__name__
        folder.mkdir()
        assert (read(sample, folder)[1].token_id == TOKENS).all()
    for sample, layers in ((samples.esft, (1, 2, 3)), (samples.npz, (1, 2, 4))):
        folder = tmp_path / sample.__name__
        folder.mkdir()
        recording, table = read(sample, folder)
        assert recording.layers == layers and (table.topk_weights == WEIGHTS).all()
    assert recording.requests == ["law", "law"] and recording.num_layers == 5


def test_interleaved_rows_become_tokens(tmp_path):
    recording, table = read(samples.jsonl, tmp_path)
    order = np.lexsort((table.position, table.request))
    assert (table.topk_ids[order] == IDS).all() and (table.topk_weights[order] == WEIGHTS).all()
    assert np.bincount(table.request).tolist() == [5, 7] and recording.layers == (1, 2, 5)


def test_sglang_layers_ranks_and_unfilled_rows(tmp_path):
    recording, _ = read(samples.sglang_stat, tmp_path)
    assert recording.layers == (1, 3, 4) and recording.num_layers == 5
    assert recording.notes["unfilled_rows"] == 2 and "1 files repeat" in recording.notes["ranks"]


def test_sglang_ranks_that_hold_the_sum_are_counted_once(tmp_path):
    import torch

    samples.sglang_per_pass(tmp_path)
    files = sorted(tmp_path.glob("*.pt"))
    contents = [torch.load(file, weights_only=True) for file in files]
    for records in zip(*(content["records"] for content in contents), strict=True):
        whole = sum(record["global_physical_count"] for record in records)
        for record in records:
            record["global_physical_count"] = whole
    for file, content in zip(files, contents, strict=True):
        torch.save(content, file)
    recording = recognise(tmp_path).read(tmp_path, KNOWN)
    assert (next(iter(recording.parts)).load == STEPS).all()
    assert recording.notes["ranks"] == "every rank holds the sum: one was taken"


def test_sglang_tokens_with_requests_that_go_on(tmp_path):
    recording, table = read(samples.sglang_per_token, tmp_path)
    assert (table.topk_ids == IDS).all() and (table.token_id == TOKENS).all()
    assert table.request.tolist() == [0] * 5 + [1] * 4 + [0, 1] + [1]
    assert table.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 4, 5]
    assert table.phase.tolist() == [Phase.PREFILL] * 9 + [Phase.DECODE] * 3
    assert table.step.tolist() == [0] * 9 + [1, 1, 2]
    assert recording.notes["padding_rows"] == 1


def test_megatron_ranks_and_pipeline_stages(tmp_path):
    recording, _ = read(samples.megatron, tmp_path)
    assert recording.layers == (1, 2, 3) and "3 records of ranks that repeat" in recording.notes["ranks"]
    stages = tmp_path / "stages"
    stages.mkdir()
    whole = (tmp_path / "rank_0.jsonl").read_text().splitlines(keepends=True)
    for rank, layers in ((0, '"layer": 1'), (1, '"layer": ')):
        kept = [line for line in whole if layers in line and ('"layer": 1' in line) == (rank == 0)]
        (stages / f"rank_{rank}.jsonl").write_text("".join(kept))
    recording = recognise(stages).read(stages, KNOWN)
    table = concat(list(recording.parts))
    assert (table.topk_ids == IDS[[0, 1, 4, 5, 8, 9]]).all() and recording.layers == (1, 2, 3)


def test_physical_ids_become_logical_ones_by_a_given_map(tmp_path):
    np.save(tmp_path / "map.npy", samples.MAP)
    np.save(tmp_path / "ids.npy", samples.physical_ids().astype(np.uint8))
    options = ImportOptions(physical_to_logical=tmp_path / "map.npy")
    recording = FORMATS["vllm"].read(tmp_path / "ids.npy", options)
    assert (next(iter(recording.parts)).topk_ids == IDS).all()
    assert recording.notes["physical_ids"] == "made logical by map.npy"


def test_maps_in_every_form(tmp_path):
    import torch

    tensor = torch.from_numpy(samples.MAP)
    torch.save(tensor, tmp_path / "bare.pt")
    torch.save({"physical_to_logical_map": tensor}, tmp_path / "plan.pt")
    (tmp_path / "plan.json").write_text(json.dumps({"physical_to_logical_map": samples.MAP.tolist()}))
    (tmp_path / "deepseek.json").write_text(json.dumps({"phy2log": samples.MAP.tolist()}))
    for path in sorted(tmp_path.iterdir()):
        assert (read_map(path) == samples.MAP).all()


@pytest.mark.parametrize("sample", [samples.vllm_npy, samples.esft, samples.jsonl, samples.load_csv])
def test_a_guessed_number_of_experts_is_noted(sample, tmp_path):
    recording, _ = read(sample, tmp_path, ImportOptions(top_k=K))
    assert recording.num_experts == int(IDS.max()) + 1 and "largest" in recording.notes["experts"]


def test_what_is_missing_is_asked_for(tmp_path):
    path = samples.sglang_requests(tmp_path)
    with pytest.raises(InputError, match="give --model, or --layers and --top-k"):
        FORMATS["sglang-requests"].read(path, ImportOptions())
    (tmp_path / "esft").mkdir()
    path = samples.esft(tmp_path / "esft")
    with pytest.raises(InputError, match="experts per token is not clear; give --top-k"):
        FORMATS["esft"].read(path, ImportOptions())
    recording = FORMATS["moe-infinity"].read(samples.moe_infinity(tmp_path), ImportOptions())
    assert recording.top_k == 1 and recording.notes["top_k"].startswith("not known, taken as 1")
