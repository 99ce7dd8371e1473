"""The report: one file that opens offline, whatever a run has logged."""

import json
import logging
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastkd import run
from fastkd.cli import main
from fastkd.config import load_config
from fastkd.report import format_metric, read_metrics, recorded_warnings, stage_title, write_report

from .test_cli import place  # noqa: F401

STAGE = {"stage": 0, "name": "kd", "samples": 8, "epochs": 1.0, "first_step": 0, "steps": 2, "tokens": 12345, "teacher": "big",
    "temperature": [1.0, 2.0], "kd_ratio": 0.5, "restart_lr": False, "reset_optimizer": False}  # fmt: skip


class Page(HTMLParser):
    """What a page loads, and whether its tags are balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "link", "img", "iframe", "object"):
            self.loads.append(tag)
        self.loads += [
            f"{tag} {name}={value}" for name, value in attributes if name == "src" or (name.endswith("href") and value[0] != "#")
        ]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(folder: Path, rows: list[dict], stages: list[dict] | None = None, **options) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if stages is not None:
        (folder / "plan.json").write_text(json.dumps({"stages": stages}))
    text = write_report(folder, "a <run>", {"student": "x & y", "nothing": None}, **options).read_text()
    found = Page(text)
    assert not found.loads
    assert not re.search(r"url\((?!#)|@import", text)
    assert "<h1>a &lt;run&gt;</h1>" in text
    assert "<td>x &amp; y</td>" in text
    assert "nothing" not in text
    return text


def training(step: int, **more) -> dict:
    return {"step": step, "stage": 0, "teacher": "big", "loss": 1.0 / step, "kd": 0.5, "ce": None, "tokens": 100 * step, "lr": 1e-5, **more}


def test_nothing_logged_yet(tmp_path):
    text = report(tmp_path, [])
    assert "No step was logged." in text
    assert "No evaluation rows were given." in text


def test_one_step_without_evaluation_and_without_a_teacher(tmp_path):
    row = {**training(2), "teacher": None, "kd": None, "ce": 2.0}
    text = report(tmp_path, [row], [{**STAGE, "teacher": None}], status="Stopped after step 2 of 9: it was enough")
    assert text.count("<svg") == 3  # loss, cross-entropy, learning rate
    assert "Stopped after step 2 of 9: it was enough" in text
    assert "<th>teacher</th>" not in text
    assert "100 * " not in text


def test_many_stages_and_what_the_rows_say_of_the_run(tmp_path):
    stages = [{**STAGE, "stage": i, "name": f"stage {i}", "first_step": 2 * i, "restart_lr": i > 0} for i in range(12)]
    more = {"tokens_per_second": 1234.5, "useful_tokens": 0.75, "memory_gb": 71.304}
    rows = [training(i, **more) for i in range(1, 25)] + [{"step": 24, "train_runtime": 3725.0}]
    text = report(tmp_path, rows, stages, warned=["one <warning>"])
    assert "<td>12</td>" in text
    assert "stage 11" not in text  # a name that numbers from 0 beside numbers from 1
    assert "1 to 2" in text
    assert "<th>begins anew</th>" in text
    assert "<li>one &lt;warning&gt;</li>" in text
    for figure in ("1:02:05", "2,400 (those that count", "1,234 tokens/s", "75% (the rest", "71.30 GB"):
        assert figure in text, figure


def test_the_first_evaluation_against_the_last(tmp_path):
    evals = [{"step": s, "eval_ce": 2.0 - s / 10, "eval_kl": 0.5 - s / 100, "eval_agreement": 0.5 + s / 100} for s in (0, 5, 10)]
    text = report(tmp_path, [training(5), *evals], [STAGE])
    assert "<td>KL to the teacher, nats per token</td><td>0.500</td><td>0.400</td><td>-20.0%</td>" in text
    assert "<td>same first choice as the teacher</td><td>50.0%</td><td>60.0%</td><td>+10.0 points</td>" in text
    assert "All 3 evaluations" in text


@pytest.mark.parametrize(
    ("column", "value", "text"), [("eval_kl", 0.00012345, "0.000123"), ("eval_perplexity", 1234.5678, "1,234.568"), ("eval_ce", None, "-"),
    ("eval_agreement", 0.8765, "87.6%")],
)  # fmt: skip
def test_figures(column, value, text):
    assert format_metric(column, value) == text


def test_stage_titles():
    assert stage_title({"stage": 1, "name": "pocl 2/4"}) == "2 pocl 2/4"
    assert stage_title({"stage": 1, "name": "stage 1"}) == "2"
    assert stage_title({"stage": 1}) == "2"


def test_warnings_are_recorded_once_and_still_shown():
    shown = []
    handler = logging.Handler()
    handler.emit = shown.append  # type: ignore[method-assign]
    logging.getLogger("fastkd").addHandler(handler)
    try:
        with warnings.catch_warnings(), recorded_warnings() as found:
            warnings.simplefilter("always")
            for _ in range(2):
                logging.getLogger("fastkd.trainer").warning("rows are\ncut")
            logging.getLogger("fastkd").info("no warning")
            warnings.warn("from python", stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.getLogger("fastkd").warning("later")
    finally:
        logging.getLogger("fastkd").removeHandler(handler)
    assert found == ["rows are cut", "from python"]
    assert len(shown) == 3


def test_an_interrupted_run_is_one_line_and_leaves_a_report(place, monkeypatch, capsys):  # noqa: F811
    step = run.KDTrainer.training_step

    def broken(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(run.KDTrainer, "training_step", broken)
    assert main(["distill", "run.yaml", "data.columns={prompt: prompt}"]) == 130
    error = capsys.readouterr().err
    assert error.endswith("\nfastkd: interrupted; to go on: fastkd distill run.yaml 'data.columns={prompt: prompt}' --resume\n")
    assert "Traceback" not in error
    text = Path("out/report.html").read_text()
    assert "Stopped after step 4 of 6: interrupted" in text
    assert "<svg" in text
    assert not Path("out/README.md").exists()


def test_a_long_run_has_a_report_meanwhile(place, monkeypatch, capsys):  # noqa: F811
    seen = []

    def write(folder, title, facts, **options):
        seen.append(options["status"])
        return write_report(folder, title, facts, **options)

    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr(run, "write_report", write)
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    run.distill(load_config("run.yaml", ["training.eval_strategy=steps", "training.eval_steps=6"]))
    assert seen == ["Under way: step 4 of 6.", "Finished."]
    before, after = re.findall(r"^(?:before|after), on .* cross-entropy ([\d.]+) nats$", capsys.readouterr().out, re.MULTILINE)
    assert before != after
    (row,) = (row for row in read_metrics("out") if row["step"] == 6 and "eval_ce" in row)  # evaluated once
    assert after == f"{row['eval_ce']:.3f}"


def test_paths_in_the_command_are_shortened():
    assert run._shortened("data.train=/home/me/secret/rows.jsonl") == "data.train=rows.jsonl"
    assert run._shortened("teachers={a: /home/me/a, b: ~/models/b}") == "teachers={a: a, b: b}"
    assert run._shortened("training.hub_token=hf_secret") == "training.hub_token=..."
    assert run._shortened("training={hub_token: hf_secret, seed: 1}") == "training={hub_token: ..., seed: 1}"
    assert run._shortened("student=owner/model") == "student=owner/model"
    assert run._shortened("runs/mine.yaml") == "runs/mine.yaml"
