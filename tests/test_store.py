"""The store: what it holds is what the teacher says, bit for bit, and no fault goes unnoticed."""

import errno
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from fastkd import files as files_module
from fastkd import store as store_module
from fastkd.data import KDCollator
from fastkd.hf import Head, head_of, run_body
from fastkd.pacing import sample_table
from fastkd.store import Store, StoreError, StoreSpec, check_room, folder_name, read_head, write_head

from .tiny import VOCABULARY, tiny_llama

WIDTH = 576  # narrower models give the same bits in every batch


def ragged(n: int, longest: int = 48) -> Dataset:
    """Tokenised rows of different lengths, of which a prefix and some tokens in between do not count."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for i in range(n):
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(4, longest + 1, (), generator=generator)),), generator=generator).tolist()
        prompt = 1 + len(ids) // 3
        labels = [-100] * prompt + [-100 if (j + i) % 5 == 0 else t for j, t in enumerate(ids[prompt:])]
        labels[-1] = ids[-1]
        made.append({"input_ids": ids, "labels": labels, "sample_index": 3 * i + 1, "sample_id": f"s{i}"})
    return Dataset.from_list(made)


def wide_llama():
    return tiny_llama(2, hidden=WIDTH, heads=9).eval()


def computes(model):
    """What fills a store, and the number of its calls."""
    calls = []

    def compute(batch):
        calls.append(batch["sample_index"].tolist())
        with torch.no_grad():
            hidden, _ = run_body(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return hidden, head_of(model)

    return compute, calls


def opened(folder, data=None, expected=None, temperature=1.0, vocabulary=None, width=WIDTH, collate=None, **spec) -> Store:
    return Store.open(
        folder,
        StoreSpec(folder.parent, **{"batch_size": 4, **spec}),
        {"teacher": {"weights": "w", "dtype": "float32"}, "tokenizer": "t", "max_length": 64} if expected is None else expected,
        ragged(30) if data is None else data,
        collate or KDCollator(0),
        width=width,
        dtype=torch.float32,
        temperature=temperature,
        vocabulary=vocabulary,
    )


def begun(folder, *args, **kwargs) -> Store:
    """A store of which one file is there, so that its settings hold."""
    store = opened(folder, *args, **kwargs)
    store._file(0).touch()
    return store


def live(store: Store, model) -> dict[int, torch.Tensor]:
    """By row, the hidden states of the counted positions, from a live pass over the canonical batches."""
    found = {}
    for i, rows in enumerate(store.batches):
        batch = store.batch(i)
        with torch.no_grad():
            hidden, _ = run_body(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for row, h, labels in zip(rows.tolist(), hidden, batch["shift_labels"], strict=True):
            found[row] = h[labels != -100]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(rows, expected) -> bool:
    return all(torch.equal(row["hidden"], expected[i]) for i, row in enumerate(rows))


class TestBits:
    def test_another_batch_gives_other_bits(self):
        """Why the batches are canonical. Here: each row alone, padded to another length."""
        model, data = wide_llama(), ragged(30)
        alone, together = {}, {}
        with torch.no_grad():
            for rows, found in (([[r] for r in data], alone), ([list(data)], together)):
                for group in rows:
                    batch = KDCollator(0)(group)
                    hidden, _ = run_body(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                    for row, h in zip(group, hidden, strict=True):
                        found[row["sample_id"]] = h[: len(row["input_ids"])]
        for key in alone:
            torch.testing.assert_close(alone[key], together[key], atol=1e-3, rtol=1e-3)
        if all(torch.equal(alone[key], together[key]) for key in alone):
            pytest.skip("this machine computes the same bits in every batch")

    def test_filled_before_lazily_or_again_it_is_the_live_pass(self, tmp_path):
        model = wide_llama()
        compute, calls = computes(model)
        before = opened(tmp_path / "before")
        expected = live(before, model)
        assert before.missing() == list(range(8))
        assert not before.complete
        before.fill(before.missing(), compute)
        assert before.complete
        assert same(before.read(range(30)), expected)

        lazy = opened(tmp_path / "lazy")
        order = torch.randperm(30).tolist()
        for group in (order[i : i + 3] for i in range(0, 30, 3)):
            lazy.fill(lazy.missing(group, verify=True), compute)
            assert all(torch.equal(row["hidden"], expected[i]) for i, row in zip(group, lazy.read(group), strict=True))
        assert len(calls) == 16  # each batch once
        assert contents(lazy.folder) == contents(before.folder)

        (lazy.folder / "batch-0000003.safetensors").unlink()
        again = opened(tmp_path / "lazy")
        assert again.missing() == [3]
        again.fill([3], compute)
        assert contents(again.folder) == contents(before.folder)
        assert same(opened(tmp_path / "lazy").read(range(30)), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_every_dtype_comes_back(self, tmp_path, dtype):
        model = wide_llama().to(dtype)
        store = opened(tmp_path / "s")
        store.fill(store.missing(), computes(model)[0])
        rows = opened(tmp_path / "s").read(range(30))
        assert rows[0]["hidden"].dtype == dtype
        assert same(rows, live(store, model))

    def test_batches_follow_from_the_rows_alone(self, tmp_path):
        data = ragged(40)
        store = opened(tmp_path / "s", data, batch_size=2)  # 16 batches to a block
        lengths = [len(ids) for ids in data["input_ids"]]
        assert sorted(row for rows in store.batches for row in rows.tolist()) == list(range(40))
        first = [row for rows in store.batches[:16] for row in rows.tolist()]
        assert sorted(first) == list(range(32))
        assert [lengths[row] for row in first] == sorted(lengths[:32])
        assert store.tokens == sum(label != -100 for labels in data["labels"] for label in labels[1:])
        assert store.counted([5, 2]) == [sum(label != -100 for label in data[row]["labels"][1:]) for row in (5, 2)]

    def test_a_first_label_does_not_count(self, tmp_path):
        """Nothing predicts a row's first token: the store, the plan's table and the training see the same tokens."""
        data = ragged(5)
        labels = [[ids[0], *row[1:]] for ids, row in zip(data["input_ids"], data["labels"], strict=True)]
        marked = data.remove_columns("labels").add_column("labels", labels)
        expected = [sum(label != -100 for label in row[1:]) for row in labels]
        store = opened(tmp_path / "s", marked)
        assert store.counted(range(5)) == expected
        assert sample_table(marked).counted == expected
        assert (KDCollator(0)(list(marked))["shift_labels"] != -100).sum(1).tolist() == expected
        store.fill(store.missing(), computes(wide_llama())[0])
        assert [len(row["hidden"]) for row in store.read(range(5))] == expected

    def test_samples_are_found_by_their_index(self, tmp_path):
        store = opened(tmp_path / "s", ragged(30).select([7, 3, 20]))
        assert store.positions([61, 10, 22]).tolist() == [2, 1, 0]
        with pytest.raises(ValueError, match="sample_index 11 is not in the store's data set of 3 rows"):
            store.positions([61, 11])
        data = ragged(3).remove_columns("sample_index").add_column("sample_index", [1, 2, 1])
        with pytest.raises(ValueError, match="sample_index: two rows"):
            opened(tmp_path / "t", data)

    def test_what_is_not_there_is_not_read(self, tmp_path):
        with pytest.raises(StoreError, match="missing, or damaged and removed"):
            opened(tmp_path / "s").read([0])

    def test_a_collator_that_drops_tokens_is_refused(self, tmp_path):
        compute, _ = computes(wide_llama())
        cut = ragged(6).map(lambda row: {"labels": [-100] * len(row["labels"])})
        store = opened(tmp_path / "s", ragged(6))
        store._dataset = cut
        with pytest.raises(ValueError, match="the collator drops tokens of batch 0"):
            store.fill([0], compute)

    def test_many_files_are_read_with_few_open(self, tmp_path, monkeypatch):
        monkeypatch.setattr(store_module, "_OPEN_FILES", 2)
        model = wide_llama()
        store = opened(tmp_path / "s")
        store.fill(store.missing(), computes(model)[0])
        expected = live(store, model)
        for _ in range(2):
            assert same(store.read(range(30)), expected)
            assert len(store._handles) == 2


EXPECTED = {"teacher": {"weights": "w", "config": "c", "dtype": "float32"}, "tokenizer": "t", "template": None, "max_length": 64}


class TestManifest:
    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            (
                "hidden",
                {"expected": {**EXPECTED, "teacher": {**EXPECTED["teacher"], "weights": "x"}}},
                'teacher.weights is "w" .* "x" here',
            ),
            ("hidden", {"expected": {**EXPECTED, "teacher": {**EXPECTED["teacher"], "config": "x"}}}, 'teacher.config is "c" .* "x" here'),
            ("hidden", {"expected": {**EXPECTED, "teacher": {**EXPECTED["teacher"], "dtype": "bfloat16"}}}, "teacher.dtype"),
            ("hidden", {"expected": {**EXPECTED, "teacher": {**EXPECTED["teacher"], "layers": [1]}}}, "teacher.layers is nothing there"),
            ("hidden", {"expected": {**EXPECTED, "tokenizer": "u"}}, "tokenizer"),
            ("hidden", {"expected": {**EXPECTED, "template": "u"}}, 'template is null there and "u" here'),
            ("hidden", {"expected": {**EXPECTED, "max_length": 65}}, "max_length is 64 there and 65 here"),
            ("hidden", {"expected": {k: v for k, v in EXPECTED.items() if k != "max_length"}}, "max_length is 64 there and nothing here"),
            ("hidden", {"batch_size": 5}, "batch_size is 4 there and 5 here"),
            ("hidden", {"kind": "topk"}, 'kind is "hidden" there and "topk" here'),
            ("topk", {"kind": "sampled"}, 'kind is "topk" there and "sampled" here'),
            ("topk", {"top_k": 3}, "top_k is 64 there and 3 here"),
            ("topk", {"temperature": 2.0}, "temperature is 1.0 there and 2.0 here"),
            ("topk", {"vocabulary": 30}, "student_vocabulary is null there and 30 here"),
            ("sampled", {"samples": 3}, "samples is 50 there and 3 here"),
            ("sampled", {"seed": 3}, "seed is 0 there and 3 here"),
            ("hidden", {"data": ragged(29)}, "data.rows is 30 there and 29 here"),
            (
                "hidden",
                {"collate": lambda rows: KDCollator(0)([{**row, "input_ids": [5, *row["input_ids"][1:]]} for row in rows])},
                "collator",
            ),
            ("hidden", {"collate": KDCollator(0, pad_to_multiple_of=8)}, "collator"),
        ],
    )
    def test_other_settings_are_refused_with_the_field(self, tmp_path, kind, changes, message):
        begun(tmp_path / "s", **{"expected": EXPECTED, "kind": kind})
        with pytest.raises(StoreError, match=f"{tmp_path}/s: this store was filled with other settings: {message}.* or delete this folder"):
            opened(tmp_path / "s", **{"expected": EXPECTED, "kind": kind, **changes})
        opened(tmp_path / "s", **{"expected": EXPECTED, "kind": kind})

    def test_every_edit_of_the_data_is_seen(self, tmp_path):
        data = ragged(30)
        begun(tmp_path / "s", data)

        def edited(column, change):
            values = data[column][:]
            values[4] = change(values[4])
            return Dataset.from_dict({**data.to_dict(), column: values})

        for column, change in (
            ("input_ids", lambda ids: [*ids[:-1], ids[-1] - 1]),
            ("labels", lambda labels: [*labels[:-1], labels[-1] - 1]),
            ("sample_id", lambda name: name + "x"),
        ):
            with pytest.raises(StoreError, match=r"data\.sha256 is"):
                opened(tmp_path / "s", edited(column, change))
        with pytest.raises(StoreError, match=r"data\.sha256 is"):
            opened(tmp_path / "s", data.select([1, 0, *range(2, 30)]))
        packed = data.add_column("position_ids", [list(range(len(ids))) for ids in data["input_ids"]])
        with pytest.raises(StoreError, match=r"data\.sha256 is"):  # it would be a model's input
            opened(tmp_path / "s", packed)
        opened(tmp_path / "s", data.add_column("score", [1.0] * 30))  # it would not
        opened(tmp_path / "s", data.select(range(30)))
        opened(tmp_path / "s", Dataset.from_list(list(data)))  # the types of whole numbers do not matter

    @pytest.mark.parametrize("kind", ["hidden", "topk"])
    def test_hidden_states_hold_for_any_temperature_and_vocabulary(self, tmp_path, kind):
        opened(tmp_path / "s", kind=kind)
        if kind == "hidden":
            opened(tmp_path / "s", kind=kind, temperature=3.0, vocabulary=7, top_k=3, samples=2)
        else:
            opened(tmp_path / "s", kind=kind, samples=2, seed=9)  # of draws

    @pytest.mark.parametrize(
        "damage", [lambda b: b[: len(b) // 2], lambda b: b.replace(b'"w"', b'"v"'), lambda b: b"\xff" + b, lambda b: b""]
    )
    def test_a_damaged_manifest_is_written_again_and_what_is_sound_stays(self, tmp_path, damage, caplog):
        store = opened(tmp_path / "s")
        compute, _ = computes(wide_llama())
        store.fill(store.missing(), compute)
        manifest = tmp_path / "s" / "manifest.json"
        good = manifest.read_bytes()
        manifest.write_bytes(damage(good))
        with caplog.at_level(logging.WARNING, "fastkd"):
            again = opened(tmp_path / "s")
        assert "manifest.json: damaged" in caplog.text
        assert manifest.read_bytes() == good
        assert again.missing(verify=True) == []

        manifest.unlink()  # files of other settings do not pass for those of these
        other = opened(tmp_path / "s", temperature=2.0, expected={"tokenizer": "another"})
        assert other.missing(verify=True) == list(range(8))
        assert "written for another store" in caplog.text

    def test_settings_of_an_empty_store_do_not_hold(self, tmp_path):
        """A store that was refused for want of room, say, and is opened with those settings that the message advised."""
        opened(tmp_path / "s", kind="hidden")
        opened(tmp_path / "s", kind="topk")
        assert json.loads((tmp_path / "s" / "manifest.json").read_text())["fields"]["kind"] == "topk"
        begun(tmp_path / "s", kind="topk")
        with pytest.raises(StoreError, match='kind is "topk" there and "hidden" here'):
            opened(tmp_path / "s", kind="hidden")

    def test_where_a_row_stands_does_not_matter(self, tmp_path):
        begun(tmp_path / "s", ragged(6))
        moved = ragged(6).remove_columns("sample_index").add_column("sample_index", list(range(6)))
        opened(tmp_path / "s", moved)  # the samples are known by their ids

    def test_notes_are_kept_and_not_compared(self, tmp_path):
        for version in "ab":
            arguments = {"width": 8, "dtype": torch.float32, "notes": {"torch": version}}
            Store.open(tmp_path / "s", StoreSpec(tmp_path), {}, ragged(3), KDCollator(0), **arguments)
            assert json.loads((tmp_path / "s" / "manifest.json").read_text())["notes"] == {"torch": "a"}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kind": "logits"}, "store.kind: expected one of hidden, topk, sampled, got 'logits'"),
            ({"max_gb": 0}, "store.max_gb: expected a number > 0, got 0"),
            ({"max_gb": math.nan}, "store.max_gb"),
            ({"batch_size": 0}, "store.batch_size: expected a whole number >= 1, got 0"),
            ({"top_k": 1.5}, "store.top_k"),
            ({"samples": True}, "store.samples"),
        ],
    )
    def test_settings_out_of_range(self, tmp_path, settings, message):
        with pytest.raises(StoreError, match=message):
            StoreSpec(tmp_path, **settings)

    def test_names_become_one_folder_each(self):
        names = ["weak", "org/name", "..", ".", "", "a b", "a%2Fb", "a/b", "é"]
        folders = [folder_name(name) for name in names]
        assert len(set(folders)) == len(names)
        assert folders[0] == "weak"
        assert not any("/" in folder or folder in (".", "..", "") for folder in folders)


class TestDamage:
    def test_a_flipped_bit_or_a_cut_is_found_named_and_computed_again(self, tmp_path, caplog):
        model = wide_llama()
        compute, _ = computes(model)
        store = opened(tmp_path / "s", ragged(6))
        store.fill(store.missing(), compute)
        expected, sound = live(store, model), contents(store.folder)
        file = store.folder / "batch-0000001.safetensors"
        good = file.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        places = [0, 7, 8, 20, header // 2, good.index(b"sha256") + 12, header, header + 1, (header + len(good)) // 2, len(good) - 1]
        damages = [good[:p] + bytes([good[p] ^ 16]) + good[p + 1 :] for p in places]
        damages += [good[:n] for n in (0, 4, 8, 50, header, header + 5, len(good) - 1)] + [good + b"x", b"\0" * len(good)]
        damages.append((store.folder / "batch-0000000.safetensors").read_bytes())  # sound, in the wrong place
        for damage in damages:
            file.write_bytes(damage)
            caplog.clear()
            again = opened(tmp_path / "s", ragged(6))
            assert again.missing() == []
            with caplog.at_level(logging.WARNING, "fastkd"):
                assert again.missing(verify=True) == [1], damage[:100]
            assert str(file) in caplog.text
            assert not file.exists()
            again.fill([1], compute)
            assert contents(store.folder) == sound
            assert same(again.read(range(6)), expected)

    def test_damage_is_found_at_the_first_read_too(self, tmp_path):
        store = opened(tmp_path / "s", ragged(6))
        store.fill(store.missing(), computes(wide_llama())[0])
        file = store.folder / "batch-0000001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        again = opened(tmp_path / "s", ragged(6))
        with pytest.raises(StoreError, match="batch-0000001"):
            again.read(range(6))

    def test_a_full_disk_is_one_clear_error_and_leaves_the_store_usable(self, tmp_path):
        model = wide_llama()
        compute, _ = computes(model)
        store = opened(tmp_path / "s")
        sizes = [int(store._facts(i)["tokens"]) * WIDTH * 4 for i in range(8)]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (sorted(sizes)[5], before[1]))  # the largest files are beyond it
        try:
            with pytest.raises(StoreError, match=r"batch-000000\d.safetensors: the disk is full") as caught:
                store.fill(store.missing(), compute)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value)
        assert not list(store.folder.glob(".*"))
        left = store.missing()
        assert 0 < len(left) < 8
        store.fill(left, compute)
        assert same(opened(tmp_path / "s").read(range(30)), live(store, model))

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_every_failure_of_the_writer_is_a_store_error(self, tmp_path, monkeypatch, code):
        compute, _ = computes(wide_llama())
        store = opened(tmp_path / "s", ragged(6))
        written = []

        def write(descriptor, data):
            written.append(len(data))
            if len(written) == 2:
                raise OSError(code, os.strerror(code))
            return real(descriptor, data[:1000])

        real = os.write
        monkeypatch.setattr(files_module.os, "write", write)
        with pytest.raises(StoreError, match="cannot be written" if code == errno.EIO else "the disk is full"):
            store.fill([0], compute)
        monkeypatch.undo()
        assert [path.name for path in store.folder.iterdir()] == ["manifest.json"]
        assert store.missing() == [0, 1]

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="the store's folder cannot be made"):
            opened(tmp_path / "file" / "s")

    @pytest.mark.slow
    def test_killed_in_the_middle_of_writing(self, tmp_path):
        """Killed again and again while it writes; what is there is whole, and in the end equal to a store never disturbed."""
        compute, _ = computes(wide_llama())
        calm = opened(tmp_path / "calm")
        calm.fill(calm.missing(), compute)
        code = (
            "import os, time; from pathlib import Path; from tests.test_store import *; real = os.write\n"
            "def slowly(d, data):\n    time.sleep(0.002); return real(d, data[:20000])\n"
            "files_module.os.write = slowly\n"
            f"store = opened(Path({str(tmp_path / 'torn')!r})); store.fill(store.missing(), computes(wide_llama())[0])\n"
        )
        folder, kills = tmp_path / "torn", 0
        for attempt in range(2):
            process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
            deadline = time.time() + 120
            try:
                while process.poll() is None and time.time() < deadline:
                    partial = [p for p in folder.glob(".batch*.tmp") if p.exists() and f"~{process.pid}~" in p.name]
                    if len(list(folder.glob("batch-*"))) > 2 * attempt and any(_size(p) > 30000 for p in partial):
                        break
                    time.sleep(0.001)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
            kills += bool(list(folder.glob(".batch*.tmp")))
            whole = contents(calm.folder)
            assert all(whole[path.name] == path.read_bytes() for path in folder.glob("batch-*"))
        assert kills >= 1
        torn = opened(folder)
        assert not list(folder.glob(".*"))  # what the killed left behind
        torn.fill(torn.missing(verify=True), compute)
        assert contents(folder) == contents(calm.folder)

    def test_temporary_files_of_others_are_left_to_them(self, tmp_path):
        folder = opened(tmp_path / "s").folder
        host, old = files_module._host(), time.time() - 4000
        alive = folder / f".batch-0000000.safetensors~{host}~{os.getppid()}~0000.tmp"
        elsewhere = folder / f".batch-0000000.safetensors~other-host~{os.getpid()}~0000.tmp"
        namesake = folder / f".batch-0000000.safetensors~{host}~{os.getpid()}~0000.tmp"
        forgotten = folder / f".batch-0000001.safetensors~other-host~{os.getpid()}~0000.tmp"
        strange = folder / ".mine.tmp"
        for path in (alive, elsewhere, namesake, forgotten, strange):
            path.write_text("")
        os.utime(forgotten, (old, old))
        opened(tmp_path / "s")
        assert [p.exists() for p in (alive, elsewhere, namesake, forgotten, strange)] == [True, True, False, False, True]

    def test_two_fill_the_same_store(self, tmp_path):
        compute, _ = computes(wide_llama())
        one, other = opened(tmp_path / "s", ragged(6)), opened(tmp_path / "s", ragged(6))
        one.fill([0], compute)
        assert other.missing() == [1]  # seen without opening the store again
        other.fill([0, 1], compute)
        assert one.missing(verify=True) == []
        assert same(one.read(range(6)), live(one, wide_llama()))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class TestRoom:
    def test_the_prediction_is_what_it_takes(self, tmp_path):
        for kind in ("hidden", "topk", "sampled"):
            store = opened(tmp_path / kind, kind=kind, top_k=5, samples=6)
            predicted = store.predicted_bytes()
            store.fill(store.missing(), computes(wide_llama())[0])
            taken = sum(path.stat().st_size for path in store.folder.glob("batch*"))
            assert taken <= predicted
            if kind != "sampled":  # an upper bound for that: draws fall together
                assert predicted < taken + 1000 * len(store.batches)
            assert sum(store.predicted_bytes([i]) for i in range(8)) == predicted

    def test_more_than_allowed_is_refused_with_both_numbers(self, tmp_path):
        store = opened(tmp_path / "s")
        need = store.predicted_bytes() + 5000
        check_room([store], 5000, need / 1e9)
        with pytest.raises(
            StoreError, match=r"store.max_gb: .* needs .* kB, allowed are .* kB; about \d+ of \d+ tokens would fit"
        ) as caught:
            check_room([store], 5000, 0.5 * need / 1e9)
        fits = int(str(caught.value).split("about ")[1].split()[0])
        assert 0.45 * store.tokens < fits < 0.5 * store.tokens
        entries = int(str(caught.value).rpartition(" ")[2])
        assert opened(tmp_path / "t", kind="topk", top_k=entries).predicted_bytes() <= 0.5 * need
        assert opened(tmp_path / "u", kind="topk", top_k=entries + 1).predicted_bytes() > 0.5 * need

    def test_a_disk_too_small_is_refused_for_what_is_missing(self, tmp_path, monkeypatch):
        store = opened(tmp_path / "s")
        free = store.predicted_bytes() - 1
        monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        with pytest.raises(StoreError, match=r"are still to be stored, the disk has .* free"):
            check_room([store], 0, None)
        store.fill([0], computes(wide_llama())[0])
        check_room([store], 0, None)


class TestProbabilities:
    """Against the full distribution of the same hidden states."""

    @staticmethod
    def reference(store, model, head, vocabulary, temperature):
        hidden = live(store, model)
        logits = {i: head.finish(h.double() @ head.weight.double().T + (0 if head.bias is None else head.bias)) for i, h in hidden.items()}
        return {i: torch.log_softmax(z[:, :vocabulary] / temperature, -1) for i, z in logits.items()}

    @pytest.mark.parametrize("vocabulary", [None, 33, 1000])
    @pytest.mark.parametrize("k", [1, 7, 100])
    def test_topk(self, tmp_path, monkeypatch, vocabulary, k):
        monkeypatch.setattr(store_module, "_LOGITS_BYTES", 4 * VOCABULARY * 3)  # chunks of three tokens
        model = wide_llama()
        plain = head_of(model)
        head = Head(plain.weight, torch.randn(VOCABULARY), softcap=5.0, scale=0.7)
        store = opened(tmp_path / "s", kind="topk", top_k=k, temperature=2.0, vocabulary=vocabulary)
        compute, _ = computes(model)
        store.fill(store.missing(), lambda batch: (compute(batch)[0], head))
        shared = min(vocabulary or VOCABULARY, VOCABULARY)
        expected = self.reference(store, model, head, shared, 2.0)
        for i, row in enumerate(store.read(range(30))):
            values, ids = expected[i].topk(min(k, shared), -1)
            assert row["ids"].dtype == torch.int32
            assert row["log_probs"].dtype == row["log_tail"].dtype == torch.float32
            torch.testing.assert_close(row["log_probs"].double(), values, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(expected[i].gather(-1, row["ids"].long()), values, atol=2e-5, rtol=2e-5)
            tail = expected[i].scatter(-1, ids, -torch.inf).logsumexp(-1)
            torch.testing.assert_close(row["log_tail"].double(), tail, atol=2e-5, rtol=2e-5)

    def test_draws_are_distinct_counts_and_the_same_when_drawn_again(self, tmp_path, monkeypatch):
        model = wide_llama()
        compute, _ = computes(model)
        store = opened(tmp_path / "s", kind="sampled", samples=20)
        store.fill(store.missing(), compute)
        for row in store.read(range(30)):
            ids, log_probs = row["ids"], row["log_probs"]
            used = log_probs > -math.inf
            counts = (log_probs.double().exp() * 20)[used]
            torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
            torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(ids)))
            assert all(len(set(i[u].tolist())) == int(u.sum()) for i, u in zip(ids, used, strict=True))
            assert used.any(0).all() or ids.shape[1] > used.sum(1).max()
        monkeypatch.setattr(store_module, "_LOGITS_BYTES", 4 * VOCABULARY * 3)
        again = opened(tmp_path / "again", kind="sampled", samples=20)
        again.fill(reversed(again.missing()), compute)
        assert contents(again.folder) == contents(store.folder)
        other = opened(tmp_path / "other", kind="sampled", samples=20, seed=1)
        other.fill([0], compute)
        name = "batch-0000000.safetensors"
        assert (other.folder / name).read_bytes() != (store.folder / name).read_bytes()

    def test_draws_are_unbiased(self, tmp_path):
        model, n = wide_llama(), 20_000
        with torch.no_grad():
            model.lm_head.weight.mul_(0.02)  # so that many tokens are likely
        store = opened(tmp_path / "s", ragged(6), kind="sampled", samples=n, temperature=1.5, vocabulary=37)
        store.fill(store.missing(), computes(model)[0])
        expected = self.reference(store, model, head_of(model), 37, 1.5)
        for i, row in enumerate(store.read(range(6))):
            p = expected[i].detach().exp()
            assert float(p.max()) < 0.7
            found = torch.zeros_like(p).scatter_add_(-1, row["ids"].long(), row["log_probs"].double().exp())
            z = (found - p) / (p * (1 - p) / n).sqrt()
            assert float(z.abs().max()) < 5
            assert 0.8 < float(z.pow(2).mean()) < 1.2  # as wide as independent draws make it, no wider and no narrower

    def test_no_token_of_probability_zero_is_drawn(self):
        log_p = torch.tensor([[-math.inf, math.log(0.5), -math.inf, math.log(0.5), -math.inf]])
        edges = torch.tensor([[0.0, 0.5 - 1e-16, 0.5, 1 - 1e-16, math.nextafter(1.0, 0.0)]], dtype=torch.float64)
        ids, log_probs = store_module._sample(log_p, edges)
        assert set(ids[log_probs > -math.inf].tolist()) == {1, 3}
        torch.testing.assert_close(log_probs.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


class TestHead:
    def test_it_comes_back_for_its_teacher_alone(self, tmp_path, caplog):
        head = Head(torch.randn(11, 5, dtype=torch.bfloat16), torch.randn(11, dtype=torch.bfloat16), softcap=30.0, scale=0.25)
        path = tmp_path / "t" / "head.safetensors"
        assert read_head(path, {"weights": "a"}) is None
        write_head(path, head, {"weights": "a"})
        found = read_head(path, {"weights": "a"})
        assert torch.equal(found.weight, head.weight)
        assert torch.equal(found.bias, head.bias)
        assert (found.softcap, found.scale) == (30.0, 0.25)
        write_head(path, replace(head, bias=None, softcap=None), {"weights": "a"})
        found = read_head(path, {"weights": "a"})
        assert (found.bias, found.softcap) == (None, None)
        assert read_head(path, {"weights": "b"}) is None
        write_head(path, head, {"weights": "b"})
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
        with caplog.at_level(logging.WARNING, "fastkd"):
            assert read_head(path, {"weights": "b"}) is None
        assert "head.safetensors: damaged" in caplog.text
