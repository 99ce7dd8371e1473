"""`fastkd doctor`: for each check a configuration that passes and one that does not, and what a user sees."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastkd import doctor, parity
from fastkd.begin import same_model
from fastkd.cli import main
from fastkd.config import ModelSpec, load_config
from fastkd.data import KDCollator, tokenize
from fastkd.findings import Finding
from fastkd.fitting import Proposal
from fastkd.hf import Head
from fastkd.memory import GB, MemoryEstimate, Phase

from .tiny import WORDS, rows, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A teacher that knows its 16 rows, with its tokenizer."""
    folder = tmp_path_factory.mktemp("learned") / "teacher"
    model, tokenizer = tiny_llama(2, hidden=24, layers=4), tiny_tokenizer()
    data = tokenize(rows(16), tokenizer, max_length=16)
    batch = KDCollator(0)(list(data))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, learned):
    """A folder with a teacher, data and a configuration in which all is well; it is the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(learned, "teacher")
    for name, n, seed in (("train", 16, 0), ("eval", 6, 1)):
        write(f"{name}.jsonl", list(rows(n, seed)))
    Path("run.yaml").write_text(
        """
student: {from: teacher, layers: [0, 2, 3]}
teacher: teacher
data: {train: train.jsonl, eval: eval.jsonl, max_length: 16}
loss: {divergence: jsd, beta: 0.3, kd_ratio: 0.8, temperature: 2}
training: {max_steps: 6, per_device_train_batch_size: 4, save_steps: 2, use_cpu: true}
output_dir: out
"""
    )
    return tmp_path


def write(file: str, lines: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def found(place, monkeypatch):
    """``found("rows", "data.max_length=4")``: the findings of one check, and of those that it needs."""
    checks = dict(doctor._CHECKS)

    def look(check: str, *overrides: str, needs: tuple[str, ...] = (), **options) -> list[Finding]:
        chosen = {name: entry for name, entry in checks.items() if name in ("settings", *needs, check)}
        monkeypatch.setattr(doctor, "_CHECKS", chosen)
        return [f for f in doctor.examine(load_config("run.yaml", overrides), **options) if f.check == check]

    return look


def only(findings: list[Finding], level: str) -> Finding:
    """The one finding that is not "ok", with all that a finding needs."""
    (finding,) = [f for f in findings if f.level != "ok"] or findings
    assert finding.level == level, finding
    assert level == "ok" or (finding.what and finding.why and finding.change), finding
    return finding


# The command.


def test_all_is_well(place, capsys):
    assert main(["doctor", "run.yaml", "--json", "found.json"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert all(line.startswith(("ok  ", "      ", "17 ok")) or not line for line in lines), printed
    assert lines[-1] == "17 ok, 0 warnings, 0 errors"
    saved = json.loads(Path("found.json").read_text())
    assert [f["check"] for f in saved["findings"]] == list(doctor._CHECKS)
    assert saved["status"] == 0
    assert not Path("out").exists()


def test_warnings_errors_and_a_broken_configuration(place, capsys):
    assert main(["doctor", "run.yaml", "--no-models", "data.max_length=6"]) == 1
    printed = capsys.readouterr().out
    assert "warning  rows" in printed
    assert "skipped  heads, teachers, parity: no models are loaded (--no-models)" in printed
    assert printed.endswith("ok, 1 warning, 0 errors, 3 skipped\n")
    assert "change  data.max_length: " in printed
    assert main(["doctor", "run.yaml", "data.train=nowhere.jsonl"]) == 2  # what needs no rows is looked at
    printed = capsys.readouterr().out
    assert "nowhere.jsonl: no such file" in " ".join(printed.split())
    assert "ok       tokenizers" in printed
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "run.yaml", "data.max_lenght=6"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("fastkd: run.yaml: data.max_lenght: unknown key")
    with pytest.raises(SystemExit):
        main(["doctor", "run.yaml", "--card", "much"])
    assert "--card" in capsys.readouterr().err


def test_a_check_that_fails_does_not_keep_the_next_from_being_made(place, monkeypatch):
    def broken(case):
        raise RuntimeError("a library's\nown words")

    checks = {"rows": (broken, False), "held-out": doctor._CHECKS["held-out"]}
    monkeypatch.setattr(doctor, "_CHECKS", {"settings": doctor._CHECKS["settings"], **checks})
    first, second, third = doctor.examine(load_config("run.yaml"))
    assert (first.level, second.level, third.level) == ("ok", "error", "ok")
    assert second.what == "RuntimeError: a library's own words"
    with pytest.raises(RuntimeError):
        list(doctor.examine(load_config("run.yaml"), debug=True))


def test_nothing_is_written(place):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    list(doctor.examine(load_config("run.yaml", ["store={path: cache}"])))
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


# The machine.


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.fp16=true", "training.fp16: true"),
        ("training.use_liger_kernel=true", "training.use_liger_kernel: true"),
        ("training.report_to=comet_ml", "training.report_to: comet_ml"),
        ("training.optim=adamw_8bit", "training.optim: adamw_8bit"),
        ("teacher={model: teacher, attn_implementation: flash_attention_2}", "teacher.attn_implementation: flash_attention_2"),
        ("teacher={model: teacher, quantization: 4bit}", "teacher.quantization: 4bit"),
    ],
)
def test_what_this_machine_lacks(found, monkeypatch, override, named):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    monkeypatch.setattr("fastkd.levers.find_spec", lambda name: None)
    monkeypatch.setattr("fastkd.models.is_bitsandbytes_available", lambda: False)
    assert only(found("environment"), "ok").what.startswith("fastkd ")
    assert only(found("environment", override), "error").what == named


@pytest.mark.skipif("torch.cuda.is_available()")
def test_bfloat16_without_a_gpu(found):
    assert only(found("environment", "training.bf16=true"), "ok")
    wrong = ["training={bf16: true, per_device_train_batch_size: 4}"]
    assert "training.use_cpu: true" in only(found("environment", *wrong), "error").change
    # What is said of the environment is not said once more in other words.
    (settings,) = found("settings", *wrong, needs=("environment",))
    assert settings.level == "skipped"


def test_folder(found):
    only(found("output_dir"), "ok")
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("{}\n")
    assert "--resume" in only(found("output_dir"), "warning").change
    assert "is read from" in only(found("output_dir", "output_dir=teacher"), "error").what


@pytest.mark.skipif("torch.cuda.is_available()")
@pytest.mark.parametrize("option", ["bf16", "fp16", "tf32"])
def test_a_card_that_is_not_here(found, capsys, option):
    """What only a GPU can do is no mistake where the run is planned for one."""
    training = f"training={{{option}: true, max_steps: 6, per_device_train_batch_size: 4}}"
    assert main(["plan", "run.yaml", training, "--card", "24"]) == 0
    assert "fits 24 GB" in capsys.readouterr().out
    assert "one of 24 GB" in only(found("environment", training, card_gb=24), "ok").what
    only(found("start", training, "teacher={model: teacher, device: cuda:1}", card_gb=24), "ok")
    only(found("parity", training, "teacher={model: teacher, device: cuda:1}", needs=MODELS, card_gb=24), "ok")
    with pytest.raises(SystemExit):
        main(["plan", "run.yaml", training])
    assert capsys.readouterr().err.startswith("fastkd: run.yaml: training")


def test_liger_for_a_card_that_is_not_here(found, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    only(found("settings", "training.use_liger_kernel=true", card_gb=24), "ok")


# Tokenizers, vocabularies, templates.


def another_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*WORDS[:4], *reversed(WORDS[4:])])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>", **special)


def test_tokenizers(found):
    assert "agree" in only(found("tokenizers"), "ok").what
    shutil.copytree("teacher", "other")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained("other")
    both = ["student=teacher", "teacher=other"]
    assert "'<unk>'" in only(found("tokenizers", *both), "warning").what
    another_tokenizer(eos_token="</s>", pad_token="<pad>").save_pretrained("other")
    finding = only(found("tokenizers", *both), "error")
    assert "id 4 is 'one' to the student and 'mat' to the teacher" in finding.what
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", pad_token="<pad>").save_pretrained("teacher")
    assert "no end-of-sequence token" in only(found("tokenizers"), "warning").what


def resized(folder: str, size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained("teacher")
    model.resize_token_embeddings(size)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def test_padded_heads_are_fine_and_said(found):
    """As 151,936 and 152,064 rows for one tokenizer are."""
    resized("wide", 48)
    said = only(found("vocabularies", "student=teacher", "teacher=wide"), "ok").what
    assert "40 (student) and 48 (teacher)" in said
    assert "tokenizer's 27 ids; the rest is padding" in said
    assert "over the 40 ids that all have, renormalised there" in said


def test_heads_that_are_too_small(found):
    resized("small", 26)  # of 27 ids; "mat", the last, is in the rows
    assert "another tokenizer?" in only(found("vocabularies", "student=small")[:1], "error").what
    write("train.jsonl", [{"prompt": "one", "completion": "two three"}] * 4)
    unused = found("vocabularies", "student=small", "data.eval=null")
    assert "ids up to 26" in only(unused, "warning").what
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "mat"
    tokenizer.save_pretrained("small")
    assert "padding" in only(found("vocabularies", "student=small", "data.eval=null"), "error").why


def test_positions_that_a_model_was_not_made_for(found):
    only(found("vocabularies"), "ok")
    write("train.jsonl", [{"prompt": "one", "completion": "two " * 70}])
    assert only(found("vocabularies", "data.max_length=80"), "warning").change == "data.max_length: 64"


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def templated(folder: str, template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if not Path(folder).exists():
        shutil.copytree("teacher", folder)
    tokenizer.save_pretrained(folder)


def test_chat_templates(found):
    assert "none is applied" in only(found("template"), "ok").what
    templated("chat", TEMPLATE)
    pair = ["student=chat", "teacher=chat"]
    finding = only(found("template", *pair), "warning")
    assert finding.change.startswith("data.chat_template: true")
    only(found("template", *pair, "data.chat_template=false"), "ok")
    assert "rendering what comes before" in only(found("template", *pair, "data.chat_template=true"), "ok").what
    templated("other", TEMPLATE + " ")
    assert "teacher has another" in only(found("template", "student=chat", "teacher=other", "data.chat_template=true"), "warning").what
    talk = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}] * 4
    write("train.jsonl", talk)
    pair += ["data.eval=null"]
    assert "teacher has none" in only(found("template", "student=chat", "teacher=teacher", "data.eval=null"), "warning").what
    templated("chat", TEMPLATE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"))
    assert "{% generation %}" in only(found("template", *pair), "ok").what


def test_messages_without_a_template(place, monkeypatch):
    write("train.jsonl", [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}])
    monkeypatch.setattr(doctor, "_CHECKS", {"settings": doctor._CHECKS["settings"], "rows": doctor._CHECKS["rows"]})
    settings, skipped = doctor.examine(load_config("run.yaml"))
    assert (settings.level, skipped.level) == ("error", "skipped")
    assert "no chat template" in settings.what


# Rows.


def test_rows(found):
    said = only(found("rows"), "ok").what
    assert said.startswith("16 rows, ")
    write(
        "train.jsonl", [*rows(16), {"id": "e", "prompt": "one", "completion": ""}, {"id": "l", "prompt": "one " * 20, "completion": "two"}]
    )
    finding = only([f for f in found("rows") if "left out" in f.why], "warning")
    assert "of 18 rows 1 have nothing to answer and 1 have a prompt that fills max_length=16" in finding.what
    write("train.jsonl", list(rows(16)))
    finding = only(found("rows", "data.max_length=8"), "warning")
    lengths = sorted(len(row["input_ids"]) for row in tokenize(rows(16), tiny_tokenizer(), max_length=None))
    assert f"{sum(n > 8 for n in lengths)} of 16 rows" in finding.what
    assert f"data.max_length: {lengths[-1]} keeps 95 %" in finding.change
    assert only(found("rows", f"data.max_length={lengths[-1]}"), "ok")
    only(found("rows", "data.packing=true", "data.max_length=8"), "ok")  # nothing is cut


def test_rows_that_are_in_both_files(found):
    assert only(found("held-out"), "ok").what == "of 6 rows of data.eval 0 have the prompt of a row of data.train"
    train = list(rows(16))
    write("eval.jsonl", [train[3], *rows(6, 1)])
    assert only(found("held-out"), "warning").what == "of 7 rows of data.eval 1 are rows of data.train too"
    assert only(found("held-out", "data.packing=true"), "warning").what == "of 7 rows of data.eval 1 are rows of data.train too"
    write("eval.jsonl", [{**train[3], "completion": "dog dog dog"}, *rows(6, 1)])
    assert "1 have the prompt of a row of data.train" in only(found("held-out"), "warning").what


def test_padding(found):
    only(found("padding"), "ok")
    write("train.jsonl", [{"prompt": "one", "completion": "two " * n} for n in (1, 2, 10, 12) * 16])
    finding = only(found("padding"), "warning")
    assert "padding_free: true" in finding.change
    assert "group_by_length (" in finding.change
    only(found("padding", "training.train_sampling_strategy=group_by_length"), "ok")
    assert "none" in only(found("padding", "data.padding_free=true"), "ok").what


# The plan, and the room that it takes.


def test_plan(found):
    assert "6 steps" in only(found("plan"), "ok").what
    shutil.copytree("teacher", "weak")
    two = ["teacher=null", "teachers={weak: weak, strong: teacher}", "student={from: strong, layers: [0, 2]}"]
    unused = "plan={stages: [{teacher: strong}]}"
    assert only(found("plan", *two, unused), "warning").what == "no stage asks teachers.weak"
    small = "plan={preset: clpd, fractions: [0.1, 0.9], epochs: 1}"
    assert "has 1 sample, less than one batch of 4" in only(found("plan", *two, small, "training.max_steps=-1"), "warning").what
    assert "same model" in only(found("plan", "student=teacher"), "warning").what
    # A student in fewer bits does not know all that the teacher does.
    quantised = ModelSpec("teacher", quantization="4bit", lora={})
    assert not same_model(quantised, ModelSpec("teacher"))
    assert "training.warmup_steps" in only(found("plan", "training.warmup_steps=50"), "warning").change


def test_store(found):
    assert only(found("store"), "ok").what.startswith("none")
    assert "is empty" in only(found("store", "store={path: cache}"), "ok").what
    assert "store.max_gb" in only(found("store", "store={path: cache, max_gb: 1.0e-6}"), "error").what
    ramp = "plan={stages: [{epochs: 1, temperature: {from: 1, to: 2}}]}"
    several = found("store", "store={kind: topk, path: cache}", ramp, "training.max_steps=-1", "loss={divergence: forward_kl}")
    assert "one temperature" in only(several, "error").what
    infinite = "loss={divergence: reverse_kl}"
    assert "infinite" in only(found("store", "store={kind: sampled, path: cache}", infinite), "error").what
    assert main(["cache", "run.yaml", "store={path: cache}"]) == 0
    assert "is full" in only(found("store", "store={path: cache}"), "ok").what


def test_memory(found, monkeypatch):
    said = only(found("memory"), "ok").what
    assert "host memory at the peak" in said
    only(found("memory", card_gb=80), "ok")

    def smaller(setting, card):
        assert setting.device == "cuda"
        assert card == GB // 10
        estimate = MemoryEstimate("cuda", (Phase("training step", {"activations": GB // 12}),), 1, 1)
        return [
            Proposal("training.gradient_checkpointing=true", 0.33, "", estimate, False),
            Proposal("student.lora=true", None, "", estimate, fits),
        ]

    monkeypatch.setattr(doctor, "proposals", smaller)
    fits = True
    finding = only(found("memory", card_gb=0.1), "error")  # less than CUDA's own libraries
    assert "of 0.1 GB (--card)" in finding.what
    assert finding.change == "training.gradient_checkpointing=true (0.1 GB, 33% slower); student.lora=true (0.1 GB)"
    fits = False
    assert "no further setting makes it fit" in only(found("memory", card_gb=0.1), "error").change


def test_memory_of_the_host(found, monkeypatch):
    class Little:
        available = -(10 * GB)

    monkeypatch.setattr("psutil.virtual_memory", Little)
    monkeypatch.setattr(doctor, "proposals", lambda *_: [])
    assert "host memory" in only(found("memory"), "error").what


def test_disk(found, monkeypatch):
    said = only(found("disk"), "ok").what
    assert "3 checkpoints" in said  # of the two that stay and the next
    assert "checkpoint" not in only(found("disk", "training.save_strategy=no"), "ok").what
    assert "the store" in only(found("disk", "store={path: cache}"), "ok").what
    weights = sum(p.numel() * 4 for p in tiny_llama(0, hidden=24, layers=3).parameters())
    need = weights + 3 * 3 * weights  # AdamW's state is two numbers for each weight

    def free(n: float) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10 * need, 0, n))

    free(need * 1.2)
    only(found("disk"), "ok")
    free(need * 1.05)
    only(found("disk"), "warning")
    free(need * 0.95)
    assert "save_total_limit" in only(found("disk"), "error").change


def test_what_distill_would_refuse_is_found_whatever_it_is(found, monkeypatch):
    only(found("start"), "ok")
    wrong = "training.metric_for_best_model=beauty"
    assert "expected one of loss, ce" in only(found("start", wrong), "error").what
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert found("start", wrong, needs=("disk",))[0].level == "skipped"  # it may be the same


# The models.

MODELS = ("heads", "teachers", "parity")


def test_a_teacher_with_another_embedding(found):
    said = only(found("teachers", needs=MODELS), "ok").what
    assert "chance is 3.69" in said
    model = AutoModelForCausalLM.from_pretrained("teacher")
    weight = model.get_input_embeddings().weight
    weight.data = weight.data[torch.arange(len(weight)).roll(5)]
    shutil.copytree("teacher", "broken")
    model.save_pretrained("broken")
    broken = found("teachers", "student=teacher", "teacher=broken", needs=MODELS)
    assert "no more of the answers than chance" in only(broken, "error").why
    # The other way round all is well but for the student.
    only(found("teachers", "student=broken", "teacher=teacher", needs=MODELS), "ok")


def test_a_teacher_that_knows_less_than_the_student(found):
    model = AutoModelForCausalLM.from_pretrained("teacher")
    model.get_output_embeddings().weight.data *= 0.6
    shutil.copytree("teacher", "vague")
    model.save_pretrained("vague")
    finding = only(found("teachers", "student=teacher", "teacher=vague", needs=MODELS), "warning")
    assert "less of the answers than the student" in finding.why


def test_a_model_that_cannot_be_split_or_loaded(found, monkeypatch):
    only(found("heads"), "ok")
    Path("torn").mkdir()
    for file in Path("teacher").iterdir():
        (Path("torn") / file.name).write_bytes(file.read_bytes())
    Path("torn/model.safetensors").write_bytes(b"not weights")
    finding = only(found("heads", "student=teacher", "teacher=torn"), "error")
    assert finding.what.startswith("teacher: ")
    assert found("parity", "student=teacher", "teacher=torn", needs=MODELS)[0].level == "skipped"

    def differs(*_):
        raise ValueError("its logits differ")

    monkeypatch.setattr("fastkd.preparation.verify_head", differs)
    alone = ["student=teacher", "teacher=null", "plan={stages: [{teacher: null, kd_ratio: 0}]}", "loss.kd_ratio=null"]
    assert "its logits differ" in only(found("heads", *alone), "error").what


@pytest.mark.parametrize(
    "options",
    [
        ["loss={divergence: adaptive_kl, temperature: 1.5, kd_ratio: 0.7, chunk_tokens: 3}"],
        ["loss={divergence: tvd}", "training.bf16=true"],
        ["loss={divergence: forward_kl, temperature: 2}", "store={kind: topk, top_k: 5, path: cache}"],
        ["plan={stages: [{epochs: 1, kd_ratio: 0}, {epochs: 1, temperature: 2, kd_ratio: 1}]}", "training.max_steps=-1", "loss={}"],
    ],
)
def test_parity(found, options):
    only(found("parity", *options, needs=MODELS), "ok")


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_parity_finds_one_percent(found, monkeypatch, wrong):
    right = parity.fused_linear_kd

    def off(*arguments, **options):
        loss = right(*arguments, **options)
        return loss * 1.01 if wrong == "loss" else loss + 0.01 * (loss - loss.detach())

    monkeypatch.setattr(parity, "fused_linear_kd", off)
    assert "the fused loss is off by" in only(found("parity", needs=MODELS), "error").what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_parity_of_every_dtype(dtype, softcap):
    generator = torch.Generator().manual_seed(0)

    def head(width: int) -> tuple[torch.Tensor, Head]:
        hidden, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, width), (50, width), (50,)))
        return hidden, Head(weight, bias, softcap, 0.5)

    student, teacher = head(8), head(6)
    labels = torch.randint(0, 50, (9,), generator=generator)
    found = parity.loss_parity(*student, teacher, labels, divergence="jsd", temperature=2.0, kd_ratio=0.5)
    assert found.holds, found
    same = parity.loss_parity(*student, student, labels)  # no gradient: what rounding leaves is no measure
    assert same.holds, same
    alone = parity.loss_parity(*student, None, labels, kd_ratio=0.0)
    assert alone.holds, alone
