"""Heads that are whole only inside their call: gathered once, reduced once, and the gradients of one process."""

import importlib.util
import os
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

import fastkd.teachers
from fastkd import TeacherHidden, fused_linear_kd
from fastkd.data import tokenize
from fastkd.hf import Head, head_of, redirected, run_at_head, run_body
from fastkd.packing import pack
from fastkd.store import StoreError, StoreSpec
from fastkd.teachers import Teachers

from . import two_processes
from .sharded_worker import STUDENT_WIDTH, TEACHER_WIDTH, batch, models, one_process, one_sgd_step
from .test_trainer import first_gradients, trainer
from .tiny import VOCABULARY, rows, tiny_llama, tiny_tokenizer

HEAD, TEACHER_HEAD = VOCABULARY * STUDENT_WIDTH, VOCABULARY * TEACHER_WIDTH  # no other unit of FSDP2 has as many elements


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_same(found: dict[str, Any], tied: bool, tolerance: float) -> None:
    loss, grads = one_process(tied)
    assert relative(found["loss"], loss) < tolerance
    assert found["grads"].keys() == grads.keys()
    for name, grad in grads.items():
        assert relative(found["grads"][name], grad) < tolerance, name


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    two_processes.run("tests.sharded_worker", folder)
    return [torch.load(folder / f"sharded-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ["ddp", "own unit", "own unit, kept", "own unit, spared", "root", "tied", "after the body"])
def test_two_processes_have_the_loss_and_gradients_of_one(processes, case):
    for found in processes:
        for step in ("first", "second"):
            assert_same(found[case][step], case == "tied", 2e-6)


def test_mixed_precision_is_that_of_the_wrapper(processes):
    for found in processes:
        assert found["bf16"]["second"]["dtype"] == torch.bfloat16
        assert_same(found["bf16"]["second"], False, 0.05)


def test_what_a_wrapper_rounds_is_logged_exactly(processes):
    losses, metrics = (sum(found["logged"][name] for found in processes) for name in ("losses", "metrics"))
    for found in (found["logged"] for found in processes):
        train, evaluation = found["train"], found["evaluation"]
        assert train["loss"] == pytest.approx(float(losses[0]), rel=1e-6)
        for name, total in zip(("kd", "ce"), losses[1:].tolist(), strict=True):
            assert train[name] == pytest.approx(total / train["tokens"], rel=1e-9), name
        for name, total in zip(("kl", "ce", "agreement"), metrics.tolist(), strict=True):
            assert evaluation[f"eval_{name}"] == pytest.approx(total / evaluation["eval_tokens"], rel=1e-9), name


@pytest.mark.parametrize(("case", "forward", "backward"), [("own unit", 1, 1), ("own unit, kept", 1, 0), ("own unit, spared", 1, 0)])
def test_a_head_of_its_own_is_gathered_once_and_reduced_once(processes, case, forward, backward):
    """The gather before the backward pass is FSDP2's, for any unit that it has freed after the forward pass."""
    for found in processes:
        seen = found[case]["second"]
        assert seen["forward"].count(("gather", HEAD)) == forward
        assert seen["backward"].count(("gather", HEAD)) == backward
        assert seen["backward"].count(("scatter", HEAD)) == 1
        assert not [kind for kind, _ in seen["forward"] if kind != "gather"]


def test_a_head_in_the_root_is_gathered_once_and_reduced_once(processes):
    root = 2 * HEAD + STUDENT_WIDTH  # embedding, head, norm
    for found in processes:
        seen = found["root"]["second"]
        assert seen["forward"].count(("gather", root)) == 1
        assert seen["backward"].count(("gather", root)) == 0
        assert seen["backward"].count(("scatter", root)) == 1


def test_under_ddp_each_gradient_is_reduced_once(processes):
    size = sum(p.numel() for p in models()[0].parameters())
    for found in processes:
        seen = found["ddp"]["second"]
        assert seen["forward"] == []
        assert {kind for kind, _ in seen["backward"]} == {"reduce"}
        assert sum(n for _, n in seen["backward"]) == size


def test_a_sharded_teachers_head_is_gathered_once_per_batch(processes):
    for found in processes:
        assert found["own unit"]["second"]["forward"].count(("gather", TEACHER_HEAD)) == 1
        assert found["tied"]["second"]["forward"].count(("gather", TEACHER_HEAD)) == 1


@pytest.mark.parametrize("case", ["own unit", "own unit, kept", "tied"])
def test_a_sharded_teacher_is_in_shards_after_its_call(processes, case):
    for found in processes:
        assert found[case]["first"]["whole in the teacher"] == found[case]["second"]["whole in the teacher"] == []


@pytest.mark.parametrize("where", ["head_of", "at the body", "at the head"])
def test_a_sharded_model_that_is_not_called_is_refused(processes, where):
    for found in processes:
        assert "LlamaForCausalLM is sharded, its weights are whole only inside its own call: run this in" in found["outside"][where]


def test_a_sharded_model_is_asked_in_its_call_whether_it_keeps_documents_apart(processes):
    assert [found["apart"] for found in processes] == [(True, True)] * 2


def test_processes_agree_on_packed_rows(processes):
    """Under FSDP the student is asked on process 0 alone, a teacher on both."""
    first, second = (found["trainer"]["asked"] for found in processes)
    assert first == {"process 0 says yes": ([True, False], True), "process 1 says yes": ([True], False)}
    assert second == {"process 0 says yes": ([False], True), "process 1 says yes": ([], False)}


def test_the_student_is_refused_where_it_is_not_whole_yet(processes, tmp_path):
    message = "evaluate, predict: expected train before: under FSDP and DeepSpeed ZeRO-3 it prepares the student"
    assert [found["trainer"]["early"] for found in processes] == [message] * 2
    run = trainer(tmp_path, eval_data=rows(4))
    Gathering(run.model.lm_head)
    with pytest.raises(ValueError, match=message):
        run.evaluate()
    texts = Dataset.from_dict({"text": ["a few words", "and some others"]})
    packed = pack(tokenize(texts, tiny_tokenizer(), max_length=None), 16)
    run.train_dataset = packed
    with pytest.raises(ValueError, match=r"packing: whether the student keeps .* cannot be found out under DeepSpeed ZeRO-3"):
        run._suit_packed_rows()
    run.train_dataset = packed.remove_columns("position_ids")
    run._suit_packed_rows()


def test_a_distributed_tensor_is_gathered_once_per_call(processes):
    for found in processes:
        seen = found["after the body"]["second"]
        assert seen["forward"].count(("gather", HEAD)) == 2  # one by FSDP2, for the head's call without a product
        assert seen["backward"].count(("scatter", HEAD)) == 1


def test_gradients_of_distributed_tensors_are_averaged(processes):
    for found in processes:
        for name, grad in found["biased"]["found"].items():
            assert relative(grad, found["biased"]["expected"][name]) < 2e-6, name


def test_the_trainer_under_fsdp2(processes, tmp_path):
    expected = first_gradients(tmp_path / "one", 4, 2)
    alone = trainer(tmp_path / "alone", eval_data=rows(7, seed=5)).evaluate()
    for found in processes:
        assert found["trainer"]["wrapped"] == "FSDPLlamaForCausalLM"
        assert found["trainer"]["grads"].keys() == expected.keys()
        for name, grad in expected.items():
            assert relative(found["trainer"]["grads"][name], grad) < 2e-5, name
        for name in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement", "eval_tokens"):
            assert found["trainer"]["evaluation"][name] == pytest.approx(alone[name], rel=1e-5), name


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("tied", [False, True])
def test_deepspeed_zero_3(zero_3, tied):
    _, grads = one_process(tied)
    weights = dict(models(tied)[0].named_parameters())
    for found in zero_3:
        found = found["tied" if tied else "untied"]
        assert_same(found, tied, 2e-6)
        for name, weight in weights.items():
            assert relative(found["weights"][name], weight.detach() - 0.1 * grads[name]) < 2e-6, name
        assert found["teacher"].count(("gather", TEACHER_HEAD)) == 2  # embedding and head, which have one size
        assert found["forward"].count(("gather", HEAD)) == 2
        assert [n for kind, n in found["backward"] if kind == "scatter"] == [sum(w.numel() for w in weights.values())]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_the_trainer_under_deepspeed_zero_3(zero_3, tmp_path):
    student = tiny_llama(1)
    alone = one_sgd_step(tmp_path, student, tiny_llama(2, hidden=24, layers=3), per_device_train_batch_size=4)
    alone.train()
    expected = alone.evaluate()
    for found in zero_3:
        found = found["trainer"]
        assert found["wrapped"] == "DeepSpeedEngine"
        for name, weight in student.named_parameters():
            assert relative(found["weights"][name], weight.detach()) < 2e-6, name
        for name in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement", "eval_tokens"):
            assert found["evaluation"][name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.fixture(scope="module")
def zero_3(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero")
    for name, model in (("student", tiny_llama(1)), ("teacher", tiny_llama(2, hidden=24, layers=3))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    two_processes.run("tests.zero_worker", folder)
    return [torch.load(folder / f"zero-{rank}.pt") for rank in range(2)]


class Gathering:
    """What sharding wrappers do with a module, in one process: its weights are there during its call, and when its output's gradient
    has come until its input's has."""

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.whole = module, module.weight.data
        module.weight.ds_id, module.weight.ds_shape = 0, self.whole.shape  # as DeepSpeed says what is not there
        self.gathers = self.reductions = 0
        self.free()
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)

    def gather(self) -> None:
        self.gathers += 1
        self.module.weight.data = self.whole

    def free(self) -> None:
        self.module.weight.data = self.whole.new_empty(0)

    def before(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        self.gather()
        if not arguments[0].requires_grad:
            return arguments
        gathering = self

        class AfterBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.view_as(x)

            @staticmethod
            def backward(ctx, grad):
                gathering.reductions += gathering.module.weight.grad is not None
                gathering.free()
                return grad

        return (AfterBackward.apply(arguments[0]),)

    def after(self, module: nn.Module, arguments: tuple[Tensor], output: Any) -> Any:
        self.free()
        gathering = self

        class BeforeBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.view_as(x)

            @staticmethod
            def backward(ctx, grad):
                gathering.gather()
                return grad

        # As DeepSpeed: tensors in tuples, lists and dicts alone are replaced.
        return tuple(BeforeBackward.apply(x) if isinstance(x, Tensor) and x.requires_grad else x for x in output)


@pytest.mark.parametrize("tokens", [1, 3, 1000])
def test_a_gathering_wrapper_gathers_and_reduces_once(tokens):
    """However many chunks there are: once in the forward pass, once before the backward pass as the wrapper's own rule is."""
    ids, labels, total = batch()
    student, teacher = models()
    hidden, _ = run_body(teacher, input_ids=ids)
    signal = TeacherHidden(hidden, teacher.lm_head.weight)
    sizes = []

    def loss(hidden: Tensor, head: Head) -> tuple[Tensor, int]:
        sizes.append(head.weight.shape)
        options = {"divergence": "jsd", "kd_ratio": 0.7, "temperature": 2.0, "normalizer": total, "chunk_tokens": tokens}
        return fused_linear_kd(hidden, head.weight, signal, labels, **options), 7

    head_of(student)
    wrapper = Gathering(student.lm_head)
    assert student.lm_head.weight.numel() == 0
    (found, seven), aux_loss = run_at_head(student, loss, input_ids=ids)
    assert (seven, aux_loss, wrapper.gathers, student.lm_head.weight.numel()) == (7, None, 1, 0)
    found.backward()
    assert (wrapper.gathers, wrapper.reductions, student.lm_head.weight.numel()) == (2, 1, 0)
    assert sizes == [(VOCABULARY, STUDENT_WIDTH)]
    grads = {name: p.grad for name, p in student.named_parameters()}
    assert_same({"loss": found.detach(), "grads": grads}, False, 2e-6)


def test_the_head_has_its_own_forward_and_hooks_afterwards():
    model = tiny_llama(1)
    ids = batch()[0]
    before = model(input_ids=ids).logits
    hooks = len(model.lm_head._forward_hooks)

    def fails(hidden: Tensor, head: Head) -> Tensor:
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"), redirected(model, lambda **inputs: run_at_head(model, fails, **inputs)):
        model(input_ids=ids)
    assert "forward" not in {*vars(model.lm_head), *vars(model)}
    assert len(model.lm_head._forward_hooks) == hooks
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_teacher_is_loaded_whole_under_fsdp(tmp_path, monkeypatch):
    """transformers would load it empty on all processes but the first."""
    seen = []

    def load(*_, **__):
        seen.append(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        return tiny_llama(2)

    tiny_llama(2).save_pretrained(tmp_path)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(fastkd.teachers, "load_model", load)
    Teachers({"one": tmp_path}, device="cpu").model("one")
    assert seen == [None]
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_teacher_is_checked_when_the_student_will_be_sharded(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(fastkd.teachers, "check_head", lambda name, model: checked.append(name))
    trainer(tmp_path)
    assert checked == ["teacher 'LlamaForCausalLM'"]


def test_whether_a_teacher_is_sharded_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(fastkd.teachers, "fsdp_units", lambda model: asked.append(model) or [])
    teacher = models()[1]
    teachers, ids = Teachers({"one": teacher}, device="cpu"), batch()[0]
    for _ in range(3):
        teachers.signal("one", {"input_ids": ids}, ids)
    assert asked == [teacher]


def test_a_sharded_teacher_has_no_store(tmp_path):
    teacher = tiny_llama(2)
    Gathering(teacher.lm_head)
    with pytest.raises(StoreError, match="the teacher 'one' is sharded; expected a name, a path, or a module that is whole"):
        Teachers({"one": teacher}, device="cpu").use_store(StoreSpec(tmp_path / "store"), "train", rows(4), facts={})
