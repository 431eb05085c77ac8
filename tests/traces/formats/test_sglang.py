"""SGLang's recorder: passes, ranks and requests that the small samples do not have."""

import numpy as np
import pytest
import torch

from moesim.traces import InputError, Phase, concat, concat_loads
from moesim.traces.formats import ImportOptions, sglang

EXPERTS, LAYERS = 6, 2
MAP = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [5, 4, 3, 2, 1, 0, 0]])
EXTEND, DECODE, MIXED, IDLE, VERIFY = 1, 2, 3, 4, 5


def per_pass(number, rank, count, **changes):
    about = {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary"}
    return {**about, "global_physical_count": torch.tensor(count, dtype=torch.int32), **changes}


def per_token(number, mode, positions, lengths, *, rank=0, seed=0, **changes):
    """As the recorder makes it: ids and positions are lists, expert ids a tensor with 8 columns, 3 used here."""
    tokens = len(positions)
    rng = np.random.default_rng(1000 * seed + number)
    ids = np.full((LAYERS, tokens, 8), -1, np.int32)
    ids[:, :, :3] = rng.random((LAYERS, tokens, 7)).argsort(axis=2)[:, :, :3]
    return {
        **per_pass(number, rank, np.zeros(MAP.shape)),
        "input_ids": rng.integers(0, 90, tokens).tolist(),
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(ids),
        "misc_objects": [],
        **changes,
    }


def save(folder, *ranks, to=MAP):
    for rank, records in enumerate(ranks):
        value = {"records": records, "last_physical_to_logical_map": to}
        torch.save(value, folder / f"expert_distribution_recorder_1.5_{rank}.pt")
    return folder


def read(folder):
    assert sglang.recognise(folder)
    recording = sglang.read(folder, ImportOptions())
    parts = list(recording.parts)
    return recording, concat_loads(parts) if recording.kind == "loads" else concat(parts)


def test_physical_counts_are_summed_over_ranks_and_copies(tmp_path):
    first, second = np.arange(14).reshape(2, 7), np.ones((2, 7), int)
    recording, table = read(save(tmp_path, [per_pass(4, 0, first), per_pass(3, 0, second)], [per_pass(4, 1, second)]))
    assert table.load[0].tolist() == [[2, 1, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1]]
    assert table.load[1].tolist() == [[1 + 7, 2, 3, 4, 5, 6], [12 + 13 + 2, 12, 11, 10, 9, 8]]
    assert recording.notes["ranks"] == "the sum over the ranks was taken" and recording.top_k == 1


@pytest.mark.parametrize("kind", ["per_pass", "per_token"])
def test_recordings_of_two_servers_are_not_summed(tmp_path, kind):
    record = per_pass(4, 0, np.ones((2, 7))) if kind == "per_pass" else per_token(4, EXTEND, [0, 1], [2])
    save(tmp_path, [record], [record])
    with pytest.raises(InputError, match=r"_1\.pt: pass 4 of rank 0 is there twice; import one recording at a time"):
        read(tmp_path)


def test_files_with_different_maps_are_refused(tmp_path):
    save(tmp_path, [per_pass(4, 0, np.ones((2, 7)))])
    value = {"records": [per_pass(4, 1, np.ones((2, 7)))], "last_physical_to_logical_map": MAP.flip(1)}
    torch.save(value, tmp_path / "z.pt")
    with pytest.raises(InputError, match=r"z\.pt: its map is not that of"):
        read(tmp_path)


def test_physical_ids_of_tokens_become_logical(tmp_path):
    record = per_token(0, EXTEND, [0, 1, 2], [3])
    _, table = read(save(tmp_path, [record]))
    for layer in range(LAYERS):
        physical = record["topk_ids_of_layer"][layer, :, :3]
        assert table.topk_ids[:, layer].tolist() == MAP[layer][physical.long()].tolist()
    assert table.token_id.tolist() == record["input_ids"]


def test_an_idle_rank_and_ranks_with_the_same_tokens(tmp_path):
    """Data-parallel rank 1 is idle in pass 0 (empty lists); tensor-parallel rank 2 repeats rank 0."""
    one = per_token(0, EXTEND, [0, 1], [2])
    save(tmp_path, [one], [per_token(0, IDLE, [], None, rank=1), per_token(1, DECODE, [7], None, rank=1)],
         [{**one, "rank": 2}])  # fmt: skip
    recording, table = read(tmp_path)
    assert table.step.tolist() == [0, 0, 1] and table.position.tolist() == [0, 1, 7]
    assert recording.notes["ranks"].startswith("1 records repeat")


def test_equal_choices_of_different_tokens_are_kept(tmp_path):
    one = per_token(0, EXTEND, [0, 1], [2])
    _, table = read(save(tmp_path, [one], [{**one, "rank": 1, "input_ids": [91, 92]}]))
    assert len(table) == 4 and table.request.tolist() == [0, 0, 1, 1]


def test_requests_go_on_by_position(tmp_path):
    """Chunked prefill, a mixed pass, a request with a cached prefix, and drafts to verify."""
    save(tmp_path, [
        per_token(0, EXTEND, [0, 1, 0, 1, 2], [2, 3]),  # requests 0 and 1
        per_token(1, MIXED, [2, 3, 3], [2, 1]),  # a chunk of 0 (which waits for 2), decode of 1
        per_token(2, DECODE, [4, 4, 20], None),  # 0, 1, and 2 with 20 tokens from the cache
        per_token(3, VERIFY, [5, 6, 21, 22], None),  # drafts of 0 and 2
    ])  # fmt: skip
    _, table = read(tmp_path)
    assert table.request.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 2, 0, 0, 2, 2]
    assert np.flatnonzero(table.phase == Phase.DECODE).tolist() == [8, 9, 10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extend_seq_lens": [4]}, "extend_seq_lens sum to 4 for 3 tokens"),
        ({"extend_seq_lens": [float("nan")]}, "extend_seq_lens must be whole numbers"),
        ({"extend_seq_lens": [-1, 4]}, "extend_seq_lens must be whole numbers"),
        ({"positions": [0, 1]}, "differ in length"),
        ({"positions": [0, 1, -2]}, "positions must be whole numbers"),
        ({"input_ids": None}, "input_ids"),
        ({"topk_ids_of_layer": torch.zeros(3, 3, 8, dtype=torch.int32)}, "has 3 layers, the map 2"),
        ({"topk_ids_of_layer": torch.full((2, 3, 8), 7, dtype=torch.int32)}, r"expert id 7 is outside 0\.\.6"),
        ({"topk_ids_of_layer": torch.full((2, 3, 8), -1, dtype=torch.int32)}, "no token chose an expert"),
        ({"forward_pass_id": "x"}, "lacks forward_pass_id"),
    ],
)
def test_records_that_contradict_themselves(tmp_path, changes, message):
    save(tmp_path, [per_token(0, EXTEND, [0, 1, 2], [3]) | changes])
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"logical_count": torch.zeros(2, 3, 4)}, "nothing was counted"),
        ({"logical_count": torch.full((2, 3, 4), float("nan"))}, "not a whole number"),
        ({"logical_count": torch.full((2, 3, 4), -1)}, "negative or beyond"),
        ({"logical_count": torch.ones(4)}, r"must be \[steps, layers, experts\], got shape \[4\]"),
        ({"records": 7, "last_physical_to_logical_map": MAP}, "'records' must be a list of records"),
        ({"records": [], "last_physical_to_logical_map": MAP}, "has no record"),
        ({"records": [per_pass(0, 0, np.ones((2, 7)))]}, "last_physical_to_logical_map"),
        ({"records": [per_pass(0, 0, np.ones((2, 5)))], "last_physical_to_logical_map": MAP}, "the map is"),
    ],
)
def test_counts_that_are_none(tmp_path, value, message):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and "x.pt" in str(caught.value)
