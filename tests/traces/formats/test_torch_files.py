"""Torch files: plain data comes back as it was saved; what is more than that, or promises more, is refused unloaded."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from moesim.traces import InputError
from moesim.traces.formats.torch_files import array_of, is_torch, load_torch, save_torch


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6).reshape(2, 3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.uint16),
        torch.nn.Parameter(torch.ones(3)),
        torch.arange(3).expand(4, 3),
    ],
    ids=["int64", "bfloat16", "uint16", "parameter", "expanded"],
)
def test_tensors_come_back(tmp_path, value):
    torch.save({"a": value, "b": [1, 0.5, None, "x"]}, tmp_path / "x.pt")
    found = load_torch(tmp_path / "x.pt")
    assert is_torch(tmp_path / "x.pt") and found["b"] == [1, 0.5, None, "x"]
    assert array_of(found["a"], "a", value.ndim).tolist() == value.tolist()


def test_saved_arrays_are_tensors_for_others(tmp_path):
    save_torch({"a": np.arange(3), "b": [np.ones(2), 4]}, tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["a"].tolist() == [0, 1, 2] and found["b"][1] == 4
    with pytest.raises(InputError, match="exists already"):
        save_torch({}, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "call",
    [(bytearray, 1 << 40), (torch.Tensor, 1 << 20, 1 << 20), (Path.touch, Path("executed")), (set, [1])],
    ids=["bytearray", "tensor", "touch", "set"],
)
def test_calls_are_refused_before_they_are_made(tmp_path, monkeypatch, call):
    """torch's own `weights_only` makes the first two, at the cost of their memory."""
    monkeypatch.chdir(tmp_path)
    torch.save({"logical_count": Calls(*call)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: not a sound torch file, or it holds more than plain data \('"):
        load_torch(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_a_pickle_before_the_zip_is_refused(tmp_path):
    """A zip may have anything before it; torch would read the front, the checks the back."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    torch.save({"a": torch.ones(2)}, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes(old.getvalue() + (tmp_path / "x.pt").read_bytes())
    with pytest.raises(InputError, match="not a torch file in zip form"):
        load_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("cut", [0, 3, 200, -1])
def test_cut_files(tmp_path, cut):
    torch.save(torch.ones(500), tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:cut])
    with pytest.raises(InputError, match=r"x\.pt: "):
        load_torch(tmp_path / "x.pt")


def test_a_storage_smaller_than_its_tensor(tmp_path):
    torch.save(torch.ones(500), whole := io.BytesIO())
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, data[:100] if member.filename.endswith("data/0") else data)
    with pytest.raises(InputError, match=r"x\.pt: "):
        load_torch(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("value", "ndim", "message"),
    [
        (torch.ones(2, 2), 1, "in 1 dimensions"),
        (torch.ones(2).to_sparse(), 1, "cannot be read"),
        (torch.zeros(2, device="meta"), 1, "cannot be read"),
        (torch.ones(2, dtype=torch.complex64), 1, "must be a tensor of numbers"),
        (torch.ones(1).expand(1 << 20, 1 << 20), 2, "promises 1,099,511,627,776 numbers"),
        ([[1], [2, 3]], 2, "ragged"),
        (["a"], 1, "must be numbers"),
        ([True], 1, "must be numbers"),
        ([10**30], 1, "must be numbers"),
        ("12", 1, "must be a tensor"),
        (None, 1, "must be a tensor"),
    ],
)
def test_values_that_are_no_array(value, ndim, message):
    with pytest.raises(InputError, match=f"^it: .*{message}"):
        array_of(value, "it", ndim)


def test_lists_keep_every_digit():
    assert array_of([16_777_217.0, 2.0], "it", 1).tolist() == [16_777_217.0, 2.0]
    assert array_of([], "it", 1).dtype == np.int64
