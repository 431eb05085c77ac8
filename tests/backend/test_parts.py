"""The parts of the executor that need no other rank: shares, row orders, slots, phases, the median repeat."""

from mmap import PAGESIZE

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from moesim.backend import slots
from moesim.backend.experts import ExpertShape, ExpertSlots
from moesim.backend.job import Job
from moesim.backend.measure import ATTENTION, BLOCKED, DECIDE, EXPERTS, GATHER, Measured, phases
from moesim.backend.parallel import route
from moesim.backend.session import Pass, summarise
from moesim.backend.shares import pad
from moesim.backend.slots import FULL, HostExperts
from moesim.sim.dispatch import exact_split, send_matrix
from moesim.sim.results import StepRecord
from moesim.sim.timeline import Span
from moesim.traces import InputError, MoesimError


def test_padding_is_on_the_right_and_requests_keep_their_order():
    batch = pad(np.array([7, 8, 9, 5]), np.array([3, 3, 3, 1]), np.array([0, 1, 2, 0]))
    assert batch.ids_BS.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.mask_BS.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.real().tolist() == [0, 1, 2, 3]


def test_a_request_with_a_hole_cannot_be_run():
    with pytest.raises(InputError, match="positions 0, 1, 2"):
        pad(np.array([7, 8]), np.array([0, 0]), np.array([0, 2]))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 40), st.integers(0, 10**6))
def test_rows_meet_their_experts_and_come_back(gpus, tokens, seed):
    rng = np.random.default_rng(seed)
    experts = gpus + int(rng.integers(0, 4))
    rank_T = rng.integers(0, gpus, tokens)
    ids_T, dropped_T = rng.integers(0, experts, tokens), rng.random(tokens) < 0.2
    usable_EG = rng.random((experts, gpus)) < 0.4
    usable_EG[np.arange(experts), rng.integers(0, gpus, experts)] = True
    counts_GE = np.zeros((gpus, experts), np.int64)
    np.add.at(counts_GE, (rank_T[~dropped_T], ids_T[~dropped_T]), 1)
    send = send_matrix(counts_GE, exact_split(counts_GE.sum(axis=0), usable_EG))
    mine = [np.flatnonzero(rank_T == g) for g in range(gpus)]
    ways = [route(send, g, ids_T[mine[g]], dropped_T[mine[g]]) for g in range(gpus)]
    # What each rank puts on the wire: numbers of tokens, cut by receiver.
    sent = [np.split(mine[g][w.order_N], np.cumsum(w.sent_G)[:-1]) for g, w in enumerate(ways)]
    for to, way in enumerate(ways):
        got = np.concatenate([sent[g][to] for g in range(gpus)])
        assert [len(sent[g][to]) for g in range(gpus)] == way.received_G
        assert ids_T[got[way.group]].tolist() == np.repeat(way.expert_X, way.tokens_X).tolist()
        assert usable_EG[way.expert_X, to].all()
    everything = np.concatenate([np.concatenate(parts) for parts in sent])
    assert sorted(everything) == np.flatnonzero(~dropped_T).tolist()


def test_slots_compute_what_their_expert_computes():
    torch.manual_seed(0)
    shape = ExpertShape(d_model=4, d_ff=6, dtype=torch.float32)
    slots = ExpertSlots(3, shape, functional.relu, torch.device("cpu"))
    wi, wo, x = torch.randn(6, 4), torch.randn(4, 6), torch.randn(5, 4)
    slots.write(2, (0, 7), shape.flatten(wi, wo))
    got = slots.apply(x, torch.randperm(5), [2], [5])
    assert torch.allclose(got, torch.relu(x @ wi.T) @ wo.T, atol=1e-6)
    assert slots.apply(x[:0], torch.empty(0, dtype=torch.long), [], []).shape == (0, 4)


def test_a_snapshot_is_found_until_its_slot_is_overwritten():
    shape = ExpertShape(d_model=1, d_ff=1, dtype=torch.float32)
    slots = ExpertSlots(2, shape, functional.relu, torch.device("cpu"))
    slots.write(0, (0, 1), torch.tensor([1.0, 1.0]))
    taken = slots.snapshot((0, 1))
    slots.write(1, (0, 1), torch.tensor([1.0, 1.0]))
    slots.write(0, (0, 2), torch.tensor([2.0, 2.0]))
    assert taken.tolist() == slots.snapshot((0, 1)).tolist() == [1.0, 1.0]
    assert slots.snapshot((0, 2)).tolist() == [2.0, 2.0]
    slots.write(1, (0, 3), torch.tensor([3.0, 3.0]))
    with pytest.raises(KeyError):
        slots.snapshot((0, 1))


def test_marks_become_phases():
    table = phases([0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66], layers=1)
    assert table[0].tolist() == [0, 0, 1, 0, 2]
    layer = table[1]
    assert layer[ATTENTION] == 3 and layer[GATHER] == 4 and layer[DECIDE] == 5 + 7
    assert layer[BLOCKED] == 6 and layer[EXPERTS] == 9
    assert table[2, ATTENTION] == 11
    communication = 8 + 10
    assert table.sum() + communication == 66


def test_marks_become_spans_that_lie_end_to_end():
    """Two ranks, two steps of one layer: steps begin together and what no time was spent on is left out."""
    marks = np.array([0, 0, 0, 1, 2, 3, 3, 4, 6, 9, 10, 12.0])
    measured = Measured(
        marks_NGM=np.array([[marks, marks / 2], [marks, marks]]),
        phase_NGLP=np.zeros((2, 2, 3, 5)),
        duration_N=np.array([12.0, 12.0]),
        computed_NLG=np.zeros((2, 1, 2), np.int64),
        tokens_N=[1, 1],
        moved_N=[0, 0],
        hidden_N=[0, 0],
    )
    spans = measured.spans()
    first = [(s.name, s.start_s, s.duration_s) for s in spans if s.track == "GPU 0" and s.start_s < 12]
    assert first == [
        ("attention", 0, 1),
        ("exchange ids", 1, 1),
        ("decide", 2, 1),
        ("split", 3, 1),
        ("dispatch", 4, 2),
        ("experts", 6, 3),
        ("combine", 9, 1),
        ("attention", 10, 2),
    ]
    assert [s.start_s for s in spans if s.track == "GPU 1" and s.name == "experts"] == [3, 18]


def test_the_median_repeat_is_reported_with_its_spread():
    def one(seconds):
        step = StepRecord(duration_s=seconds, tokens=1, phase_s={}, load_LG=[[1]], busy_s=[seconds])
        return Pass([step], {"transfers": int(seconds)}, spans=[Span("experts", "GPU 0", 0.0, seconds)])

    result = summarise("eplb", [one(3.0), one(1.0), one(2.0)], {})
    assert result.total_s == 2 and result.scores["transfers"] == 2 and result.spans[0].duration_s == 2
    assert (result.scores["total_s_min"], result.scores["total_s_max"]) == (1, 3)
    assert result.config["repeat_total_s"] == [3.0, 1.0, 2.0]


def test_the_note_for_the_ranks_survives_the_file(tmp_path):
    job = Job(kind="run", folder=str(tmp_path), model="m", ranks=2, device="cpu", policies=("a", "b"), max_steps=3)
    job.write()
    assert Job.read(tmp_path) == job


class Runtime:
    """As much of CUDA's runtime as pins memory."""

    def __init__(self, code):
        self.code, self.ranges, self.given_back = code, [], []

    def cudaHostRegister(self, address, nbytes, _flags):  # CUDA's name
        self.ranges.append((address, nbytes))
        return self.code

    def cudaHostUnregister(self, address):  # CUDA's name
        self.given_back.append(address)


def test_pinned_memory_is_whole_pages_of_its_own_until_it_goes(monkeypatch):
    runtime = Runtime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    shape = ExpertShape(d_model=3, d_ff=5, dtype=torch.float32)
    rows_LE = [[torch.full((30,), 10.0 * layer + e) for e in range(2)] for layer in range(4)]
    wanted = [[row.clone() for row in row_E] for row_E in rows_LE]
    host = HostExperts(rows_LE, shape, pinned=True)
    pages = [range(address // PAGESIZE, (address + nbytes) // PAGESIZE) for address, nbytes in runtime.ranges]
    assert all(address % PAGESIZE == nbytes % PAGESIZE == 0 for address, nbytes in runtime.ranges)
    assert len({page for some in pages for page in some}) == sum(map(len, pages)) == 4
    for (address, nbytes), layer_EP, row_E in zip(runtime.ranges, host.rows(FULL), wanted, strict=True):
        assert torch.equal(layer_EP, torch.stack(row_E))
        assert address <= layer_EP.data_ptr() and layer_EP.data_ptr() + layer_EP.nbytes <= address + nbytes
    del host
    assert sorted(runtime.given_back) == sorted(address for address, _ in runtime.ranges)


def test_memory_that_cannot_be_pinned_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(801))
    monkeypatch.setattr(slots, "_forget_last_error", lambda: None)
    told = torch.empty

    def empty(*args, pin_memory=False, **named):
        if pin_memory:
            raise RuntimeError("CUDA error: operation not supported\nand much advice")
        return told(*args, **named)

    monkeypatch.setattr(torch, "empty", empty)
    shape = ExpertShape(d_model=3, d_ff=5, dtype=torch.float32)
    with pytest.raises(MoesimError, match=r"^0\.0 GiB of host memory cannot be pinned \(CUDA error: operation not"):
        HostExperts([[torch.zeros(30)]], shape, pinned=True)
