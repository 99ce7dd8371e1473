"""The command line, from configuration to a folder that `from_pretrained` loads."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkd.cli import main
from fastkd.config import load_config
from fastkd.report import VOLATILE, read_metrics

from .tiny import rows, tiny_llama, tiny_tokenizer


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a teacher, data and a configuration, as a user would have it; it is the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(2, hidden=24, layers=4).save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    for name, n, seed in (("train", 16, 0), ("eval", 6, 1)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(n, seed)))
    Path("broken").mkdir()
    for file in Path("teacher").iterdir():
        (Path("broken") / file.name).write_bytes(file.read_bytes())
    (Path("broken") / "model.safetensors").write_bytes(b"not weights")
    Path("run.yaml").write_text(
        """
student: {from: teacher, layers: [0, 2, 3]}
teacher: teacher
data: {train: train.jsonl, eval: eval.jsonl, max_length: 16}
loss: {divergence: jsd, beta: 0.3, kd_ratio: 0.8, temperature: 2}
training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 3e-3, logging_steps: 2, save_steps: 2, use_cpu: true,
  disable_tqdm: true}
output_dir: out
"""
    )
    return tmp_path


def fails(capsys, *words: str) -> str:
    """The one line that a failing command writes; its status must be 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fastkd: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def timeless(folder: str) -> list[dict]:
    """The metrics, without what a clock gave and without the last row of a training, which sums up one process."""
    rows = [row for row in read_metrics(folder) if "train_runtime" not in row]
    return [{name: value for name, value in row.items() if not any(part in name for part in VOLATILE)} for row in rows]


def test_distill_from_configuration_to_student(place, capsys):
    assert main(["distill", "run.yaml", "loss.temperature=1.5"]) == 0
    printed = capsys.readouterr().out
    assert "before, on " in printed
    assert "after, on " in printed
    student = AutoModelForCausalLM.from_pretrained("out")
    assert student.config.num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained("out").eos_token == "</s>"
    found = read_metrics("out")
    evaluations = [row for row in found if "eval_kl" in row]
    assert [row["step"] for row in evaluations] == [0, 6]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    training = [row for row in found if "loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6]
    wanted = {"step", "stage", "teacher", "temperature", "kd_ratio", "loss", "kd", "ce", "tokens", "lr"}
    assert all(wanted <= row.keys() for row in training)
    assert training[0]["temperature"] == 1.5
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["stages"][0]["steps"] == 6
    assert plan["config"]["loss"]["parameters"] == {"beta": 0.3}
    report = Path("out/report.html").read_text()
    assert report.count("<svg") >= 6
    assert "KL to the teacher" in report
    assert not any(word in report for word in ("<script", "src=", 'href="http'))  # opens offline


def test_resume_gives_the_uninterrupted_students_weights(place, capsys):
    assert main(["distill", "run.yaml"]) == 0
    whole = AutoModelForCausalLM.from_pretrained("out").state_dict()
    script = (
        "import os\nfrom transformers import TrainerCallback\nfrom fastkd import trainer\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 5: os.kill(os.getpid(), 9)\n"
        "init = trainer.KDTrainer.__init__\n"
        "def patched(self, *a, **k):\n    init(self, *a, **k)\n    self.add_callback(Kill())\n"
        "trainer.KDTrainer.__init__ = patched\n"
        "from fastkd.cli import main\nmain(['distill', 'run.yaml', 'output_dir=cut'])\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    assert "already holds a run" in fails(capsys, "distill", "run.yaml", "output_dir=cut")
    plan = json.loads(Path("cut/plan.json").read_text())
    del plan["config"]["data"]["padding_free"]  # as in a run that an earlier version began
    Path("cut/plan.json").write_text(json.dumps(plan))
    assert main(["distill", "run.yaml", "--resume", "output_dir=cut"]) == 0
    resumed = AutoModelForCausalLM.from_pretrained("cut").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert timeless("cut") == timeless("out")


def test_resume_is_with_the_settings_it_began_with(place, capsys):
    assert main(["distill", "run.yaml"]) == 0
    line = fails(capsys, "distill", "run.yaml", "--resume", "loss.temperature=5")
    assert "holds another run: loss.temperature was 2.0, now it is 5.0" in line
    before = read_metrics("out")
    assert main(["distill", "run.yaml", "--resume", "training.logging_steps=3"]) == 0  # nothing is left to do, nothing is done
    assert [row for row in read_metrics("out") if "loss" in row or "eval_kl" in row] == [
        row for row in before if "loss" in row or "eval_kl" in row
    ]


def test_a_curriculum_from_configuration_to_student(place, capsys):
    """Scores, stages, two teachers, a store: what `plan`, `score`, `cache` and `distill` say and leave behind."""
    tiny_llama(3, hidden=24, layers=2).save_pretrained("weak")
    tiny_tokenizer().save_pretrained("weak")
    options = [
        "student={from: strong, layers: [0, 2, 3]}", "teacher=null", "teachers={weak: weak, strong: teacher}",
        "plan={preset: clpd, fractions: [0.25, 0.75], epochs: 2, restart_lr: true}", "difficulty={max_new_tokens: 8}",
        "store={path: cache, batch_size: 4}", "training.max_steps=-1",
    ]  # fmt: skip
    assert main(["plan", "run.yaml", *options]) == 0
    shown = capsys.readouterr().out
    assert "plan clpd: 16 samples, batch 4, 8 steps" in shown
    assert re.search(r"0 +clpd 1/2 +4 +2 +2 +\d+ +\S+ +weak +2 +0.8 .*restart", shown)
    assert re.search(r"1 +clpd 2/2 +12 +2 +6 +\d+ +\S+ +strong", shown)
    assert "teacher  weak from step 0, strong from step 2" in shown
    assert "not scored yet" in shown
    assert main(["score", "run.yaml", "--compare", *options]) == 0
    assert "rouge / loss" in capsys.readouterr().out
    scores = pq.read_table("out/difficulty.parquet")
    assert set(scores.column_names) >= {"id", "rouge", "loss", "rouge_loss", "rank_loss", "length", "steps", "score", "stage"}
    stage = dict(zip(scores["id"].to_pylist(), scores["stage"].to_pylist(), strict=True))
    by_score = sorted(stage, key=lambda i: -scores["score"][scores["id"].to_pylist().index(i)].as_py())
    assert [stage[i] for i in by_score] == [0] * 4 + [1] * 12
    assert main(["plan", "run.yaml", *options]) == 0
    assert "not scored yet" not in capsys.readouterr().out
    assert main(["cache", "run.yaml", *options]) == 0
    assert "store weak, train: complete, 4 batches computed now" in capsys.readouterr().out
    assert main(["distill", "run.yaml", *options]) == 0
    plan = json.loads(Path("out/plan.json").read_text())
    assert [(row["teacher"], row["samples"], row["steps"]) for row in plan["stages"]] == [("weak", 4, 2), ("strong", 12, 6)]
    found = [row for row in read_metrics("out") if "loss" in row]
    assert [(row["step"], row["stage"], row["teacher"]) for row in found] == [
        (2, 0, "weak"), (4, 1, "strong"), (6, 1, "strong"), (8, 1, "strong"),
    ]  # fmt: skip
    report = Path("out/report.html").read_text()
    assert "<h2>Stages</h2>" in report
    assert "weak" in report
    # The store is full, the scores are there: nothing is computed again, and no teacher's body is loaded.
    written = {file: file.stat().st_mtime_ns for file in Path("cache").rglob("*") if file.is_file()}
    assert main(["distill", "run.yaml", *options, "output_dir=again", "difficulty.path=out/difficulty.parquet"]) == 0
    assert {file: file.stat().st_mtime_ns for file in Path("cache").rglob("*") if file.is_file()} == written
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("out", "again"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_recipe_of_a_preset_holds_where_the_file_is_silent(place, capsys):
    options = [
        "plan={preset: pocl, epochs: 1}",
        "loss={}",
        "difficulty={signal: length}",
        "training={per_device_train_batch_size: 4, use_cpu: true}",
    ]
    assert main(["plan", "run.yaml", *options]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"0\.0001 \.\. 0\.0001 \.\. ", shown)) == 4
    assert main(["plan", "run.yaml", *options, "training.learning_rate=0.003"]) == 0
    assert "0.003 .. 0.003" in capsys.readouterr().out


def test_a_recipe_gives_way_to_another_scheduler(place, capsys):
    options = [
        "plan={preset: pocl, epochs: 1}",
        "loss={}",
        "difficulty={signal: length}",
        "training={use_cpu: true, lr_scheduler_type: linear}",
    ]
    assert main(["plan", "run.yaml", *options]) == 0
    assert "1e-04 .. 1e-04" in capsys.readouterr().out.replace("0.0001", "1e-04")


def test_cache_needs_no_scores(place, capsys):
    assert main(["cache", "run.yaml", "store={path: cache}", "plan={preset: pocl, order: sorted}", "loss={}"]) == 0
    assert "store teacher, train: complete" in capsys.readouterr().out


def test_a_plan_with_a_parameter_in_one_stage_is_shown(place, capsys):
    stages = "plan={stages: [{steps: 2}, {steps: 2, parameters: {beta: {from: 0.1, to: 0.9}}}]}"
    assert main(["plan", "run.yaml", stages, "training.max_steps=3", "loss={divergence: jsd}"]) == 0
    shown = capsys.readouterr().out
    assert "3 steps (max_steps cuts 4 short)" in shown
    assert "beta" in shown


def test_the_report_of_a_run_without_a_teacher(place):
    options = ["teacher=null", "plan=sft", "student=teacher", "training.eval_strategy=steps", "training.eval_steps=2", "loss={}"]
    assert main(["distill", "run.yaml", *options]) == 0
    report = Path("out/report.html").read_text()
    assert "No evaluation rows" not in report
    assert "perplexity" in report


def test_a_scorer_with_another_tokenizer_is_refused(place, capsys):
    import shutil

    shutil.copytree("teacher", "other")
    file = Path("other/tokenizer.json")
    file.write_text(file.read_text().replace('"cat"', '"kat"'))
    line = fails(capsys, "score", "run.yaml", "difficulty={signal: loss, scorer: other}")
    assert "difficulty.scorer: the tokenizers differ" in line
    assert "'kat' to the scorer" in line


def test_eval(place, capsys):
    assert main(["eval", "teacher", "eval.jsonl", "--max-new-tokens", "8", "--seeds", "2", "--temperature", "1", "--out", "r.json"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "ROUGE-L" in shown
    found = json.loads(Path("r.json").read_text())
    assert found["counts"]["rows"] == 6
    assert len(found["metrics"]["rouge_l"]["per_seed"]) == 2
    assert found["metrics"]["perplexity"]["mean"] > 1
    for words, expected in (
        (["teacher"], "DATA: missing"),
        (["teacher", "nowhere.jsonl"], "no such file"),
        (["nowhere", "eval.jsonl"], "no model 'nowhere'"),
        (["teacher", "eval.jsonl", "--metrics", "blue"], "metrics: expected some of"),
        (["teacher", "eval.jsonl", "--column", "prompt"], "expected OURS=THEIRS"),
        (["teacher", "eval.jsonl", "--rows", "0"], "rows: expected a number >= 1"),
        (["teacher", "--lm-eval", "gsm8k"], "pip install 'fastkd[eval]'"),
    ):
        assert expected in fails(capsys, "eval", *words)


def test_a_finished_student_without_checkpoints_is_not_trained_over(place, capsys):
    assert main(["distill", "run.yaml", "training.save_strategy=no"]) == 0
    weights = Path("out/model.safetensors").read_bytes()
    assert "no checkpoint to resume from" in fails(capsys, "distill", "run.yaml", "--resume", "training.save_strategy=no")
    assert Path("out/model.safetensors").read_bytes() == weights


def test_resume_without_a_checkpoint_begins_at_the_beginning(place, caplog):
    assert main(["distill", "run.yaml", "--resume", "training.max_steps=2"]) == 0
    assert "starting from the beginning" in caplog.text


def test_init_writes_a_configuration_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.yaml"]) == 0
    assert load_config("mine.yaml").loss.divergence == "forward_kl"
    Path("mine.yaml").write_text("precious")
    assert "exists already" in fails(capsys, "init", "mine.yaml")
    assert Path("mine.yaml").read_text() == "precious"
    assert "no/such" in fails(capsys, "init", "no/such/folder.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distill", "missing.yaml"], "missing.yaml: no such file"),
        (["distill", "run.yaml", "lss.temperature=2"], "run.yaml: lss: unknown key; did you mean 'loss'?"),
        (["distill", "run.yaml", "loss.temperature=0"], "run.yaml: loss.temperature"),
        (["distill", "run.yaml", "data.train=nowhere.jsonl"], "run.yaml: data.train: nowhere.jsonl"),
        (["distill", "run.yaml", "data.columns={prompt: question}"], "run.yaml: data.columns"),
        (["distill", "run.yaml", "teacher=./nowhere", "student=teacher"], "run.yaml: teacher: no model at './nowhere'"),
        (["distill", "run.yaml", "student.layers=[0, 9]"], "run.yaml: student.layers: layers has 9"),
        (["distill", "run.yaml", "student=teachr"], "run.yaml: student: no model 'teachr': no such folder here"),
        (["distill", "run.yaml", "data.columns={question: prompt}"], "run.yaml: data.columns: expected {our name: the file's name}"),
        (["distill", "run.yaml", "data.eval=null", "training.eval_strategy=epoch"], "run.yaml: training.eval_strategy"),
        (["distill", "run.yaml", "plan=pocl", "loss.temperature=null"], "run.yaml: loss.kd_ratio: the plan says it for every stage"),
        (["distill", "run.yaml", "training.lr_scheduler_type=zigzag"], "run.yaml: training.lr_scheduler_type"),
        (["distill", "run.yaml", "training.report_to=dvclive"], "run.yaml: training.report_to: dvclive"),
        (["distill", "run.yaml", "training.resume_from_checkpoint=out"], "run.yaml: training.resume_from_checkpoint: has no effect"),
        (["distill", "run.yaml", "training.gradient_accumulation_steps=0"], "training.gradient_accumulation_steps: expected a number"),
        (["distill", "run.yaml", "output_dir=teacher"], "is where 'student' is read from"),
        (["distill", "run.yaml", "teacher=broken", "student=teacher"], "run.yaml: teacher: "),
        (["cache", "run.yaml"], "run.yaml: store: missing"),
        (["plan", "run.yaml", "plan={stages: [{steps: 0}]}"], "run.yaml: plan.stages[0].steps: expected a whole number > 0"),
        (
            ["score", "run.yaml", "plan={preset: pocl, buckets: 20}", "loss={}"],
            "run.yaml: plan.stages[0]: has 0 samples: the bucket is empty",
        ),
        (["score", "run.yaml", "difficulty={column: level}"], "run.yaml: difficulty.column: no column"),
        (["score", "run.yaml", "--resume"], "unrecognized arguments: --resume"),
        (
            ["distill", "run.yaml", "store={kind: topk}", "plan={stages: [{steps: 2, temperature: {from: 1, to: 2}}]}", "loss={}"],
            "one temperature",
        ),
        (["distill", "run.yaml", "--resum"], "unrecognized arguments: --resum"),
        (["distil", "run.yaml"], "invalid choice: 'distil'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_users_mistake_is_one_line(place, capsys, words, expected):
    assert expected in fails(capsys, *words)
    assert not any(Path("out").glob("*"))


def test_a_loss_that_is_not_finite_is_one_line_with_the_samples(place, capsys):
    broken = tiny_llama(1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[tiny_tokenizer().convert_tokens_to_ids("cat")] = float("nan")
    broken.save_pretrained("broken")
    tiny_tokenizer().save_pretrained("broken")
    line = fails(capsys, "distill", "run.yaml", "student=broken", "data.eval=null")
    assert re.search(r"the loss is not finite at step \d; samples: s", line)


def test_debug_shows_the_traceback(place):
    """Of an error that is blamed on a key of the configuration, too."""
    from fastkd.config import ConfigError

    with pytest.raises(ConfigError, match="teacher: no model"):
        main(["distill", "run.yaml", "--debug", "student=teacher", "teacher=./nowhere"])


def test_bench_needs_a_checkout(tmp_path, monkeypatch, capsys):
    import fastkd.cli

    monkeypatch.setattr(fastkd.cli, "__file__", str(tmp_path / "fastkd" / "cli.py"))
    assert "needs a checkout" in fails(capsys, "bench")
