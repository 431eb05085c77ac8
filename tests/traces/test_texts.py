"""Texts from files, folders, standard input and data sets; names, digests, and what is wrong with them."""

import hashlib
import io
import json
import sys
from types import SimpleNamespace

import pytest

from moesim.traces import InputError
from moesim.traces.texts import Text, check_names, read_dataset, read_texts


def test_a_text_and_its_digest_are_those_of_the_file(tmp_path):
    content = "one\r\ntwo\n\n  \u4e09\r".encode()
    (tmp_path / "b.txt").write_bytes(content)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.md").write_text("not taken")
    first, second = read_texts([tmp_path])
    assert (first.name, second.name) == ("a.txt", "b.txt")
    for _ in range(2):  # reading again counts anew
        assert [d.encode() for d in second.documents()] == [content]
        assert second.about() == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_digest_is_of_the_documents_that_were_read():
    text = Text("d", (f"document {i}" for i in range(10**9)), {"dataset": "d", "split": "train"})
    documents = text.documents()
    assert [next(documents), next(documents)] == ["document 0", "document 1"]
    digest = hashlib.sha256(b"document 0document 1").hexdigest()
    assert text.about() == {"dataset": "d", "split": "train", "documents": 2, "bytes": 20, "sha256": digest}


def test_standard_input_is_a_text(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("na\u00efve".encode())))
    (text,) = read_texts([tmp_path.__class__("-")])
    assert (text.name, list(text.documents())) == ("stdin", ["na\u00efve"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b" \n", r"x.txt: the text is empty"),
        ("x.txt", b"na\xefve", r"x.txt: not UTF-8 text \(byte 2\); convert it first"),
        ("x.md", b"markdown", r"the folder has no .txt file"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        read_texts([tmp_path])
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.txt: cannot be read \(No such file"):
        read_texts([tmp_path / "nowhere.txt"])


def test_texts_of_the_same_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("text")
    with pytest.raises(InputError, match=r"two texts are called x.txt"):
        read_texts([tmp_path / "a", tmp_path / "b"])
    check_names([Text("a", []), Text("b", [])])


def test_a_missing_library_is_named_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'--dataset needs the datasets library: pip install "moesim\[datasets\]"'):
        read_dataset("wikitext", split="train", column="text", limit=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Documents as data sets come: lines of JSON, a table, a folder; the library's cache stays in here, too."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": f"document {i}" if i != 2 else "  ", "label": i} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.csv").write_text("body,label\n" + "".join(f"row {i},{i}\n" for i in range(3)))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text('{"text": "of train"}\n')
    (tmp_path / "corpus" / "test.jsonl").write_text('{"text": "of test"}\n')
    return tmp_path


def test_documents_of_a_data_set(folder):
    text = read_dataset(str(folder / "x.jsonl"), split="train", column="text", limit=4)
    assert (text.name, list(text.documents())) == ("x.jsonl", [f"document {i}" for i in (0, 1, 3, 4)])
    assert (text.about()["documents"], text.about()["column"], text.about()["revision"]) == (4, "text", None)
    table = read_dataset(str(folder / "x.csv"), split="train", column="body", limit=100)
    assert list(table.documents()) == ["row 0", "row 1", "row 2"]
    corpus = read_dataset(str(folder / "corpus"), split="test", column="text", limit=100)
    assert (corpus.name, list(corpus.documents())) == ("corpus", ["of test"])
    assert str(folder) not in str([text.about(), table.about(), corpus.about()])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.jsonl", {"column": "body"}, r"'body' is not a column of text; columns of text: text$"),
        ("x.jsonl", {"column": "label"}, r"'label' is not a column of text"),
        ("x.jsonl", {"split": "validation"}, r"the data set cannot be read: .*validation"),
        ("x.jsonl", {"limit": 0}, r"at least 1 document, got 0"),
        ("broken.jsonl", {}, r"the data set cannot be read"),
        ("x.pickle", {}, r"must be one of .json, .jsonl, .csv"),
        ("nowhere", {}, r"the data set cannot be read"),
    ],
)
def test_a_bad_data_set_is_one_line(folder, name, options, message):
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "x.pickle").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=message) as refused:
        list(
            read_dataset(str(folder / name), **{"split": "train", "column": "text", "limit": 9, **options}).documents()
        )
    assert "\n" not in str(refused.value)
