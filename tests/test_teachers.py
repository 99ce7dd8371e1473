"""The teachers of a run: only those that a stage needs are in memory, and their signals are the same live and from a store."""

import gc
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastkd import fused_linear_kd, teachers
from fastkd.data import KDCollator, tokenize
from fastkd.hf import head_of, run_body
from fastkd.models import fingerprint, load_model, model_files, outline
from fastkd.packing import pack
from fastkd.signals import TeacherHidden, TeacherTopK
from fastkd.store import StoreError, StoreSpec
from fastkd.teachers import Teachers, TeacherSource

from .test_store import contents, ragged
from .tiny import VOCABULARY, WORDS, rows, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"max_length": 64, "completion_only_loss": None}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folders(tmp_path):
    """A weak and a strong teacher on disk, with their tokenizer."""
    found = {}
    for i, name in enumerate(("weak", "strong")):
        found[name] = str(tmp_path / name)
        tiny_llama(i, hidden=576, heads=9, layers=1 + i).save_pretrained(found[name])
        tiny_tokenizer().save_pretrained(found[name])
    return found


def made(sources, **changes) -> Teachers:
    return Teachers(sources, device="cpu", tokenizer=tiny_tokenizer(), **changes)


def batch_of(data, which):
    batch = KDCollator(0)([data[i] for i in which])
    labels, index = batch.pop("shift_labels"), batch.pop("sample_index")
    del batch["labels"]
    return batch, labels, index


def no_loading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a body was loaded")

    monkeypatch.setattr(teachers, "load_model", refuse)


class TestMemory:
    def test_a_stage_holds_what_it_needs_and_the_rest_dies(self, folders):
        found = made(folders)
        assert found.names == ("weak", "strong")
        assert found.loaded == {}
        found.stage(["weak"])
        weak = weakref.ref(found.model("weak"))
        assert not weak().training
        assert not any(p.requires_grad for p in weak().parameters())
        assert found.head("weak").weight.data_ptr() == weak().lm_head.weight.data_ptr()
        assert found.loaded == {"weak": "body"}
        found.stage(["strong"])
        assert weak() is None  # without a collection by the test
        found.model("strong")
        assert found.loaded == {"strong": "body"}
        found.stage(["strong", "weak"])
        assert found.loaded == {"strong": "body"}
        found.stage([])
        assert found.loaded == {}
        assert [(record["event"], record["teacher"]) for record in found.memory] == [
            ("load", "weak"),
            ("free", "weak"),
            ("load", "strong"),
            ("free", "strong"),
        ]

    def test_freed_memory_goes_back_to_the_system(self, tmp_path):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8)
        )
        size = sum(p.numel() * 4 for p in model.parameters())
        model.save_pretrained(tmp_path / "m")
        del model
        gc.collect()
        found = Teachers({"t": tmp_path / "m"}, device="cpu")
        found.stage(["t"])
        found.signal("t", *batch_of(ragged(4), range(4))[:2])
        found.stage([])
        _, free = found.memory
        assert free["before"] - free["after"] > 0.8 * size, (size, found.memory)

    def test_the_users_module_is_never_freed(self):
        module = tiny_llama(0).train()
        alive = weakref.ref(module)
        found = made({"mine": module})
        assert found.model("mine") is module
        assert not module.training
        assert module.lm_head.weight.requires_grad
        found.stage([])
        assert found.loaded == {"mine": "body"}
        assert module.lm_head.weight.device.type == "cpu"
        del module
        gc.collect()
        assert alive() is not None
        assert found.model("mine") is alive()

    def test_a_parked_teacher_comes_back_without_loading(self, folders, monkeypatch):
        found = made({"weak": TeacherSource(folders["weak"], park=True), "strong": folders["strong"]})
        body = found.model("weak")
        found.stage(["strong"])
        assert found.loaded == {"weak": "parked"}
        no_loading(monkeypatch)
        found.stage(["weak"])
        assert found.model("weak") is body
        assert found.loaded == {"weak": "body"}
        assert [record["event"] for record in found.memory] == ["load", "park", "unpark"]

    def test_loading_leaves_every_random_state(self, folders, monkeypatch):
        def drawing(*args, **kwargs):
            torch.rand(3), random.random(), np.random.rand(3)
            return load_model(*args, **kwargs)

        monkeypatch.setattr(teachers, "load_model", drawing)
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        expected = torch.rand(1).item(), random.random(), np.random.rand()
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        found = made(folders)
        found.stage(["strong"], ahead="weak")
        found.model("strong")
        found.outline("weak")
        found.stage(["weak"])
        found.model("weak")
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
        assert torch.get_default_dtype() == torch.float32

    def test_an_outline_has_the_models_shapes_and_no_weights(self, folders):
        found = made({"t": TeacherSource(folders["strong"], dtype="bfloat16")})
        drawn = found.outline("t")
        assert found.loaded == {}
        real = found.model("t")
        assert {n: (p.shape, p.dtype) for n, p in drawn.named_parameters()} == {n: (p.shape, p.dtype) for n, p in real.named_parameters()}
        assert {p.device.type for p in drawn.parameters()} == {"meta"}
        module = tiny_llama(0)
        assert made({"m": module}).outline("m") is module

    def test_options_reach_the_model(self, folders):
        found = made({"t": TeacherSource(folders["strong"], options={"layers": [1], "dtype": "bfloat16"})})
        assert found.model("t").config.num_hidden_layers == 1
        assert found.model("t").dtype == torch.bfloat16


class TestErrors:
    def test_another_tokenizer_is_refused_with_the_token(self, folders, tmp_path):
        other = tiny_tokenizer()
        words = {w: i for i, w in enumerate(WORDS)}
        words["cat"], words["dog"] = words["dog"], words["cat"]
        changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), **other.special_tokens_map)
        changed.save_pretrained(folders["strong"])
        with pytest.raises(ValueError, match=r"teacher 'strong': the tokenizers differ: id \d+ is 'cat' to the student and 'dog'"):
            made(folders)
        Teachers(folders, device="cpu")  # no tokenizer to compare with

    def test_sources(self, folders, tmp_path):
        assert made({}).names == ()
        with pytest.raises(TypeError, match="teacher 'a': model: expected a name, a path or a module, got int"):
            made({"a": 3})
        with pytest.raises(FileNotFoundError, match="teacher 'a': no model at"):
            made({"a": tmp_path / "nothing"})
        with pytest.raises(ValueError, match="dtype, options: the model is given as a module"):
            TeacherSource(tiny_llama(0), dtype="float32")
        with pytest.raises(ValueError, match="dtype: given twice"):
            TeacherSource("name", dtype="float32", options={"dtype": "float32"})
        found = made(folders)
        for call in (found.model, found.head, lambda name: found.stage([name]), lambda name: found.stage([], ahead=name)):
            with pytest.raises(ValueError, match="teacher: expected one of weak, strong, got 'medium'"):
                call("medium")

    def test_errors_of_any_kind_name_the_teacher(self, folders, monkeypatch):
        """Those of broken files take more than a text to make."""
        for broken in (json.JSONDecodeError("no JSON", "{", 0), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"), KeyError("shape")):

            def fail(*args, error=broken, **kwargs):
                raise error

            monkeypatch.setattr(teachers, "load_model", fail)
            with pytest.raises(ValueError, match=r"teacher 'strong': .*(no JSON|no text|KeyError: 'shape')") as caught:
                made(folders).model("strong")
            assert type(caught.value) is ValueError

    def test_a_teacher_whose_files_went_is_named(self, folders, tmp_path):
        found = made(folders)
        found.outline("strong")
        os.remove(model_files(folders["strong"])[1])
        with pytest.raises(FileNotFoundError, match=r"^teacher 'strong': no model\.safetensors"):
            found.use_store(StoreSpec(tmp_path / "store"), "train", ragged(4), facts=FACTS)

    def test_a_model_that_cannot_be_split_is_named(self):
        model = tiny_llama(0)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + inputs[0].sum())
        with pytest.raises(ValueError, match="teacher 'odd': "):
            made({"odd": model}).model("odd")
        made({"odd": model}, verify=False).model("odd")


class TestLive:
    def test_the_signal_is_the_models_own(self, folders):
        found = made(folders)
        batch, labels, _ = batch_of(ragged(5), range(5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            signal = found.signal("strong", batch, labels)
        model = load_model(folders["strong"])
        with torch.no_grad():
            expected, _ = run_body(model, **batch)
        assert isinstance(signal, TeacherHidden)
        assert torch.equal(signal.hidden, expected)
        assert torch.equal(signal.weight, head_of(model).weight)
        assert not signal.hidden.requires_grad


class TestAhead:
    def test_the_files_of_the_next_are_read_in_the_background(self, folders, monkeypatch, caplog):
        read, real = [], teachers._read_through

        def observed(name, find, stop):
            assert threading.current_thread() is not threading.main_thread()
            assert threading.current_thread().daemon
            read.extend(find())
            real(name, find, stop)

        monkeypatch.setattr(teachers, "_read_through", observed)
        found = made(folders)
        found.stage(["weak"], ahead="strong")
        deadline = time.time() + 20
        while not read and time.time() < deadline:
            time.sleep(0.01)
        assert [path.name for path in read] == ["config.json", "model.safetensors"]
        assert found.loaded == {}
        found.stage(["weak"], ahead="strong")
        found.stage(["strong"], ahead="strong")
        assert len(read) == 2  # once is enough

    def test_its_errors_are_logged_and_go_no_further(self, folders, caplog):
        found = made(folders)
        shutil.rmtree(folders["strong"])
        with caplog.at_level(logging.WARNING, "fastkd"):
            found.stage(["weak"], ahead="strong")
            deadline = time.time() + 20
            while not caplog.records and time.time() < deadline:
                time.sleep(0.01)
        assert "teacher strong: could not be fetched ahead: " in caplog.text
        found.model("weak")


class TestStored:
    @pytest.mark.parametrize("how", ["before", "lazily"])
    @pytest.mark.parametrize("given", ["path", "module"])
    def test_hidden_states_are_those_of_the_canonical_batches(self, folders, tmp_path, how, given):
        data = ragged(30)
        source = load_model(folders["strong"]) if given == "module" else folders["strong"]
        found = made({"t": source})
        found.use_store(StoreSpec(tmp_path / "store", batch_size=4), "train", data, facts=FACTS)
        store = found.stores["t", "train"]
        if how == "before":
            assert found.fill("t", progress=False) == 8
            assert found.fill("t", progress=False) == 0
        model = load_model(folders["strong"])
        expected = {}
        for i in range(len(store.batches)):
            batch = store.batch(i)
            with torch.no_grad():
                hidden, _ = run_body(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for index, h, labels in zip(batch["sample_index"].tolist(), hidden, batch["shift_labels"], strict=True):
                expected[index] = h[labels != -100]
        for which in torch.randperm(30).split(7):
            batch, labels, index = batch_of(data, which.tolist())
            signal = found.signal("t", batch, labels, index)
            assert isinstance(signal, TeacherHidden)
            assert torch.equal(signal.hidden[labels != -100], torch.cat([expected[i] for i in index.tolist()]))
            assert not signal.hidden[labels == -100].any()
            assert torch.equal(signal.weight, model.lm_head.weight)
        assert found.loaded == ({"t": "body"} if given == "module" else {"t": "head"})  # full: the body went

    def test_with_a_full_store_only_the_head_is_loaded(self, tmp_path, monkeypatch):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8)
        )
        size = sum(p.numel() * 4 for p in model.parameters())
        model.save_pretrained(tmp_path / "m")
        del model
        data, spec = ragged(8), StoreSpec(tmp_path / "store", batch_size=4)
        first = Teachers({"t": tmp_path / "m"}, device="cpu")
        first.use_store(spec, "train", data, facts=FACTS)
        first.fill("t", progress=False)
        expected = first.signal("t", *batch_of(data, range(8)))
        filled = contents(tmp_path / "store" / "t" / "train")

        no_loading(monkeypatch)
        second = Teachers({"t": tmp_path / "m"}, device="cpu")
        before = teachers._memory(second.device)
        second.use_store(spec, "train", data, facts=FACTS)
        signal = second.signal("t", *batch_of(data, range(8)))
        assert teachers._memory(second.device) - before < 0.25 * size
        assert torch.equal(signal.hidden, expected.hidden)
        assert torch.equal(signal.weight, expected.weight)
        assert (signal.bias, signal.softcap, signal.scale) == (expected.bias, expected.softcap, expected.scale)
        assert second.loaded == {"t": "head"}
        assert second.memory == []
        assert second.fill("t", progress=False) == 0
        assert contents(tmp_path / "store" / "t" / "train") == filled

    def test_what_is_lost_is_made_again_and_the_body_goes(self, folders, tmp_path, caplog):
        data, spec = ragged(12), StoreSpec(tmp_path / "store", batch_size=4)
        first = made({"t": folders["strong"]})
        first.use_store(spec, "train", data, facts=FACTS)
        first.fill("t", progress=False)
        everything = batch_of(data, range(12))
        expected = first.signal("t", *everything)
        filled = contents(tmp_path / "store" / "t" / "train")

        file = tmp_path / "store" / "t" / "train" / "batch-0000001.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        head = tmp_path / "store" / "t" / "head.safetensors"
        good = head.read_bytes()
        head.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        second = made({"t": folders["strong"]})
        second.use_store(spec, "train", data, facts=FACTS)
        with caplog.at_level(logging.WARNING, "fastkd"):
            signal = second.signal("t", *everything)
        assert "batch-0000001.safetensors: damaged" in caplog.text
        assert "head.safetensors: damaged" in caplog.text
        assert torch.equal(signal.hidden, expected.hidden)
        assert torch.equal(signal.weight, expected.weight)
        assert head.read_bytes() == good
        assert contents(tmp_path / "store" / "t" / "train") == filled
        assert second.loaded == {"t": "head"}

    def test_a_head_lost_alone_is_written_again(self, folders, tmp_path):
        data, spec = ragged(8), StoreSpec(tmp_path / "store", batch_size=4)
        first = made({"t": folders["strong"]})
        first.use_store(spec, "train", data, facts=FACTS)
        first.fill("t", progress=False)
        head = tmp_path / "store" / "t" / "head.safetensors"
        good = head.read_bytes()
        head.unlink()
        second = made({"t": folders["strong"]})
        second.use_store(spec, "train", data, facts=FACTS)
        second.signal("t", *batch_of(data, range(4)))
        assert head.read_bytes() == good

    def test_the_body_goes_when_the_stage_lacks_nothing(self, folders, tmp_path):
        data = ragged(64)
        found = made({"t": folders["weak"]})
        found.use_store(StoreSpec(tmp_path / "store", batch_size=2), "train", data, facts=FACTS)  # two blocks of 32 rows
        easy = [data[i]["sample_index"] for i in range(32)]
        found.stage(["t"], samples={"train": easy})
        for which in torch.arange(32).split(8):
            assert found.loaded in ({}, {"t": "body"})
            found.signal("t", *batch_of(data, which.tolist()))
        assert found.loaded == {"t": "head"}
        assert not found.stores["t", "train"].complete
        found.stage(["t"])
        found.signal("t", *batch_of(data, [40]))
        assert found.loaded == {"t": "body"}

    @pytest.mark.parametrize("park", [False, True])
    def test_a_body_that_was_loaded_for_something_else_goes_too(self, folders, tmp_path, park):
        data = ragged(8)
        found = made({"t": TeacherSource(folders["weak"], park=park)})
        found.use_store(StoreSpec(tmp_path / "store", batch_size=4), "train", data, facts=FACTS)
        found.fill("t", progress=False)
        found.model("t")
        assert found.loaded == {"t": "body"}
        found.signal("t", *batch_of(data, [1, 2]))
        assert found.loaded == {"t": "parked" if park else "head"}

    def test_another_split_that_is_not_full_keeps_the_body(self, folders, tmp_path):
        found = made({"t": folders["weak"]})
        spec = StoreSpec(tmp_path / "store", batch_size=4)
        for split, n in (("train", 4), ("eval", 8)):
            found.use_store(spec, split, ragged(n), facts=FACTS)
        found.fill("t", "train", progress=False)
        assert found.loaded == {"t": "body"}
        found.fill("t", "eval", progress=False)
        assert found.loaded == {}
        assert sorted(path.name for path in (tmp_path / "store" / "t").iterdir()) == ["eval", "head.safetensors", "train"]
        live = found.signal("t", *batch_of(ragged(3), range(3)), split="test")  # has no store
        assert isinstance(live, TeacherHidden)
        assert found.loaded == {"t": "body"}

    @pytest.mark.parametrize("kind", ["topk", "sampled"])
    def test_probabilities_need_no_model_once_they_are_there(self, folders, tmp_path, monkeypatch, kind):
        data, spec = ragged(12), StoreSpec(tmp_path / "store", kind=kind, batch_size=4, top_k=VOCABULARY, samples=30)
        found = made({"t": folders["strong"]})
        found.use_store(spec, "train", data, facts=FACTS, temperatures=[2.0], vocabulary=VOCABULARY)
        batch, labels, index = batch_of(data, [3, 9, 1])
        first = found.signal("t", batch, labels, index)
        found.fill("t", progress=False)
        assert found.loaded == {}
        assert not (tmp_path / "store" / "t" / "head.safetensors").exists()

        no_loading(monkeypatch)
        found = made({"t": folders["strong"]})
        found.use_store(spec, "train", data, facts=FACTS, temperatures=[2.0], vocabulary=VOCABULARY)
        signal = found.signal("t", batch, labels, index)
        assert found.loaded == {}
        assert isinstance(signal, TeacherTopK)
        assert signal.temperature == 2.0
        assert signal.ids.shape == signal.log_probs.shape == (*labels.shape, signal.ids.shape[-1])
        assert torch.equal(signal.ids, first.ids)
        assert torch.equal(signal.log_probs, first.log_probs)
        mass = signal.log_probs.exp().sum(-1) + signal.log_tail.exp()
        torch.testing.assert_close(mass, torch.ones_like(mass))
        if kind == "topk":  # of all tokens: the same loss as from the model
            torch.manual_seed(1)
            hidden, weight = torch.randn(*labels.shape, 8), torch.randn(VOCABULARY, 8)
            live = made({"t": tiny_llama(1, hidden=576, heads=9, layers=2)}).signal("t", batch, labels)
            losses = [fused_linear_kd(hidden, weight, teacher, labels, temperature=2.0) for teacher in (signal, live)]
            torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)

    def test_packed_rows_keep_their_positions(self, folders, tmp_path):
        data = pack(ragged(20), 40)
        found = made({"t": folders["strong"]})
        found.use_store(StoreSpec(tmp_path / "store", batch_size=3), "train", data, facts=FACTS)
        batch, labels, index = batch_of(data, range(3))
        assert "position_ids" in batch
        stored = found.signal("t", batch, labels, index)
        with torch.no_grad():
            live, _ = run_body(load_model(folders["strong"]), **batch)
        torch.testing.assert_close(stored.hidden[labels != -100], live[labels != -100], atol=1e-3, rtol=1e-3)

    def test_rows_without_a_counted_token_may_come_from_nowhere(self, folders, tmp_path):
        data = ragged(6)
        for kind in ("hidden", "topk", "sampled"):
            found = made({"t": folders["weak"]})
            found.use_store(StoreSpec(tmp_path / kind, kind=kind, batch_size=4), "train", data, facts=FACTS)
            batch, labels, index = batch_of(data, [2, 4])
            labels[0], index[0] = -100, -1
            signal = found.signal("t", batch, labels, index)
            labels[1], index[1] = -100, 10**6
            empty = found.signal("t", batch, labels, index)
            for one in (signal, empty):
                filled = one.hidden if kind == "hidden" else one.log_probs
                assert filled.shape[:2] == labels.shape
                assert bool((filled[0] == (0 if kind == "hidden" else -math.inf)).all())

    def test_labels_that_do_not_fit_are_refused(self, folders, tmp_path):
        data = ragged(6)
        found = made({"t": folders["weak"]})
        found.use_store(StoreSpec(tmp_path / "store", batch_size=4), "train", data, facts=FACTS)
        batch, labels, index = batch_of(data, [2, 4])
        with pytest.raises(ValueError, match="data_collator: a store needs each batch's sample_index"):
            found.signal("t", batch, labels)
        counts = (labels != -100).sum(1).tolist()
        labels[1, labels[1].ne(-100).nonzero()[0]] = -100
        with pytest.raises(ValueError, match=f"labels: sample_index 13 has {counts[1] - 1} counted tokens .* and {counts[1]} in the store"):
            found.signal("t", batch, labels, index)
        with pytest.raises(ValueError, match="sample_index 999 is not in the store's data set"):
            found.signal("t", *batch_of(data, [2])[:2], torch.tensor([999]))

    def test_the_real_rows_of_a_tokenizer(self, folders, tmp_path):
        data = tokenize(rows(20), tiny_tokenizer(), max_length=16)
        found = made(folders)
        found.use_store(StoreSpec(tmp_path / "store"), "train", data, facts=FACTS)
        for name in folders:
            signal = found.signal(name, *batch_of(data, [4, 1]))
            assert signal.hidden.shape[-1] == 576
        assert {path.name for path in (tmp_path / "store").iterdir()} == {"weak", "strong"}


class TestIdentity:
    def refused(self, source, tmp_path, field, **changes):
        arguments = {"facts": FACTS, **changes}
        tokenizer = arguments.pop("tokenizer", tiny_tokenizer())
        found = Teachers({"t": source}, device="cpu", tokenizer=tokenizer)
        (tmp_path / "store" / "t" / "train" / "batch-0000000.safetensors").touch()  # else its settings do not hold
        with pytest.raises(StoreError, match=f"this store was filled with other settings: {field} is"):
            found.use_store(StoreSpec(tmp_path / "store"), "train", ragged(4), **arguments)

    def test_a_teacher_changed_under_the_store_is_refused(self, folders, tmp_path):
        folder = folders["weak"]

        def begin():
            made({"t": folder}).use_store(StoreSpec(tmp_path / "store"), "train", ragged(4), facts=FACTS)

        begin()
        begin()
        shutil.move(folder, tmp_path / "elsewhere")  # it is the same teacher there
        folder = tmp_path / "elsewhere"
        begin()
        self.refused(TeacherSource(folder, dtype="bfloat16"), tmp_path, "teacher.dtype")
        self.refused(TeacherSource(folder, options={"layers": [0]}), tmp_path, "teacher.options.layers")
        self.refused(TeacherSource(folder, options={"attn_implementation": "eager"}), tmp_path, "teacher.options.attn_implementation")
        self.refused(folders["strong"], tmp_path, "teacher.weights")
        self.refused(folder, tmp_path, "max_length", facts={**FACTS, "max_length": 65})
        self.refused(folder, tmp_path, "tokenizer", tokenizer=tiny_tokenizer(pad="</s>"))
        templated = tiny_tokenizer()
        templated.chat_template = "{{ messages }}"
        self.refused(folder, tmp_path, "template", tokenizer=templated)

        model = load_model(folder)
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-6
        model.save_pretrained(folder)
        self.refused(folder, tmp_path, "teacher.weights")

    def test_the_same_weights_under_another_config_are_another_teacher(self, folders, tmp_path):
        made({"t": folders["weak"]}).use_store(StoreSpec(tmp_path / "store"), "train", ragged(4), facts=FACTS)
        config = model_files(folders["weak"])[0]
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        self.refused(folders["weak"], tmp_path, "teacher.config")

    def test_a_module_is_known_by_its_weights(self, tmp_path):
        model = tiny_llama(3)
        made({"t": model}).use_store(StoreSpec(tmp_path / "store"), "train", ragged(4), facts=FACTS)
        made({"t": tiny_llama(3)}).use_store(StoreSpec(tmp_path / "store"), "train", ragged(4), facts=FACTS)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-4
        self.refused(model, tmp_path, "teacher.weights")
        self.refused(tiny_llama(3).to(torch.bfloat16), tmp_path, "teacher.weights")

    def test_another_collator_is_refused(self, folders, tmp_path):
        """Even if as many tokens count, and under the same labels."""

        def rewriting(rows):
            batch = KDCollator(0)(rows)
            batch["input_ids"][:, 0] = 7
            return batch

        data = ragged(8)
        found = made(folders)
        found.use_store(StoreSpec(tmp_path / "store"), "train", data, facts=FACTS)
        found.fill("weak", progress=False)
        made(folders).use_store(StoreSpec(tmp_path / "store"), "train", data, facts=FACTS, collate=KDCollator(0))
        with pytest.raises(StoreError, match="/weak/train: this store was filled with other settings: collator is "):
            made(folders).use_store(StoreSpec(tmp_path / "store"), "train", data, facts=FACTS, collate=rewriting)

    def test_a_run_without_teachers_has_no_stores(self, folders, tmp_path):
        found = made({})
        found.use_store(StoreSpec(tmp_path / "store", max_gb=1e-9), "train", ragged(4), facts=FACTS)
        found = made(folders)
        found.use_store(StoreSpec(tmp_path / "store", max_gb=1e-9), "train", ragged(4), facts=FACTS, names=[])
        assert found.stores == {}

    def test_what_was_refused_for_want_of_room_may_be_something_else(self, folders, tmp_path):
        """The advice of the message can be followed."""
        data = ragged(12)
        with pytest.raises(StoreError, match="or kind topk with top_k up to") as caught:
            made(folders).use_store(StoreSpec(tmp_path / "store", max_gb=3e-4), "train", data, facts=FACTS)
        entries = int(str(caught.value).rpartition(" ")[2])
        found = made(folders)
        found.use_store(StoreSpec(tmp_path / "store", kind="topk", top_k=entries, max_gb=3e-4), "train", data, facts=FACTS)
        assert found.fill("weak", progress=False) == 1

    def test_hashes_are_remembered_until_a_file_changes(self, folders, monkeypatch, tmp_path):
        file = model_files(folders["weak"])[1]
        first = teachers._file_hash(file)
        monkeypatch.setattr(teachers.hashlib, "file_digest", None)
        assert teachers._file_hash(file) == first
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
        content, times = file.read_bytes(), file.stat()
        assert teachers._file_hash(file) == first
        file.write_bytes(content[:-1] + b"\x07")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times would leave it
        assert teachers._file_hash(file) != first
        blob = tmp_path / "blobs" / ("ab" * 32)
        blob.parent.mkdir()
        blob.write_bytes(b"not hashed")
        (tmp_path / "model.safetensors").symlink_to(blob)
        assert teachers._file_hash(tmp_path / "model.safetensors") == "ab" * 32

    def test_no_room_is_refused_before_anything_is_computed(self, folders, tmp_path, monkeypatch):
        no_loading(monkeypatch)
        found = made(folders)
        head = VOCABULARY * 576 * 4
        tokens = sum(label != -100 for labels in ragged(12)["labels"] for label in labels[1:])
        need = tokens * 576 * 4 + 1024  # for each teacher, without its head
        for allowed, fits in ((2 * (need + head) + 100, True), (2 * (need + head) - 100, False)):
            spec = StoreSpec(tmp_path / str(fits), max_gb=allowed / 1e9)
            if fits:
                found.use_store(spec, "train", ragged(12), facts=FACTS)
            else:
                with pytest.raises(StoreError, match=r"store\.max_gb: .* needs .* allowed are .* tokens would fit"):
                    found.use_store(spec, "train", ragged(12), facts=FACTS)

    def test_probabilities_hold_for_one_temperature(self, folders, tmp_path):
        found = made(folders)
        for kind in ("topk", "sampled"):
            with pytest.raises(StoreError, match=f"store.kind: {kind} holds probabilities at one temperature, the plan has 1, 1.5, 2; "):
                found.use_store(StoreSpec(tmp_path, kind=kind), "train", ragged(4), facts=FACTS, temperatures=[2.0, 1, 1.5])
        found.use_store(StoreSpec(tmp_path), "train", ragged(4), facts=FACTS, temperatures=[2.0, 1, 1.5])
        found.use_store(StoreSpec(tmp_path), "eval", ragged(4), facts=FACTS, temperatures=[])
        with pytest.raises(StoreError, match="none is open for teacher 'weak' and split 'test'"):
            found.fill("weak", "test")


def adapted(model, seed=0, alpha=8.0):
    """A model with a LoRA adapter that does something."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, lora).eval()


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestAdapters:
    """A teacher is its weights and what PEFT puts on them."""

    @pytest.fixture(params=["alone", "beside"])
    def folder(self, request, tmp_path):
        """An adapter in a folder of its own, or beside its model."""
        base = tmp_path / "base"
        tiny_llama(0).save_pretrained(base)
        folder = base if request.param == "beside" else tmp_path / "adapter"
        adapted(load_model(base)).save_pretrained(folder)
        edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
        tiny_tokenizer().save_pretrained(folder)
        return folder

    def test_its_files_and_its_base_are_read(self, folder, tmp_path):
        names = [str(path.relative_to(tmp_path)) for path in model_files(folder)]
        own = [f"{folder.name}/adapter_config.json", f"{folder.name}/adapter_model.safetensors"]
        assert names == ["base/config.json", "base/model.safetensors", *own]
        drawn, real = outline(folder), load_model(folder)
        assert drawn.lm_head.weight.shape == real.lm_head.weight.shape
        assert drawn.dtype == real.dtype
        assert outline(folder, dtype="bfloat16").dtype == torch.bfloat16

    @pytest.mark.parametrize("change", ["adapter", "alpha", "base"])
    def test_a_change_of_any_is_another_teacher(self, folder, tmp_path, change):
        data, spec = ragged(4), StoreSpec(tmp_path / "store")
        first = made({"t": folder})
        first.use_store(spec, "train", data, facts=FACTS)
        first.fill("t", progress=False)
        batch, labels, index = batch_of(data, range(4))
        stored = first.signal("t", batch, labels, index).hidden[labels != -100]
        again = made({"t": folder})
        again.use_store(spec, "train", data, facts=FACTS)
        assert torch.equal(again.signal("t", batch, labels, split="live").hidden[labels != -100], stored)

        if change == "alpha":
            edit(folder / "adapter_config.json", lora_alpha=2.0)
        elif change == "adapter":
            adapted(tiny_llama(0), seed=1).save_pretrained(tmp_path / "other")
            shutil.copy(tmp_path / "other" / "adapter_model.safetensors", folder)
        else:
            tiny_llama(1).save_pretrained(tmp_path / "base")
        other = made({"t": folder})
        assert not torch.equal(other.signal("t", batch, labels).hidden[labels != -100], stored)
        field = "teacher.adapter" if change == "alpha" else "teacher.weights"
        with pytest.raises(StoreError, match=f"other settings: {field} is"):
            other.use_store(spec, "train", data, facts=FACTS)

    def test_a_missing_base_or_package_is_one_line(self, folder, tmp_path, monkeypatch):
        if folder.name == "base":
            pytest.skip("has its base beside it")
        for value, message in ((str(tmp_path / "gone"), "no model .*gone'"), (None, "base_model_name_or_path: expected a model's name")):
            edit(folder / "adapter_config.json", base_model_name_or_path=value)
            for call in (outline, load_model):
                with pytest.raises((FileNotFoundError, ValueError), match=message):
                    call(folder)
        with pytest.raises(ValueError, match="base_model_name_or_path: expected a model's name or path, got None"):
            model_files(folder)
        edit(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
        with pytest.raises(FileNotFoundError, match=r"no config\.json in '.*gone', the base model of the adapter in '.*adapter'"):
            model_files(folder)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"adapter_config\.json: expected JSON with the key base_model_name_or_path"):
            model_files(folder)
        monkeypatch.setattr("fastkd.models.is_peft_available", lambda: False)
        for call in (outline, load_model, model_files):
            with pytest.raises(ValueError, match="holds an adapter, which needs the package peft") as caught:
                call(folder)
            assert "\n" not in str(caught.value)

    def test_a_module_is_its_adapters_too(self):
        def identity(change=lambda model: None, **options):
            model = adapted(tiny_llama(0), **options)
            change(model)
            return fingerprint(model)

        first = identity()
        assert identity() == first
        assert set(first) == {"weights", "config", "adapter"}
        assert identity(seed=1)["weights"] != first["weights"]
        for other in (
            identity(alpha=2.0),  # neither in the state nor in the model's config
            identity(lambda model: model.base_model.disable_adapter_layers()),
            identity(lambda model: [layer.set_scale("default", 0.1) for layer in model.modules() if hasattr(layer, "set_scale")]),
        ):
            assert {key for key in first if other[key] != first[key]} == {"adapter"}
        two = [adapted(tiny_llama(0)) for _ in range(2)]
        for model in two:
            torch.manual_seed(5)
            model.add_adapter("second", model.peft_config["default"])
        assert fingerprint(two[0]) == fingerprint(two[1])
        two[1].set_adapter("second")
        assert fingerprint(two[0])["adapter"] != fingerprint(two[1])["adapter"]
        assert "adapter" not in fingerprint(tiny_llama(0))

    def test_a_fingerprint_is_the_same_in_every_process(self, tmp_path):
        """PEFT's configs hold sets, whose order differs from process to process."""
        code = (
            "import torch; from tests.test_teachers import adapted; from tests.tiny import tiny_llama; "
            "from fastkd.models import fingerprint; print(fingerprint(adapted(tiny_llama(0))))"
        )
        found = set()
        for seed in "01":
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            found.add(done.stdout.splitlines()[-1])
        assert len(found) == 1


class TestFiles:
    def test_weights_in_several_files(self, tmp_path):
        tiny_llama(0, hidden=32).save_pretrained(tmp_path, max_shard_size="20KB")
        files = model_files(tmp_path)
        assert len(files) > 2
        assert files[0].name == "config.json"
        assert {file.suffix for file in files[1:]} == {".safetensors"}
        files[1].unlink()
        with pytest.raises(FileNotFoundError, match=f"no file '{files[1].name}' in .*which its model.safetensors.index.json names"):
            model_files(tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
            model_files(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors or pytorch_model\.bin in"):
            model_files(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no config\.json in 'no-such/model'"):
            model_files("no-such/model")

    def test_the_dtype_is_the_weights_where_the_config_has_none(self, tmp_path):
        tiny_llama(0).to(torch.bfloat16).save_pretrained(tmp_path)
        assert outline(tmp_path).dtype == torch.bfloat16
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert outline(tmp_path).dtype == load_model(tmp_path).dtype == torch.bfloat16
        assert outline(tmp_path, dtype="float16").dtype == torch.float16
