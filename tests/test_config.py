"""Configurations: what is read, and what is refused with one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.config import EXAMPLE, ConfigError, DataSpec, LossSpec, ModelSpec, load_config

MINIMAL = "student: small\nteacher: big\ndata: {train: rows.jsonl}\n"


def load(folder, text=MINIMAL, *overrides):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_defaults(tmp_path):
    config = load(tmp_path)
    assert config.student == ModelSpec("small")
    assert config.teachers == {"teacher": ModelSpec("big")}
    assert config.data == DataSpec("rows.jsonl", None, 512, {}, None, None)
    assert config.loss == LossSpec("forward_kl", {}, 1.0, 1.0, True, None, None)
    assert (config.training, config.output_dir, config.seed) == ({}, "runs/run", 0)
    assert config.path == str(tmp_path / "run.yaml")


def test_every_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = """
student: {model: ~/small, dtype: float32, gguf_file: small.gguf, revision: main, layers: [2, 0]}
teachers: {strong: {model: big, dtype: bfloat16}}
data:
  train: {path: someone/sums, name: main, split: train}
  eval: eval.parquet
  max_length: 64
  columns: {prompt: question, completion: answer, id: key}
  completion_only_loss: false
  chat_template: true
loss: {divergence: alpha_beta, alpha: 0.3, beta: 2, temperature: 2, kd_ratio: 5e-1, temperature_squared: off, chunk_tokens: 32,
       logits_dtype: bfloat16}
training: {learning_rate: 1e-4, max_steps: 7, num_train_epochs: 2, bf16: true, optim: adamw_torch, report_to: [none],
           lr_scheduler_kwargs: {num_cycles: 1}, eval_steps: null}
output_dir: ~/runs
seed: 7
"""
    config = load(tmp_path, text)
    assert config.student == ModelSpec("/home/someone/small", "float32", "small.gguf", "main", (2, 0))
    assert config.teachers == {"strong": ModelSpec("big", "bfloat16")}
    assert config.data == DataSpec(
        train={"path": "someone/sums", "name": "main", "split": "train"},
        eval="eval.parquet",
        max_length=64,
        columns={"prompt": "question", "completion": "answer", "id": "key"},
        completion_only_loss=False,
        chat_template=True,
    )
    assert config.loss == LossSpec("alpha_beta", {"alpha": 0.3, "beta": 2.0}, 2.0, 0.5, False, 32, "bfloat16")
    assert config.training == {
        "learning_rate": 1e-4, "max_steps": 7, "num_train_epochs": 2.0, "bf16": True, "optim": "adamw_torch", "report_to": ["none"],
        "lr_scheduler_kwargs": {"num_cycles": 1}, "eval_steps": None,
    }  # fmt: skip
    assert (config.output_dir, config.seed) == ("/home/someone/runs", 7)


def test_the_record_of_a_configuration_is_json(tmp_path):
    record = load(tmp_path, MINIMAL, "student={from: teacher, layers: [0, 2]}", "training.max_steps=3").to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record["student"]["layers"] == [0, 2]
    assert record["teachers"]["teacher"]["model"] == "big"
    assert record["training"] == {"max_steps": 3}


@pytest.mark.parametrize(
    ("teacher", "source", "expected"),
    [
        ("teacher: big", "teacher", ModelSpec("big", layers=(0, 2), from_teacher="teacher")),
        ("teachers: {strong: big}", "strong", ModelSpec("big", layers=(0, 2), from_teacher="strong")),
        ("teachers: {strong: big}", "teacher", ModelSpec("big", layers=(0, 2), from_teacher="strong")),
        ("teacher: big", "someone/other", ModelSpec("someone/other", layers=(0, 2))),
        (
            "teacher: {model: folder, dtype: float16, gguf_file: big.gguf, revision: v1}",
            "teacher",
            ModelSpec("folder", None, "big.gguf", "v1", (0, 2), "teacher"),  # the dtype is the teacher's alone
        ),
    ],
)
def test_a_student_cut_from_a_teacher(tmp_path, teacher, source, expected):
    config = load(tmp_path, f"student: {{from: {source}, layers: [0, 2]}}\n{teacher}\ndata: {{train: rows.jsonl}}")
    assert config.student == expected


def test_overrides(tmp_path):
    config = load(
        tmp_path, MINIMAL, "training.learning_rate=1e-4", "loss.divergence=jsd", "loss.beta=.5", "data.eval=a=b.jsonl", "student={model: x}"
    )
    assert config.training == {"learning_rate": 1e-4}
    assert config.loss == LossSpec("jsd", {"beta": 0.5})
    assert config.data.eval == "a=b.jsonl"
    assert config.student == ModelSpec("x")
    # A null takes a key away; the last override wins.
    text = MINIMAL + "loss: {divergence: jsd, beta: 0.1}\nseed: 3\n"
    config = load(tmp_path, text, "loss.beta=null", "loss.divergence=tvd", "seed=4", "seed=5")
    assert (config.loss, config.seed) == (LossSpec("tvd"), 5)


def test_empty_keys_are_absent(tmp_path):
    config = load(tmp_path, MINIMAL + "teachers:\nloss:\ntraining:\nseed:\noutput_dir:\n")
    assert (config.loss, config.training, config.seed, config.output_dir) == (LossSpec(), {}, 0, "runs/run")


def test_anchors_and_merges(tmp_path):
    text = "teacher: &t {model: big, dtype: float32}\nstudent: {<<: *t, model: small}\ndata: {train: rows.jsonl}"
    assert load(tmp_path, text).student == ModelSpec("small", "float32")


def test_reading_is_quick():
    """Without a `training` section nothing heavy is imported."""
    code = (
        "import sys, fastkd.config as c, pathlib, tempfile\n"
        "path = pathlib.Path(tempfile.mkdtemp(), 'run.yaml'); path.write_text(sys.argv[1]); c.load_config(path)\n"
        "print(sorted({'transformers', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code, MINIMAL], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_plan_difficulty_and_store(tmp_path):
    text = """
student: small
teachers: {weak: small, strong: {model: big, device: cpu, park: true}}
data: {train: rows.jsonl, packing: true}
plan: {preset: clpd, fractions: [0.25, 0.75]}
difficulty: {column: level, higher_is_easier: true}
store: {kind: topk, path: cache, max_gb: 2, top_k: 8}
"""
    config = load(tmp_path, text)
    assert [stage.teacher for stage in config.plan.stages] == [0, 1]
    assert config.plan.fractions == (0.25, 0.75)
    assert list(config.teachers) == ["weak", "strong"]
    assert config.teachers["strong"].park
    assert (config.difficulty.signal, config.difficulty.column, config.difficulty.higher_is_easier) == ("column", "level", True)
    assert (config.store.kind, config.store.path, config.store.max_gb, config.store.top_k) == ("topk", "cache", 2.0, 8)
    assert config.data.packing
    assert json.loads(json.dumps(config.to_dict()))["plan"]["stages"][1]["buckets"] == [1]
    assert load(tmp_path, MINIMAL + "difficulty: {signal: {column: level}}").difficulty.column == "level"
    assert load(tmp_path, "student: a\ndata: {train: x}\nplan: sft").teachers == {}
    # A preset without numbers of its own takes those of loss and training.
    open_plan = load(tmp_path, MINIMAL + "plan: curriculum\nloss: {temperature: 2}\ntraining: {num_train_epochs: 2}")
    assert open_plan.loss.temperature == 2.0


# The example.


def test_the_example_is_valid(tmp_path):
    config = load(tmp_path, EXAMPLE)
    assert config.loss.temperature == 1.0
    assert config.training["learning_rate"] == 1e-4
    assert config.output_dir == "runs/example"


ALTERNATIVES = [line for line in EXAMPLE.splitlines() if re.match(r"\s*#\w", line)]


@pytest.mark.parametrize("line", ALTERNATIVES)
def test_its_alternatives_are_valid(tmp_path, line):
    indent, key, rest = re.fullmatch(r"(\s*)#(\w+):(.*)", line).groups()
    kept, inside = [], False
    for other in EXAMPLE.splitlines():
        # What has the same key at the same depth is replaced, with the lines below it.
        inside = other.startswith(f"{indent}{key}:") or (inside and other.startswith(indent + "  "))
        if other == line:
            kept.append(f"{indent}{key}:{rest}")
        elif not inside:
            kept.append(other)
    text = "\n".join(kept)
    assert load(tmp_path, text) != load(tmp_path, EXAMPLE)


def test_the_example_shows_every_key():
    shown = set(re.findall(r"^\s*#?(\w+):", EXAMPLE, re.MULTILINE))
    known = {"student", "teacher", "data", "loss", "training", "output_dir", "seed"}
    known |= {"train", "eval", "max_length", "columns", "completion_only_loss", "chat_template"}
    known |= {"divergence", "temperature", "kd_ratio", "temperature_squared", "chunk_tokens", "packing", "plan", "difficulty", "store"}
    assert known <= shown


# What is refused: (lines after the minimal configuration or a whole text, the key or place, what the message says).

CUT = "student: {from: teacher, layers: [0]}\n"
WRONG = [
    # unknown keys, at every level
    ("sead: 1", "sead", "unknown key; did you mean 'seed'"),
    ("zzz: 1", "zzz", "unknown key; known: student, teacher"),
    ("3: 1", "3", "unknown key"),
    ("student: {modle: a}", "student.modle", "did you mean 'model'"),
    ("student: {from: teacher, layers: [0], gguf_file: a}", "student.gguf_file", "unknown key"),
    ("student: {from: teacher, layer: [0]}", "student.layer", "did you mean 'layers'"),
    ("teacher: {model: a, dtyp: float32}", "teacher.dtyp", "did you mean 'dtype'"),
    ("data: {train: a, evaluation: b}", "data.evaluation", "did you mean 'eval'"),
    ("data: {train: {path: a, splt: train}}", "data.train.splt", "did you mean 'split'"),
    ("data: {train: a, columns: {promt: q}}", "data.columns.promt", "did you mean 'prompt'"),
    ("loss: {divergense: jsd}", "loss.divergense", "did you mean 'divergence'"),
    ("loss: {temprature: 2}", "loss.temprature", "did you mean 'temperature'"),
    ("training: {learning_rat: 1}", "training.learning_rat", "did you mean 'learning_rate'"),
    ("training: {zzzzzz: 1}", "training.zzzzzz", "expected a field of transformers.TrainingArguments"),
    # planned
    ("lmbda: 0.5", "lmbda", "not available in this version"),
    ("loss: {lmbda: 0.5}", "loss.lmbda", "not available in this version"),
    ("training: {packing: true}", "training.packing", "belongs in data"),
    # the plan, difficulty, the store
    ("teacher:\nteachers: {weak: a, strong: b}", "teachers", "weak, strong need a plan that says when each of them teaches"),
    (
        "teacher:\nteachers: {weak: a, strong: b}\nplan: pocl\nstudent: {from: teacher, layers: [0]}",
        "student.from",
        "name one of weak, strong",
    ),
    ("plan: {preset: sft}\nstudent: {from: teacher, layers: [0]}\nteacher:", "student.from", "there is no teacher; name a model"),
    ("plan: pockl", "plan", "unknown preset 'pockl'; did you mean 'pocl'"),
    ("plan: {preset: pocl, epoch: 2}", "plan.epoch", "unknown option of pocl; did you mean 'epochs'"),
    ("plan: {stages: [{}, {temperature: -1}]}", "plan.stages[1].temperature", "expected numbers > 0"),
    ("plan: 3", "plan", "expected a preset's name"),
    ("plan: {preset: kd}\nteacher:", "teacher", "missing"),
    ("plan: pocl\nloss: {temperature: 2}", "loss.temperature", "the plan says it for every stage"),
    ("plan: pocl\nloss: {kd_ratio: 0.5}", "loss.kd_ratio", "the plan says it for every stage"),
    ("plan: pocl\ntraining: {num_train_epochs: 2}", "training.num_train_epochs", "the plan says how long each stage is"),
    ("difficulty: {signal: los}", "difficulty.signal", "did you mean 'loss'"),
    ("difficulty: {signal: loss, column: level}", "difficulty.column", "given together with signal"),
    ("difficulty: {max_new_tokens: 0}", "difficulty.max_new_tokens", "expected a whole number >= 1"),
    ("difficulty: {temperature: -1}", "difficulty.temperature", "expected a number in [0, inf)"),
    ("difficulty: {scorer: {dtype: float32}}", "difficulty.scorer.model", "missing"),
    ("difficulty: loss", "difficulty", "expected a mapping"),
    ("store: {kind: hiden}", "store.kind", "did you mean 'hidden'"),
    ("store: {max_gb: 0}", "store.max_gb", "expected a number in (0, inf)"),
    ("store: {size: 3}", "store.size", "unknown key"),
    ("student: {model: a, park: true}", "student.park", "unknown key"),
    ("teacher: {model: a, park: 1}", "teacher.park", "expected true or false"),
    # models
    ("student:", "student", "missing"),
    ("student: 3", "student", "expected a model's name or path, or a mapping with the key model, got 3"),
    ("student: ''", "student", "expected a model's name or path"),
    ("student: {dtype: float32}", "student.model", "missing"),
    ("student: {model: a, dtype: float33}", "student.dtype", "got 'float33'; did you mean 'float32'"),
    ("student: {model: a, layers: 3}", "student.layers", "expected a list of different layer numbers >= 0, got 3"),
    ("student: {model: a, layers: []}", "student.layers", "got a list []"),
    ("student: {from: teacher, layers: [0, 0]}", "student.layers", "different layer numbers"),
    ("student: {from: teacher, layers: [0, -1]}", "student.layers", "layer numbers >= 0"),
    ("student: {from: teacher, layers: [0, 1.5]}", "student.layers", "layer numbers >= 0"),
    ("student: {from: teacher, layers: [true]}", "student.layers", "layer numbers >= 0"),
    ("student: {from: teacher}", "student.layers", "missing"),
    ("student: {from: , layers: [0]}", "student.from", "missing"),
    ("student: {from: techer, layers: [0]}", "student.from", "unknown teacher 'techer'; did you mean 'teacher'"),
    ("student: {from: teacher, model: a, layers: [0]}", "student", "both from and model"),
    (CUT + "teacher: {model: a, layers: [0]}", "student.from", "itself cut"),
    ("teacher:", "teacher", "missing"),
    ("teacher: [a]", "teacher", "got a list ['a']"),
    ("teachers: {strong: a}", "teachers", "given together with teacher"),
    ("teacher:\nteachers: {}", "teachers", "expected a mapping of names to models"),
    ("teacher:\nteachers: [a]", "teachers", "expected a mapping of names to models"),
    ("teacher:\nteachers: {strong: {}}", "teachers.strong.model", "missing"),
    # data
    ("data:", "data", "missing"),
    ("data: rows.jsonl", "data", "expected a mapping with the keys train, eval"),
    ("data: {eval: a}", "data.train", "missing"),
    ("data: {train: 3}", "data.train", "expected a file, a data set's name, or {path, name, split}, got 3"),
    ("data: {train: a, eval: [b]}", "data.eval", "expected a file"),
    ("data: {train: {name: main}}", "data.train.path", "missing"),
    ("data: {train: a, max_length: 1}", "data.max_length", "expected a whole number >= 2, got 1"),
    ("data: {train: a, max_length: long}", "data.max_length", "got 'long'"),
    ("data: {train: a, max_length: true}", "data.max_length", "got true"),
    ("data: {train: a, columns: [prompt]}", "data.columns", "expected a mapping"),
    ("data: {train: a, columns: {prompt: 3}}", "data.columns.prompt", "expected a string, got 3"),
    ("data: {train: a, completion_only_loss: 1}", "data.completion_only_loss", "expected true or false, got 1"),
    ("data: {train: a, chat_template: chatml}", "data.chat_template", "expected true or false, got 'chatml'"),
    # loss
    ("loss: forward_kl", "loss", "expected a mapping"),
    ("loss: {divergence: foward_kl}", "loss.divergence", "did you mean 'forward_kl'"),
    ("loss: {divergence: [jsd]}", "loss.divergence", "expected one of forward_kl, reverse_kl"),
    ("loss: {beta: 0.1}", "loss.beta", "not a parameter of the divergence forward_kl; it is one of jsd, alpha_beta"),
    ("loss: {divergence: jsd, beta: 1.5}", "loss.beta", "expected a number in [0, 1], got 1.5"),
    ("loss: {divergence: skew_forward_kl, alpha: 1}", "loss.alpha", "expected a number in [0, 1), got 1"),
    ("loss: {divergence: alpha_beta, beta: 0}", "loss.beta", "expected a number in (0, inf), got 0"),
    ("loss: {temperature: 0}", "loss.temperature", "expected a number in (0, inf), got 0"),
    ("loss: {temperature: .inf}", "loss.temperature", "got inf"),
    ("loss: {temperature: '2'}", "loss.temperature", "got '2'"),
    ("loss: {kd_ratio: 1.1}", "loss.kd_ratio", "expected a number in [0, 1], got 1.1"),
    ("loss: {kd_ratio: true}", "loss.kd_ratio", "got true"),
    ("loss: {temperature_squared: 2}", "loss.temperature_squared", "expected true or false, got 2"),
    ("loss: {chunk_tokens: 0}", "loss.chunk_tokens", "expected a whole number >= 1, got 0"),
    ("loss: {logits_dtype: float64}", "loss.logits_dtype", "expected one of float32, bfloat16, float16, got 'float64'"),
    # training
    ("training: fast", "training", "expected a mapping, got 'fast'"),
    ("training: {learning_rate: fast}", "training.learning_rate", "expected a number, got 'fast'"),
    ("training: {learning_rate: }", "training.learning_rate", "expected a number, got null"),
    ("training: {max_steps: 1.5}", "training.max_steps", "expected a whole number, got 1.5"),
    ("training: {bf16: 1}", "training.bf16", "expected true or false, got 1"),
    ("training: {save_total_limit: all}", "training.save_total_limit", "expected a whole number or null, got 'all'"),
    ("training: {run_name: 3}", "training.run_name", "expected a string or null, got 3"),
    ("training: {lr_scheduler_type: cosin}", "training.lr_scheduler_type", "did you mean 'cosine'"),
    ("training: {optim: adamw_torchh}", "training.optim", "did you mean 'adamw_torch'"),
    ("training: {eval_strategy: step}", "training.eval_strategy", "expected one of no, steps, epoch, got 'step'"),
    ("training: {output_dir: a}", "training.output_dir", "belongs at the top level"),
    ("training: {seed: 3}", "training.seed", "belongs at the top level"),
    # the rest
    ("output_dir: 3", "output_dir", "expected a string, got 3"),
    ("seed: -1", "seed", "expected a whole number in [0, 4294967295], got -1"),
    ("seed: one", "seed", "got 'one'"),
]


@pytest.mark.parametrize(("change", "key", "message"), WRONG, ids=[f"{key}-{i}" for i, (_, key, _) in enumerate(WRONG)])
def test_what_is_refused(tmp_path, change, key, message):
    changed = set(re.findall(r"^(\w+):", change, re.MULTILINE))
    kept = [line for line in MINIMAL.splitlines() if line.split(":")[0] not in changed]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "\n".join([*kept, change]))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'run.yaml'}: {key}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: a\nseed: [1", "run.yaml: line 2: not valid YAML: "),
        ("student: a\n\tseed: 1", "run.yaml: line 2: not valid YAML: "),
        ("student: a: b", "run.yaml: line 1: not valid YAML: mapping values are not allowed here"),
        ("student: a\nteacher: b\nstudent: c", "run.yaml: line 3: not valid YAML: the key 'student' is there twice"),
        ("loss:\n  beta: 1\n  beta: 2", "run.yaml: line 3: not valid YAML: the key 'beta' is there twice"),
        ("seed: !!python/object:os.system 1", "run.yaml: line 1: not valid YAML: could not determine a constructor"),
        ("student: a\n---\nstudent: b", "run.yaml: line 2: not valid YAML: "),
        ("seed: 2024-13-45", "run.yaml: not valid YAML: month must be in 1..12"),
        ("student: \x07", "run.yaml: not valid YAML: "),
        ("", "run.yaml: expected keys and values such as `student: NAME`, got null"),
        ("- a\n- b", "run.yaml: expected keys and values such as `student: NAME`, got a list ['a', 'b']"),
    ],
)
def test_broken_files(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file; `fastkd init` writes"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: cannot be read"):
        load_config(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected key.path=value"),
        ("=3", "override '=3': expected key.path=value"),
        ("loss..beta=3", "override 'loss..beta=3': expected key.path=value"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
        ("teacher.dtype=float32", "teacher is 'big'; write 'teacher={...}' with all its keys"),
        ("training.learning_rate=fast", "training.learning_rate: expected a number, got 'fast'"),
        ("loss.temprature=2", "loss.temprature: unknown key; did you mean 'temperature'"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL, override)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "run.yaml"))
    assert "\n" not in str(caught.value)


def test_yamls_aliases_are_separate_and_no_is_a_word(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("student: &m {model: a}\nteacher: *m\ndata: {train: x.jsonl}\ntraining: {save_strategy: no}\n")
    found = load_config(path, ["student.dtype=float16"])
    assert found.student.dtype == "float16"
    assert found.teachers["teacher"].dtype is None
    assert found.training["save_strategy"] == "no"


@pytest.mark.parametrize("name", ["demo", "pocl", "clpd", "pretrain", "one-gpu-24gb", "one-gpu-80gb"])
def test_the_examples_load(name):
    config = load_config(Path(__file__).parents[1] / "examples" / f"{name}.yaml")
    assert config.plan is None if name.startswith(("demo", "one-gpu")) else config.plan.name == name
