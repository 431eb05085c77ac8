"""The training loop: seeds, checkpoints, Ctrl-C; and the numerics of its parts against plain loops."""

import os
import signal

import numpy as np
import pytest
import torch

from helpers import make_table
from moesim.predictors import RouterSpec
from moesim.predictors.learned.files import read, write
from moesim.predictors.learned.gru import Gru
from moesim.predictors.learned.learned import cross_entropy, fitted_sharpness
from moesim.predictors.learned.replication import Sru
from moesim.predictors.learned.requests import Batch, Requests
from moesim.predictors.learned.sida import Sida, SparseLstm, sparsemax
from moesim.predictors.learned.training import Budget, Training, initialise
from moesim.traces import InputError

ROUTER = RouterSpec(num_experts=8, top_k=1)


@pytest.fixture(scope="module")
def table():
    return make_table(requests=20, length=10)


def trained(table, cls=Gru, **changes):
    predictor = cls(training=Training(**{"epochs": 2, "batch_tokens": 32, "device": "cpu", **changes}))
    predictor.fit(table, ROUTER)
    return predictor


def same(one, other):
    a, b = one.net.state_dict(), other.net.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a) and np.array_equal(one.sharpness_VL, other.sharpness_VL)


@pytest.mark.parametrize("cls", [Gru, Sida])
def test_the_seed_decides_and_nothing_else(cls, table):
    torch.manual_seed(1)
    one = trained(table, cls)
    state = torch.manual_seed(2).get_state()
    assert same(one, trained(table, cls))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is nobody's"
    assert not same(one, trained(table, cls, seed=1))


class Stop:
    """Interrupts at a step, by an exception of its own or by the signal."""

    def __init__(self, at, by_signal):
        self.at, self.by_signal, self.told = at, by_signal, []

    def __call__(self, done, total, loss):
        self.told.append((done, total, loss))
        if done == self.at:
            if not self.by_signal:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("cls", [Gru, Sida])
@pytest.mark.parametrize("by_signal", [False, True])
def test_ctrl_c_keeps_a_checkpoint_and_resuming_changes_no_bit(cls, by_signal, table, tmp_path):
    path = tmp_path / "c.safetensors"
    handler = signal.getsignal(signal.SIGINT)
    for at in (1, 6, 9):  # the second is the end of an epoch
        with pytest.raises(KeyboardInterrupt):
            trained(table, cls, checkpoint=path, progress=Stop(at, by_signal))
        assert read(path, {})[1]["state"]["step"] == at
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.glob("*.partial"))
    last = Stop(None, False)
    resumed = trained(table, cls, checkpoint=path, progress=last)
    assert same(resumed, trained(table, cls))
    assert [done for done, _, _ in last.told] == list(range(10, last.told[0][1] + 1))
    again = Stop(None, False)
    assert same(resumed, trained(table, cls, checkpoint=path, progress=again)) and not again.told, "it was finished"


def test_checkpoints_come_while_training_goes_on(table, tmp_path):
    path = tmp_path / "c.safetensors"
    steps = []

    def look(done, total, loss):
        if path.exists():
            steps.append((done, read(path, {})[1]["state"]["step"]))

    trained(table, checkpoint=path, checkpoint_s=0, progress=look)
    assert steps[0] == (2, 1) and all(written == done - 1 for done, written in steps)


def test_a_failing_step_leaves_the_checkpoint_as_it_was(table, tmp_path):
    path = tmp_path / "c.safetensors"

    def fail(done, total, loss):
        raise RuntimeError("disk on fire")

    with pytest.raises(KeyboardInterrupt):
        trained(table, checkpoint=path, progress=Stop(3, False))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="fire"):
        trained(table, checkpoint=path, progress=fail)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its seed is 0, and 1"),
        ({"epochs": 3}, "its epochs is 2"),
        ({"learning_rate": 0.5}, "learning_rate"),
    ],
)
def test_another_trainings_checkpoint_is_refused(changes, message, table, tmp_path):
    path = tmp_path / "c.safetensors"
    trained(table, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message) as error:
        trained(table, checkpoint=path, **changes)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="its data is"):
        trained(make_table(requests=20, length=10, seed=1), checkpoint=path)
    with pytest.raises(InputError, match="its predictor is"):
        trained(table, Sida, checkpoint=path)
    assert path.read_bytes() == before


def test_damaged_checkpoints_are_one_line(table, tmp_path):
    path = tmp_path / "c.safetensors"
    trained(table, checkpoint=path)
    tensors, facts = read(path, {})
    write(path, tensors, {**facts, "state": {"step": "1"}})
    with pytest.raises(InputError, match="its state is not one"):
        trained(table, checkpoint=path)
    write(path, tensors, {**facts, "state": {**facts["state"], "step": 10**6}})
    with pytest.raises(InputError, match="its state is not one"):
        trained(table, checkpoint=path)
    write(path, {name: t for name, t in tensors.items() if name != "exp_avg.0"}, facts)
    with pytest.raises(InputError, match=r"tensor exp_avg\.0 is missing"):
        trained(table, checkpoint=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged") as error:
        trained(table, checkpoint=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_trained_with():
    with pytest.raises(InputError, match="seed of a training must not be -1"):
        Training(seed=-1)
    with pytest.raises(InputError, match="cannot train on 'tpux'"):
        Training(device="tpux").where()


def test_epochs_follow_from_the_size():
    budget = Budget(layer_tokens=1_000_000)
    assert [budget.epochs(tokens, 4) for tokens in (100, 25_000, 10**7)] == [60, 10, 1]


def test_requests_are_held_out_whole_and_grouped_in_order():
    request = np.repeat(np.arange(30), np.arange(1, 31)).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in range(1, 31)]).astype(np.int32)
    shuffle = np.random.default_rng(0).permutation(len(request))
    columns = {"ids": torch.from_numpy(np.stack([request, position], axis=1)[shuffle])}
    data = Requests(columns, request[shuffle], position[shuffle], seed=0)
    assert sorted([*data.fit, *data.check]) == list(range(30)) and len(data.check)
    assert 0.1 <= data.tokens_P[data.check].sum() / len(request) < 0.2
    groups = data.groups(data.fit, 50)
    assert np.array_equal(np.concatenate(groups), data.fit)
    for tokens in (1, 20, 100, 10**6):
        sizes = {len(data.groups(np.random.default_rng(s).permutation(data.fit), tokens)) for s in range(5)}
        assert len(sizes) == 1 and all(len(group) for group in data.groups(data.fit[::-1], tokens))
    batch = data.batch(groups[0], torch.device("cpu"))
    assert batch.columns["ids"].tolist() == [[p, i] for p in groups[0] for i in range(p + 1)]
    padded = batch.padded(batch.columns["ids"])
    assert torch.equal(padded[batch.real_BS(torch.device("cpu"))], batch.columns["ids"])


def test_long_requests_are_cut_and_short_recordings_are_both():
    one = np.zeros(3000, np.int32)
    data = Requests({"ids": torch.zeros(3000, 1)}, one, np.arange(3000, dtype=np.int32), seed=0)
    assert data.tokens_P.tolist() == [1024, 1024, 952]
    assert data.fit.tolist() == data.check.tolist() == [0, 1, 2], "pieces of one request are not kept apart"


def sparsemax_by_sorting(scores):
    """The definition: the threshold that makes the positive parts sum to 1, tried for every size of the support."""
    ordered = np.sort(scores)[::-1]
    for size in range(len(scores), 0, -1):
        threshold = (ordered[:size].sum() - 1) / size
        if ordered[size - 1] > threshold:
            return np.maximum(scores - threshold, 0)
    raise AssertionError


def test_sparsemax():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 12)) * rng.choice([0.01, 1, 10], (50, 1))
    found = sparsemax(torch.from_numpy(scores)).numpy()
    assert found == pytest.approx(np.stack([sparsemax_by_sorting(row) for row in scores]), abs=1e-12)
    assert found.sum(axis=1) == pytest.approx(1)
    assert sparsemax(torch.tensor([0.0, 5.0, 0.0])).tolist() == [0, 1, 0]
    assert sparsemax(torch.from_numpy(scores) + 7).numpy() == pytest.approx(found), "a shift changes nothing"
    masked = torch.tensor([0.3, -np.inf, 0.1], requires_grad=True)
    sparsemax(masked)[0].backward()
    assert sparsemax(masked).tolist() == pytest.approx([0.6, 0, 0.4]) and torch.isfinite(masked.grad).all()
    assert torch.autograd.gradcheck(sparsemax, torch.from_numpy(scores[:5]).requires_grad_())


def test_sru_against_a_plain_loop():
    layer = Sru(6).double()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.from_numpy(rng.normal(size=p.shape)))
    x_BSW = rng.normal(size=(3, 7, 6))
    found = layer.outputs(torch.from_numpy(x_BSW)).detach().numpy()
    matrix, bias = layer.inputs.weight.detach().numpy(), layer.inputs.bias.detach().numpy()
    v_f, v_r = layer.recurrent_2W.detach().numpy()

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    for b in range(3):
        c = np.zeros(6)
        for t in range(7):
            new, forget, reset = np.split(matrix @ x_BSW[b, t] + bias, 3)
            f, r = sigmoid(forget + v_f * c), sigmoid(reset + v_r * c)
            c = f * c + (1 - f) * new
            assert found[b, t] == pytest.approx(r * c + (1 - r) * x_BSW[b, t])


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_flows_from_padding_or_against_the_order(causal):
    mixer = SparseLstm(8, 1, causal)
    initialise(mixer, 0)
    x_BSW = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    real_BS = torch.arange(6) < torch.tensor([[6], [4]])
    with torch.no_grad():
        whole = mixer.mixed(x_BSW, real_BS)
        short = mixer.mixed(x_BSW[1:, :4], real_BS[1:, :4])
        head = mixer.mixed(x_BSW[:1, :3], real_BS[:1, :3])
    assert torch.allclose(whole[1, :4], short[0], atol=1e-6)
    assert torch.allclose(whole[0, :3], head[0], atol=1e-6) == causal


def test_sharpness_is_the_likeliest():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(400, 2, 5)))
    truth = torch.tensor([0.5, 3.0])
    p = (logits * truth[:, None]).softmax(-1).reshape(-1, 5)
    ids = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0)).view(400, 2, 1)
    found = fitted_sharpness(logits, ids)
    grid = torch.linspace(0.05, 6, 1200, dtype=torch.float64)
    for layer in range(2):
        by_grid = [float(cross_entropy(logits[:, layer : layer + 1] * g, ids[:, layer : layer + 1])) for g in grid]
        assert float(found[layer]) == pytest.approx(float(grid[int(np.argmin(by_grid))]), abs=0.01)
    always = fitted_sharpness(torch.eye(4)[:, None], torch.arange(4)[:, None, None])
    assert 10 < float(always) <= 64, "certain, as far as that goes"


def test_cross_entropy_counts_each_chosen_expert_alike():
    logits = torch.tensor([[[2.0, 1.0, 0.0]]])
    batch = Batch(columns={"ids": torch.tensor([[[0, 2]]])}, lengths=[1])
    expected = -np.log(np.exp([2, 0]) / np.exp([2, 1, 0]).sum()).mean()
    assert float(cross_entropy(logits, batch.columns["ids"])) == pytest.approx(expected)
