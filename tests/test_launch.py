"""More than one process, as `accelerate launch` starts them, and the files for it that examples/accelerate has."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM

import fastkd.cli
from fastkd.data import tokenize
from fastkd.report import read_metrics

from .launch_worker import DIES_AT, noted
from .tiny import rows, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "accelerate"
ONE, TWO = "training.per_device_train_batch_size=4", "training.per_device_train_batch_size=2"


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Two CPU processes in ``folder``."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(SHIPPED / "ddp_cpu.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one process; the same of two; of two, cut off and resumed; and begun by one, resumed by two. All stages use a store."""
    place, before = tmp_path_factory.mktemp("launch"), Path.cwd()
    os.chdir(place)
    try:
        for name, seed, hidden in (("weak", 3, 16), ("strong", 2, 24)):
            tiny_llama(seed, hidden=hidden, layers=4).save_pretrained(name)
            tiny_tokenizer().save_pretrained(name)
        Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(14)))  # the last batch of an epoch is short
        Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3, 1)))
        Path("run.yaml").write_text(
            """
student: {from: strong, layers: [0, 2, 3]}
teachers: {weak: weak, strong: strong}
data: {train: train.jsonl, eval: eval.jsonl, max_length: 16}
loss: {divergence: jsd, beta: 0.3, kd_ratio: 0.8, temperature: 2}
plan: {stages: [{epochs: 1, teacher: weak}, {steps: 4, teacher: strong, reset_optimizer: true}]}
store: {kind: hidden, path: store-of-two, batch_size: 4}
training: {learning_rate: 3e-3, logging_steps: 2, save_steps: 3, save_total_limit: 9, use_cpu: true, disable_tqdm: true}
"""
        )
        with noted(Path("order-one-0.jsonl")):
            assert fastkd.cli.main(["distill", "run.yaml", ONE, "output_dir=one", "store.path=store-of-one"]) == 0
        # As it was when step 3 had been saved, in the middle of what one row of the metrics sums up.
        Path("begun").mkdir()
        for kept in ("plan.json", "metrics.jsonl"):
            shutil.copy(Path("one", kept), "begun")
        shutil.copytree("one/checkpoint-3", "begun/checkpoint-3")
        commands = [
            ["distill", "run.yaml", TWO, "output_dir=two"],
            ["distill", "run.yaml", TWO, "output_dir=begun", "--resume"],
            ["distill", "run.yaml", TWO, "output_dir=cut"],
        ]
        dead = launch(place, "-m", "tests.launch_worker", json.dumps(commands))
        assert "SIGKILL" in dead.stderr, dead.stderr[-3000:]
        assert not Path("cut/config.json").exists()
        resumed = launch(place, "-m", "fastkd.cli", "distill", "run.yaml", TWO, "output_dir=cut", "--resume")
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        yield place, resumed
    finally:
        os.chdir(before)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def curve(folder: Path) -> list[dict[str, float]]:
    return [{k: row[k] for k in ("step", "stage", "loss", "kd", "ce", "tokens")} for row in read_metrics(folder) if "loss" in row]


def order(place: Path, name: str) -> dict[int, list[int]]:
    """The samples of each step, process by process, without the rows that fill up a short batch."""
    found: dict[int, list[int]] = {}
    for file in sorted(place.glob(f"order-{name}-*.jsonl")):
        for step, samples in map(json.loads, file.read_text().splitlines()):
            found.setdefault(step, []).extend(sample for sample in samples if sample >= 0)
    return found


def test_two_processes_take_the_samples_of_one(runs):
    place, _ = runs
    one, two = order(place, "one"), order(place, "two")
    assert len(list(place.glob("order-two-*.jsonl"))) == 2
    assert list(one) == list(range(8))
    assert sorted(s for step in range(4) for s in one[step]) == list(range(14))
    assert {step: sorted(samples) for step, samples in two.items()} == {step: sorted(samples) for step, samples in one.items()}
    begun = order(place, "begun")
    assert {step: sorted(samples) for step, samples in begun.items()} == {step: sorted(one[step]) for step in range(3, 8)}


@pytest.mark.parametrize("name", ["two", "begun"])
def test_two_processes_learn_what_one_learns(runs, name):
    """From the first step on, or from the third, which one process had saved."""
    place, _ = runs
    one, other = curve(place / "one"), curve(place / name)
    assert [row["step"] for row in one] == [2, 4, 6, 8]
    for mine, theirs in zip(one, other, strict=True):
        assert theirs == pytest.approx(mine, rel=0, abs=1e-5)
    expected = weights(place / "one")
    assert all((value - expected[key]).abs().max() < 1e-5 for key, value in weights(place / name).items())


def test_the_padding_of_two_processes_is_summed(runs):
    place, _ = runs
    lengths = [len(ids) for ids in tokenize(rows(14), tiny_tokenizer(), max_length=16)["input_ids"]]
    useful, computed = [0] * 4, [0] * 4  # of two steps each
    for file in place.glob("order-two-*.jsonl"):
        for step, samples in map(json.loads, file.read_text().splitlines()):
            real = [lengths[sample] for sample in samples if sample >= 0]
            useful[step // 2] += sum(real)
            computed[step // 2] += len(samples) * max(real, default=lengths[0])
    found = [row["useful_tokens"] for row in read_metrics(place / "two") if "loss" in row]
    assert found == pytest.approx([a / b for a, b in zip(useful, computed, strict=True)])
    assert found == [row["useful_tokens"] for row in read_metrics(place / "cut") if "loss" in row]


def test_two_processes_resume_bit_for_bit(runs):
    place, _ = runs
    assert curve(place / "cut") == curve(place / "two")
    assert [row["step"] for row in read_metrics(place / "cut") if "eval_kl" in row] == [0, 8]
    assert max(order(place, "cut")) == DIES_AT - 1
    expected = weights(place / "two")
    assert all(torch.equal(value, expected[key]) for key, value in weights(place / "cut").items())


def test_two_processes_fill_the_store_of_one(runs):
    place, _ = runs
    one, two = (
        {file.relative_to(place / store).as_posix(): file.read_bytes() for file in (place / store).rglob("*.safetensors")}
        for store in ("store-of-one", "store-of-two")
    )
    assert sum("train" in name for name in one) >= 8  # four canonical batches of each teacher
    assert one == two


def test_only_the_first_process_speaks(runs):
    _, resumed = runs
    assert resumed.stdout.count("student, metrics.jsonl and report.html: cut") == 1
    assert resumed.stdout.count("after, on ") == 1
    assert resumed.stderr.count("Tokenizing train: 100%") == 1


def test_a_mistake_is_one_line_for_all_processes(runs):
    place, _ = runs
    found = launch(place, "-m", "fastkd.cli", "distill", "run.yaml", "loss.temperature=0")
    assert found.returncode != 0
    said = [line for line in found.stderr.splitlines() if line.startswith("fastkd: ")]
    assert said == ["fastkd: run.yaml: loss.temperature: expected a number in (0, inf), got 0"]


def test_a_mistake_of_another_process_is_said_with_its_number(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(fastkd.cli, "_PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which the command replaces
    try:
        with pytest.raises(SystemExit):
            fastkd.cli.main(["plan", str(tmp_path / "no.yaml")])
    finally:
        logging.getLogger("fastkd").setLevel(logging.NOTSET)  # which the command raises
    error = capsys.readouterr().err
    assert error.startswith("fastkd: process 3: ")
    assert "no such file" in error


def test_processes_without_a_gpu_are_not_left_to_train_alone(monkeypatch, tmp_path):
    from transformers import TrainingArguments

    from fastkd.trainer import KDConfig

    prepare = TrainingArguments.__post_init__

    def alone(self):
        """As with accelerate 1.15 where there is no GPU; 1.10 joins such processes on the CPU."""
        prepare(self)
        monkeypatch.setenv("WORLD_SIZE", "2")

    monkeypatch.setattr(TrainingArguments, "__post_init__", alone)
    with pytest.raises(ValueError, match="use_cpu: 2 processes were started"):
        KDConfig(output_dir=str(tmp_path))


# The files that examples/accelerate has.

FILES = sorted(SHIPPED.glob("*.yaml"))


def test_all_are_there():
    assert [file.stem for file in FILES] == ["ddp", "ddp_cpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_is_what_accelerate_reads(file, monkeypatch):
    """Every key is one that the launcher, and the plugin behind it, knows: the launcher takes others in silence."""
    read = load_config_from_file(str(file))  # refuses unknown keys at the top
    assert read.num_processes == 2
    assert f"examples/accelerate/{file.name}" in file.read_text()
    known = {action.dest for action in launch_command_parser()._actions}
    plugin = {"fsdp2": FullyShardedDataParallelPlugin, "deepspeed_zero2": DeepSpeedPlugin, "deepspeed_zero3": DeepSpeedPlugin}.get(
        file.stem
    )
    options = read.fsdp_config | read.deepspeed_config
    assert bool(options) == (plugin is not None)
    assert set(options) <= known, set(options) - known
    if plugin is None:
        assert read.distributed_type == "MULTI_GPU"
        return
    theirs = {"fsdp_transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap", "fsdp_offload_params": "cpu_offload"}
    fields = {field.name for field in dataclasses.fields(plugin)}
    missing = {name for name in options if theirs.get(name, name.removeprefix("fsdp_") if name != "fsdp_version" else name) not in fields}
    assert not missing


def test_fsdp2_is_what_the_file_says(monkeypatch):
    """Through the environment, as the launcher hands it over."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    for name in [name for name in os.environ if name.startswith(("FSDP", "ACCELERATE"))]:
        monkeypatch.delenv(name)
    file = SHIPPED / "fsdp2.yaml"
    words = ["--use_fsdp", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no", "x.py"]
    args = launch_command_parser().parse_args([*words])
    args.main_process_port = 0
    for name, value in yaml.safe_load(file.read_text())["fsdp_config"].items():
        setattr(args, name, value)
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith("FSDP"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.transformer_cls_names_to_wrap == ["Qwen3DecoderLayer"]
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.activation_checkpointing is False


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_what_the_file_says(stage):
    options = yaml.safe_load((SHIPPED / f"deepspeed_zero{stage}.yaml").read_text())["deepspeed_config"]
    plugin = DeepSpeedPlugin(**options)
    found = plugin.deepspeed_config
    assert found["zero_optimization"]["stage"] == stage
    assert found["gradient_accumulation_steps"] == found["gradient_clipping"] == "auto"
    assert plugin.zero3_init_flag is (stage == 3)
    assert found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
