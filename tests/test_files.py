"""Files that are there whole or not at all, in the order that makes it so; settings compared by name."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from fastkd import difficulty, files, store
from fastkd.hf import Head

from .test_store import computes, opened, ragged, wide_llama


def a_text(folder: Path) -> Path:
    files.write_whole(folder / "a.txt", "text")
    return folder / "a.txt"


def scores(folder: Path) -> Path:
    difficulty._write(folder / "scores.parquet", pa.table({"id": ["a"], "score": [1.0]}))
    return folder / "scores.parquet"


def a_shard(folder: Path) -> Path:
    filled = opened(folder / "s", ragged(4))
    filled.fill([0], computes(wide_llama())[0])
    return filled._file(0)


def a_head(folder: Path) -> Path:
    store.write_head(folder / "t" / "head.safetensors", Head(torch.randn(3, 2), None, None, 1.0), {})
    return folder / "t" / "head.safetensors"


@pytest.mark.parametrize("write", [a_text, scores, a_shard, a_head])
def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch, write):
    """Else a power cut can leave a file of the right name with nothing in it. Files are known by their inode, which a renaming keeps."""
    events, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        fsync(descriptor)
        found = os.fstat(descriptor)
        events.append(("flush", found.st_ino, found.st_size))

    def renamed(source, target):
        replace(source, target)
        events.append(("rename", Path(target)))

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.os, "replace", renamed)
    path = write(tmp_path)
    content, folder = path.stat(), path.parent.stat().st_ino
    at = events.index(("rename", path))
    assert events[at - 1] == ("flush", content.st_ino, content.st_size)
    assert events[at + 1][:2] == ("flush", folder)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / f".other.json~{files._host()}~{os.getpid()}~0000.tmp"  # an earlier process with this one's id
    left.write_text("half")
    strange = tmp_path / ".mine.tmp"
    strange.write_text("")
    files.write_whole(tmp_path / "a.json", "{}", tidy=False)
    assert left.exists()
    files.write_whole(tmp_path / "a.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "a.json"]


def test_a_failed_write_leaves_the_old_content_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_flat():
    tree = {"a": 1, "b": {"c": [1, {"d": 2}], "e": {}}, "f": None}
    assert files.flat(tree) == {"a": 1, "b.c": [1, {"d": 2}], "f": None}
    assert files.flat(tree, lists=True) == {"a": 1, "b.c.0": 1, "b.c.1.d": 2, "f": None}


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1.0}, "c": 2}, None),
        ({"a": {"b": "x"}, "c": 2}, {"c": 3, "a": {"b": "y"}}, "c is 2 there and 3 here"),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, 'a.b is "x" there and "y" here'),
        ({}, {"a": None}, "a is nothing there and null here"),
        ({"a": [1]}, {}, "a is [1] there and nothing here"),
    ],
)
def test_the_first_difference(there, here, message):
    assert files.first_difference(there, here) == message
    assert files.first_difference(there, here, ignored=("a", "a.b", "c")) is None


def test_a_hash_does_not_depend_on_orders():
    names = [f"name{i}" for i in range(20)]
    assert files.json_hash({"a": set(names), "b": 1}) == files.json_hash({"b": 1, "a": set(names)})
    assert files.json_hash({"a": set(names)}) == files.json_hash({"a": sorted(names)})
    assert files.json_hash({"a": {"x"}}) != files.json_hash({"a": {"y"}})
