"""The model card, and what is pushed to the hub: nothing goes over the network here, the calls that would send it are looked at."""

import json
import logging
import re
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

from fastkd.cli import main
from fastkd.model_card import CardFacts, hub_id, public_name
from fastkd.trainer import KDConfig, KDTrainer

from .test_cli import place  # noqa: F401
from .tiny import rows, tiny_llama, tiny_tokenizer

STUDENT = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@dataclass
class Upload:
    options: dict
    files: set[str]
    card: str


@dataclass
class Hub:
    """What `HfApi` was asked for; ``error``: what uploads in the background end with."""

    created: list[dict] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    error: Exception | None = None

    def create_repo(self, api, repo_id, **options):
        self.created.append({"repo_id": repo_id, **options})
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, api, *, folder_path, ignore_patterns=None, **options):
        folder = Path(folder_path)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        files = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        self.uploads.append(Upload(options, files, (folder / "README.md").read_text()))
        if not options.get("run_as_future"):
            return "commit"
        job: Future = Future()
        if self.error is None:
            job.set_result("commit")
        else:
            job.set_exception(self.error)
        return job


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, lambda api, *args, name=name, **options: getattr(found, name)(api, *args, **options))
    return found


def tiny_trainer(folder, peft_config=None, **options) -> KDTrainer:
    settings = {"logging_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
    settings |= {"max_length": 16, "disable_tqdm": True, "save_strategy": "no", "kd_ratio": 0.5}
    args = KDConfig(str(folder), **{**settings, **options})
    return KDTrainer(
        tiny_llama(1),
        {"big": tiny_llama(2)},
        args,
        rows(12),
        rows(4, 1),
        processing_class=tiny_tokenizer(),
        plan="kd",
        peft_config=peft_config,
    )


def metadata(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_hub_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert hub_id("owner/other") == public_name("owner/other") == "owner/other"
    for path in ("owner/model", str(tmp_path / "owner" / "model"), "/nowhere/here/model", "../up/model", "models\\model", "", None):
        assert hub_id(path) is None
    assert public_name("owner/model") == public_name("/nowhere/here/model") == "model"


def test_the_card_of_a_trainer(tmp_path):
    trainer = tiny_trainer(tmp_path / "mine", divergence="jsd", divergence_parameters={"beta": 0.25})
    trainer.card_facts = CardFacts("owner/small", "2 of its layers", {"big": "owner/big"}, "owner/rows", str(tmp_path / "held|out.jsonl"))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(language="en", license="apache-2.0", tags="mine", dataset_args="main")
    text = (tmp_path / "mine" / "README.md").read_text()
    found = metadata(text)
    assert found == {
        "base_model": "owner/small", "datasets": ["owner/rows"], "language": "en", "library_name": "transformers", "license": "apache-2.0",
        "pipeline_tag": "text-generation", "tags": ["mine", "fastkd", "knowledge-distillation"],
    }  # fmt: skip
    for line in (
        "# mine", "- student: [owner/small](https://huggingface.co/owner/small), 2 of its layers, ",
        f" {trainer.model.num_parameters():,} parameters\n- teacher: [owner/big]",
        "kd_ratio * jsd (beta 0.25) times temperature squared", "(main): 12 rows", "4 of 4 steps of 2 rows", "held|out.jsonl", "- torch ",
        "arXiv:2306.13649", '.from_pretrained("mine")',
    ):  # fmt: skip
        assert line in text, line
    evals = [row for row in map(json.loads, (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()) if "eval_ce" in row]
    assert [row["step"] for row in evals] == [0, 4]
    assert "| on held-out rows | step 0 | step 4 |" in text
    assert f"| cross-entropy, nats per token | {evals[0]['eval_ce']:.3f} | {evals[1]['eval_ce']:.3f} |" in text
    assert str(tmp_path) not in text


def test_push_to_hub(tmp_path, hub):
    folder = tmp_path / "mine"
    trainer = tiny_trainer(folder, store={"path": str(folder / "cache")}, save_strategy="steps", save_steps=2, hub_model_id="me/student")
    trainer.train()
    assert trainer.push_to_hub("one message", tags=["mine"], private=True) == "commit"
    assert hub.created == [{"repo_id": "me/student", "token": None, "private": True, "exist_ok": True}]
    (upload,) = hub.uploads
    assert upload.options["repo_id"] == "me/student"
    assert upload.options["commit_message"] == "one message"
    assert any((folder / "cache").rglob("*"))
    assert any(folder.glob("checkpoint-*/optimizer.pt"))
    assert (folder / "training_args.bin").exists()
    assert upload.files == STUDENT | {"metrics.jsonl"}
    assert "mine" in metadata(upload.card)["tags"]
    assert '.from_pretrained("me/student")' in upload.card


@pytest.mark.parametrize(("strategy", "whole"), [("end", None), ("every_save", ""), ("all_checkpoints", "*")])
def test_pushing_while_training(tmp_path, hub, strategy, whole):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "hub_token": "secret"}
    trainer = tiny_trainer(tmp_path, push_to_hub=True, hub_model_id="student", hub_strategy=strategy, hub_always_push=True, **options)
    assert hub.created[0]["repo_id"] == "student"
    trainer.train()
    assert len(hub.uploads) == (0 if strategy == "end" else 2)
    for step, upload in zip((2, 4), hub.uploads, strict=False):
        assert upload.options["repo_id"] == "me/student"
        assert upload.options["run_as_future"]
        assert upload.options["commit_message"] == f"Training in progress, step {step}"
        assert {name for name in upload.files if "/" not in name} == STUDENT
        inner = {name.partition("/")[2] for name in upload.files if "/" in name}
        assert {name.partition("/")[0] for name in upload.files if "/" in name} == (
            {whole.replace("*", f"checkpoint-{step}")} if whole else set()
        )
        assert {"optimizer.pt", "manifest.json", "0-kd_state.json"} <= inner or not whole
        assert f"{step} of 4 steps" in upload.card
    assert not [*tmp_path.glob("_hub-*")]
    for file in tmp_path.rglob("training_args.bin"):
        assert b"secret" not in file.read_bytes()
    trainer.save_model()  # as in transformers, which pushes it
    assert hub.uploads[-1].options["commit_message"] == "Model save"
    assert hub.uploads[-1].files >= STUDENT


def test_an_upload_that_fails_is_said(tmp_path, hub, caplog):
    hub.error = ConnectionError("no route")
    trainer = tiny_trainer(tmp_path, push_to_hub=True, save_strategy="steps", save_steps=4)
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        trainer.train()
    assert "push_to_hub: checkpoint-4 was not pushed: no route" in caplog.text
    assert trainer.state.global_step == 4


def test_an_adapters_card(tmp_path, hub):
    peft = pytest.importorskip("peft")
    trainer = tiny_trainer(
        tmp_path / "mine", peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), hub_model_id="me/student"
    )
    trainer.card_facts = CardFacts("owner/small")
    trainer.train()
    trainer.push_to_hub()
    (upload,) = hub.uploads
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= upload.files
    assert upload.options["delete_patterns"] is None
    found = metadata(upload.card)
    assert (found["library_name"], found["base_model"], found["base_model_relation"]) == ("peft", "owner/small", "adapter")
    assert "pip install peft" in upload.card


def test_distill_pushes_the_student_with_card_and_report(place, hub, capsys):  # noqa: F811
    options = ["training.push_to_hub=true", "training.hub_model_id=me/student", "training.hub_strategy=end", "store={path: out/cache}"]
    options += ["training.hub_token=secret", "plan={preset: curriculum, buckets: 2}"]
    assert main(["distill", "run.yaml", f"data.train={place / 'train.jsonl'}", *options]) == 0
    (upload,) = hub.uploads
    assert upload.files == STUDENT | {"metrics.jsonl", "report.html"}
    assert upload.card == Path("out/README.md").read_text()
    assert upload.options["token"] == "secret"
    assert Path("out/difficulty.parquet").exists()
    assert "secret" not in Path("out/plan.json").read_text()
    for text in (upload.card, Path("out/report.html").read_text()):
        assert str(place) not in text
        assert "secret" not in text
        assert "train.jsonl" in text
    assert re.search(r"- student: teacher, 3 of its layers, [\d,]+ parameters\n- teacher: teacher\n", upload.card)
    assert "base_model" not in metadata(upload.card)  # a path here
    assert "| 1 curriculum 1/2 |" in upload.card


def test_distill_pushes_a_merged_student(place, hub):  # noqa: F811
    pytest.importorskip("peft")
    options = ["student={model: teacher, lora: {r: 2}}", "training.push_to_hub=true"]
    assert main(["distill", "run.yaml", *options, "training.hub_model_id=me/student"]) == 0
    *during, last = hub.uploads
    assert all("adapter_model.safetensors" in upload.files for upload in during)
    assert last.files >= STUDENT
    assert not [name for name in last.files if "adapter" in name]
    assert last.options["delete_patterns"] == ["adapter_config.json", "adapter_model.*"]
    assert metadata(last.card)["library_name"] == "transformers"
    assert Path("out/adapter/adapter_config.json").exists()


def test_a_push_that_fails_is_one_line_and_the_student_is_there(place, hub, monkeypatch, capsys):  # noqa: F811
    def fail(api, **options):
        raise RuntimeError("no route to the hub")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(SystemExit):
        main(["distill", "run.yaml", "training.push_to_hub=true", "training.hub_strategy=end"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "fastkd: run.yaml: training.push_to_hub: RuntimeError: no route to the hub"
    assert Path("out/model.safetensors").exists()
