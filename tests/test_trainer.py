"""The trainer: the same gradients however a batch is split, evaluation, faults, checkpoints."""

import copy
import json
import math

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from fastkd.evaluation import token_metrics
from fastkd.hf import Head, hidden_states_and_head
from fastkd.report import read_metrics
from fastkd.signals import TeacherHidden
from fastkd.trainer import KDConfig, KDTrainer, NonFiniteLossError

from . import two_processes
from .tiny import VOCABULARY, rows, tiny_llama, tiny_tokenizer


def config(folder, **changes) -> KDConfig:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "max_steps": 4,
        "disable_tqdm": True,
        "max_length": 16,
        "kd_ratio": 0.6,
        "temperature": 2.0,
    }
    return KDConfig(**{**settings, **changes})


def trainer(folder, student=None, teacher=None, data=None, eval_data=None, callbacks=None, plan=None, **changes) -> KDTrainer:
    return KDTrainer(
        tiny_llama(1) if student is None else student,
        tiny_llama(2, hidden=24, layers=3) if teacher is None else teacher,
        config(folder, **changes),
        rows(16) if data is None else data,
        eval_data,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        plan=plan,
    )


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, then stops."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        control.should_training_stop = True


def first_gradients(folder, batch: int, accumulation: int, **changes) -> dict[str, torch.Tensor]:
    keep = FirstGradients()
    run = trainer(
        folder,
        callbacks=[keep],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        **changes,
    )
    run.train()
    return keep.found


def naive_gradients(count: int) -> dict[str, torch.Tensor]:
    """The first step's gradients from full logits, one row at a time, without padding."""
    student, teacher = tiny_llama(1), tiny_llama(2, hidden=24, layers=3)
    tokenizer, ratio, t = tiny_tokenizer(), 0.6, 2.0
    total, tokens = 0.0, 0
    for row in rows(count):
        prompt, completion = (tokenizer(row[k], add_special_tokens=False).input_ids for k in ("prompt", "completion"))
        ids = torch.tensor([(prompt + completion + [2])[:16]])
        zs = student(ids).logits[0, len(prompt) - 1 : -1]
        zt = teacher(ids).logits[0, len(prompt) - 1 : -1].detach()
        target = ids[0, len(prompt) :]
        p, log_q = (zt / t).softmax(-1), (zs / t).log_softmax(-1)
        kd = (p * (p.log() - log_q)).sum() * t**2
        total = total + ratio * kd + (1 - ratio) * torch.nn.functional.cross_entropy(zs, target, reduction="sum")
        tokens += len(target)
    (total / tokens).backward()
    return {name: p.grad for name, p in student.named_parameters()}


def assert_same(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name}: {error:.2e}"


def test_gradients_do_not_depend_on_how_the_batch_is_split(tmp_path):
    expected = naive_gradients(8)
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        assert_same(first_gradients(tmp_path / f"{batch}", batch, accumulation), expected, 2e-5)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    expected = first_gradients(tmp_path / "one", 4, 2)
    two_processes.run("tests.ddp_worker", tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert found.pop("wrapped") == "DistributedDataParallel"
        assert_same({name.removeprefix("module."): value for name, value in found.items()}, expected, 1e-5)
    one, two = (json.loads((tmp_path / f"evaluation-{rank}.json").read_text()) for rank in range(2))
    assert one == two
    alone = trainer(tmp_path / "alone", eval_data=rows(7, seed=5)).evaluate()
    for name in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement", "eval_tokens"):
        assert math.isclose(one[name], alone[name], rel_tol=1e-5), name


def test_the_teacher_keeps_its_mode_dtype_and_gradients(tmp_path):
    teacher = tiny_llama(2, attention_dropout=0.5).to(torch.bfloat16)
    before = copy.deepcopy(teacher.state_dict())
    run = trainer(tmp_path, teacher=teacher)
    run.train()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype for name, value in teacher.state_dict().items())


def test_under_autocast_the_student_computes_in_bf16_and_the_teacher_as_it_is(tmp_path):
    student, teacher, seen = tiny_llama(1), tiny_llama(2), {}
    run = trainer(tmp_path, student, teacher, bf16=True)
    for name, model in (("student", student), ("teacher", teacher)):
        layer = model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: (out.dtype, out.requires_grad)}))
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    run.model_wrapped = run.accelerator.prepare(student)
    student.train()
    run.compute_loss(run.model_wrapped, batch)
    assert seen == {"student": (torch.bfloat16, True), "teacher": (torch.float32, False)}


def test_16_bit_logits_are_not_rounded_in_evaluation():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2000, 32, generator=generator).bfloat16()
    t = torch.randn(1, 200, 32, generator=generator)
    h, t = (t + 0.02 * torch.randn(t.shape, generator=generator)).bfloat16(), t.bfloat16()
    labels = torch.randint(2000, (1, 200), generator=generator)
    found = token_metrics(h, Head(w), TeacherHidden(t, w), labels)
    zs, zt = (x.double() @ w.double().T for x in (h, t))
    kl = (zt.softmax(-1) * (zt.log_softmax(-1) - zs.log_softmax(-1))).sum(-1)
    assert abs(found["kl"].sum() / kl.sum() - 1) < 1e-3


def test_padding_changes_nothing(tmp_path):
    """With pad == eos too: padding is masked by position, and the true eos counts."""
    keeps = []
    for pad in ("<pad>", "</s>"):
        keep = FirstGradients()
        run = KDTrainer(
            tiny_llama(1),
            tiny_llama(2, hidden=24, layers=3),
            config(tmp_path / pad.strip("<>/"), per_device_train_batch_size=8, max_grad_norm=0.0, train_sampling_strategy="sequential"),
            rows(8),
            processing_class=tiny_tokenizer(pad),
            callbacks=[keep],
        )
        run.train()
        keeps.append(keep.found)
    assert_same(keeps[0], naive_gradients(8), 2e-5)
    assert_same(keeps[1], keeps[0])


@pytest.mark.parametrize("change", ["checkpointing", "compiled layers", "bf16"])
def test_ways_to_run_the_body(tmp_path, change):
    expected, student = naive_gradients(8), tiny_llama(1)
    keep, options, tolerance = FirstGradients(), {}, 2e-5
    if change == "checkpointing":
        options["gradient_checkpointing"] = True
    elif change == "compiled layers":
        for layer in student.model.layers:
            layer.compile(backend="eager")
    else:
        options["bf16"], tolerance = True, 0.15
    settings = {"per_device_train_batch_size": 8, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    run = trainer(tmp_path, student, callbacks=[keep], **settings, **options)
    run.train()
    assert all(value.dtype == torch.float32 for value in keep.found.values())
    assert_same(keep.found, expected, tolerance)


def test_evaluation_sums_over_tokens(tmp_path):
    student, teacher = tiny_llama(1, attention_dropout=0.5), tiny_llama(2, hidden=24, layers=3)
    held_out = rows(7, seed=5)
    run = trainer(tmp_path, student, teacher, eval_data=held_out, per_device_eval_batch_size=3)
    found = run.evaluate()
    tokenizer, kl, kd, ce, agree, tokens = tiny_tokenizer(), 0.0, 0.0, 0.0, 0, 0
    student.eval()
    for row in held_out:
        prompt, completion = (tokenizer(row[k], add_special_tokens=False).input_ids for k in ("prompt", "completion"))
        ids = torch.tensor([(prompt + completion + [2])[:16]])
        with torch.no_grad():
            zs, zt = (m(ids).logits[0, len(prompt) - 1 : -1].double() for m in (student, teacher))
        target = ids[0, len(prompt) :]
        p = zt.softmax(-1)
        kl += float((p * (p.log() - zs.log_softmax(-1))).sum())
        warm = (zt / 2.0).softmax(-1)
        kd += float((warm * (warm.log() - (zs / 2.0).log_softmax(-1))).sum())
        ce += float(torch.nn.functional.cross_entropy(zs, target, reduction="sum"))
        agree += int((zs.argmax(-1) == zt.argmax(-1)).sum())
        tokens += len(target)
    assert found["eval_tokens"] == tokens
    assert math.isclose(found["eval_kl"], kl / tokens, rel_tol=1e-5)
    assert math.isclose(found["eval_ce"], ce / tokens, rel_tol=1e-5)
    student.train()  # evaluation must not depend on the mode it finds
    assert run.evaluate()["eval_kl"] == found["eval_kl"]
    assert math.isclose(found["eval_loss"], 0.6 * 2.0**2 * kd / tokens + 0.4 * ce / tokens, rel_tol=1e-5)
    assert math.isclose(found["eval_perplexity"], math.exp(ce / tokens), rel_tol=1e-4)
    assert found["eval_agreement"] == agree / tokens


def test_token_metrics_know_softcap_and_unequal_vocabularies():
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(11, 4, generator=generator), torch.randn(11, generator=generator), softcap=3.0, scale=0.5)
    teacher = Head(torch.randn(9, 6, generator=generator))
    h, t = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 6, generator=generator)
    labels = torch.tensor([[1, -100, 10], [-100, -100, 8]])
    found = token_metrics(h, head, TeacherHidden(t, teacher.weight), labels)
    zs, zt = head.logits(h), teacher.logits(t)
    p, log_q = zt.softmax(-1), zs[..., :9].log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1)
    counted = labels != -100
    torch.testing.assert_close(found["kl"][counted], kl[counted])
    torch.testing.assert_close(found["ce"][counted], -zs.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][counted])
    assert (found["kl"][~counted] == 0).all()
    assert (found["top1"][~counted] == -100).all()
    assert (found["top1"][counted] == zs.argmax(-1)[counted]).all()


def test_compute_metrics_gets_tokens_not_logits(tmp_path):
    def count(prediction):
        counted = prediction.label_ids != -100
        assert (prediction.predictions[~counted] == -100).all()
        return {"accuracy": float((prediction.predictions == prediction.label_ids)[counted].mean())}

    run = KDTrainer(tiny_llama(1), tiny_llama(2), config(tmp_path), None, rows(5), processing_class=tiny_tokenizer(), compute_metrics=count)
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1


def test_metrics_rows(tmp_path):
    run = trainer(tmp_path, teacher={"small": tiny_llama(2)}, eval_data=rows(4, seed=3))
    run.evaluate()
    run.train()
    found = read_metrics(tmp_path)
    training = [row for row in found if "loss" in row]
    assert [row["step"] for row in training] == [2, 4]
    for row in training:
        assert row["stage"] == 0
        assert row["teacher"] == "small"
        assert (row["temperature"], row["kd_ratio"]) == (2.0, 0.6)
        assert math.isclose(row["loss"], 0.6 * row["kd"] + 0.4 * row["ce"], rel_tol=1e-6)
        assert row["lr"] > 0
    assert training[1]["tokens"] > training[0]["tokens"] > 0
    assert found[0]["step"] == 0
    assert found[0]["eval_kl"] > 0


def test_a_term_that_is_not_computed_is_null_in_the_metrics(tmp_path):
    trainer(tmp_path, kd_ratio=1.0).train()
    row = next(row for row in read_metrics(tmp_path) if "loss" in row)
    assert row["ce"] is None
    assert math.isclose(row["loss"], row["kd"], rel_tol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tmp_path):
    student, data = tiny_llama(1), rows(16)
    marked = [row["id"] for row in data if "cat" in f"{row['prompt']} {row['completion']}".split()]
    assert marked
    with torch.no_grad():
        student.model.embed_tokens.weight[tiny_tokenizer().convert_tokens_to_ids("cat")] = math.nan
    run = trainer(tmp_path, student, data=data, per_device_train_batch_size=16)
    with pytest.raises(NonFiniteLossError, match="step 1") as caught:
        run.train()
    named = set(str(caught.value).split("samples: ")[1].split(", "))
    assert named <= set(marked)
    assert named


def test_the_routers_loss_is_kept(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64, "router_aux_loss_coef": 0.5,
    }  # fmt: skip
    losses = {}
    for on in (False, True):
        torch.manual_seed(0)
        student = MixtralForCausalLM(MixtralConfig(**settings, output_router_logits=on))
        run = trainer(tmp_path, student)
        batch = run._prepare_inputs(next(iter(run.get_eval_dataloader(run.train_dataset))))
        student.eval()
        losses[on] = run.compute_loss(student, batch).item()
        with torch.no_grad():
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            aux = student(**inputs, output_router_logits=True).aux_loss.item()
    assert aux > 0.1
    assert math.isclose(losses[True] - losses[False], 0.5 * aux, rel_tol=1e-4)
    # As one of several micro-batches it has its share of the tokens.
    counted = (batch["shift_labels"] != -100).sum()
    share = run.compute_loss(student, batch, num_items_in_batch=4 * counted).item()
    assert math.isclose(share, losses[True] / 4, rel_tol=1e-5)


def test_an_adapted_student_trains_its_adapter_alone(tmp_path):
    from peft import LoraConfig

    student = tiny_llama(1)
    before = copy.deepcopy(student.state_dict())
    run = KDTrainer(
        student,
        tiny_llama(2),
        config(tmp_path, learning_rate=1e-2),
        rows(16),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    run.train()
    after = run.model.state_dict()
    changed = [name for name, value in after.items() if "lora_B" in name and value.abs().max() > 0]
    assert len(changed) == 4
    base = {name.removeprefix("base_model.model.").replace(".base_layer", ""): v for name, v in after.items() if "lora" not in name}
    assert all(torch.equal(base[name], value) for name, value in before.items())


def test_models_by_path(tmp_path):
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_llama(seed).to(torch.bfloat16).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    run = KDTrainer(str(tmp_path / "student"), tmp_path / "teacher", config(tmp_path / "run"), rows(8))
    assert run.model.dtype == torch.float32
    assert run.teachers.names == ("teacher",)
    assert run.teachers.model("teacher").dtype == torch.bfloat16
    run.train()
    assert run.state.global_step == 4


def test_a_divergence_with_its_parameters_is_one_argument(tmp_path):
    from fastkd import divergence

    found = config(tmp_path, divergence=divergence("jsd", beta=0.1))
    assert (found.divergence, found.divergence_parameters) == ("jsd", {"beta": 0.1})
    with pytest.raises(ValueError, match="divergence_parameters"):
        config(tmp_path, divergence=divergence("jsd", beta=0.1), divergence_parameters={"beta": 0.1})


def test_a_collator_of_ones_own(tmp_path):
    def collate(batch):
        length = max(len(row["input_ids"]) for row in batch)
        pad = [length - len(row["input_ids"]) for row in batch]
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * n for row, n in zip(batch, pad, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * n for row, n in zip(batch, pad, strict=True)]),
            "labels": torch.tensor([row["labels"] + [-100] * n for row, n in zip(batch, pad, strict=True)]),
        }

    keep = FirstGradients()
    settings = config(tmp_path, per_device_train_batch_size=8, max_grad_norm=0.0, train_sampling_strategy="sequential")
    models = tiny_llama(1), tiny_llama(2, hidden=24, layers=3)
    KDTrainer(*models, settings, rows(8), processing_class=tiny_tokenizer(), data_collator=collate, callbacks=[keep]).train()
    assert_same(keep.found, naive_gradients(8), 2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: trainer(f, teacher={"a": tiny_llama(2), "b": tiny_llama(3)}), "teacher_model: 2 teachers"),
        (lambda f: trainer(f, teacher=3), "teacher_model: expected a name"),
        (lambda f: trainer(f, student=3), "model: expected a name"),
        (lambda f: KDTrainer(tiny_llama(1), tiny_llama(2), TrainingArguments(str(f))), "args: expected a KDConfig"),
        (lambda f: KDTrainer(tiny_llama(1), tiny_llama(2), config(f), rows(4)), "processing_class"),
        (lambda f: KDTrainer(tiny_llama(1), tiny_llama(2), config(f), [1]), "train_dataset: expected a datasets.Dataset"),
        (
            lambda f: KDTrainer(tiny_llama(1), tiny_llama(2), config(f), rows(9), processing_class=tiny_tokenizer(), plan="pocl"),
            "samples: the plan asks which",
        ),
        (lambda f: config(f, divergence="nope"), "unknown name 'nope'"),
        (lambda f: config(f, divergence="jsd", divergence_parameters={"alpha": 0.1}), "unknown parameter 'alpha'"),
        (lambda f: config(f, temperature=0.0), "temperature"),
        (lambda f: config(f, kd_ratio=1.5), "kd_ratio"),
        (lambda f: config(f, max_length=1), "max_length"),
        (lambda f: config(f, logits_dtype="float17"), "logits_dtype"),
        (lambda f: config(f, remove_unused_columns=True), "remove_unused_columns"),
        (lambda f: config(f, logging_nan_inf_filter=True), "logging_nan_inf_filter"),
        (lambda f: config(f, label_smoothing_factor=0.1), "label_smoothing_factor"),
        (lambda f: config(f, torch_compile=True), "torch_compile"),
        (lambda f: config(f, max_loss_buffer_mb=0), "max_loss_buffer_mb"),
        (lambda f: config(f, gradient_accumulation_steps=0), "gradient_accumulation_steps"),
        (lambda f: config(f, per_device_train_batch_size=0), "per_device_train_batch_size"),
        (lambda f: trainer(f, teacher="no/such"), "no model 'no/such': no such folder here"),
        (lambda f: config(f, max_steps=-1, num_train_epochs=0), "num_train_epochs"),
        (lambda f: config(f, chunk_tokens=-1), "chunk_tokens"),
        (lambda f: trainer(f, model_init_kwargs={"dtype": "float32"}), "model_init_kwargs"),
        (lambda f: trainer(f, teacher_model_init_kwargs={"dtype": "float32"}), "teacher_model_init_kwargs"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        change(tmp_path)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_student_that_shares_with_its_teacher_is_refused(tmp_path, adapted):
    from peft import LoraConfig

    model = tiny_llama(1)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapted else None
    with pytest.raises(ValueError, match="teacher_model: shares parameters with the student"):
        KDTrainer(model, model, config(tmp_path), rows(4), processing_class=tiny_tokenizer(), peft_config=adapter)


def test_tokens_and_lengths_that_a_model_does_not_have_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = tiny_llama(2)
    small.resize_token_embeddings(12)
    with pytest.raises(ValueError, match="has 12 token embeddings, the data has id"):
        trainer(tmp_path, teacher=small)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ValueError, match="max_length: the student has 8 positions"):
        trainer(tmp_path, short)


def test_the_best_metric_knows_its_direction(tmp_path):
    for name, better in (("kl", False), ("eval_perplexity", False), ("ce", False), ("loss", False), ("agreement", True)):
        settings = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
        assert config(tmp_path, metric_for_best_model=name, **settings).greater_is_better is better, name
    with pytest.raises(ValueError, match="metric_for_best_model: expected one of"):
        trainer(tmp_path, metric_for_best_model="rouge", eval_data=rows(3))


def test_held_out_rows_are_never_dropped(tmp_path):
    run = trainer(tmp_path, eval_data=rows(7, seed=5), per_device_eval_batch_size=4, dataloader_drop_last=True)
    all_rows = trainer(tmp_path, eval_data=rows(7, seed=5), per_device_eval_batch_size=7)
    assert run.evaluate()["eval_tokens"] == all_rows.evaluate()["eval_tokens"]
    assert run.args.dataloader_drop_last
    assert run.evaluate(rows(3, seed=6))["eval_tokens"] > 0  # rows that are not tokenised


def test_a_split_that_is_not_exact_is_refused(tmp_path):
    class Odd(type(tiny_llama(1))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits.roll(1, -1)
            return output

    odd = Odd(tiny_llama(2).config)
    with pytest.raises(ValueError, match="teacher 'Odd': Odd cannot be split"):
        trainer(tmp_path, teacher=odd)


def test_the_head_and_body_of_the_student_share_one_forward(tmp_path):
    """After training the model's own forward is back in place."""
    run = trainer(tmp_path)
    run.train()
    ids = torch.tensor([[1, 5, 6]])
    hidden, head = hidden_states_and_head(run.model, input_ids=ids)
    torch.testing.assert_close(run.model(ids).logits, head.logits(hidden))
