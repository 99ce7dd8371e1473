"""Kills, damage, full disks, and what may change between two starts of a run: the same end, or one line that says why not."""

import contextlib
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastkd.cli import main
from fastkd.trainer import KDTrainer

from . import faults
from .test_cli import fails

# Into the second stage, and past the checkpoint after 9 steps.
SHORT = "training.max_steps=10"
RUN = ("distill", "run.yaml", SHORT, "output_dir=cut")
RESUME = (*RUN, "--resume")


def cut_off(folder: Path, *words: str) -> None:
    """Begin a run that ends after 9 steps without a word."""
    real = KDTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 9:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(KDTrainer, "training_step", step)
        with contextlib.redirect_stderr(io.StringIO()):
            assert main(list(words)) == 130  # interrupted


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a whole run, and with one that was cut off after its checkpoint of 9 steps; `place` has copies of it."""
    folder = tmp_path_factory.mktemp("runs")
    faults.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["distill", "run.yaml", SHORT]) == 0
    cut_off(folder, *RUN)
    assert sorted(path.name for path in Path(folder, "cut").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    return folder


@pytest.fixture
def place(runs, tmp_path, monkeypatch) -> Path:
    """The current directory: models, data, a configuration, ``whole`` and ``cut``."""
    folder = tmp_path / "place"
    shutil.copytree(runs, folder)
    monkeypatch.chdir(folder)
    return folder


def ends_equal(output: str = "cut") -> None:
    assert faults.differences(Path("whole"), Path(output)) == []


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Kills.


@pytest.mark.parametrize(
    "kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(50, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])]
)
def test_killed_again_and_again(kills):
    done = subprocess.run([sys.executable, "-m", "tests.faults", "--kills", str(kills)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "equal to those of the run that was not killed" in done.stdout


def test_the_comparison_sees_what_differs(place):
    shutil.copytree("whole", "same")
    ends_equal("same")
    flip(Path("same/model.safetensors"))
    flip(min(Path("same/store/weak/train").glob("batch*")))
    Path("same/difficulty.parquet").unlink()
    Path("same/.incomplete").mkdir()
    lines = Path("same/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("same/metrics.jsonl").write_text("".join([*lines[:2], lines[2].replace('"loss": ', '"loss": 1'), *lines[3:-2]]))
    found = faults.differences(Path("whole"), Path("same"))
    assert [line.partition(": ")[2][:16] for line in found] == [
        "only in same", "only in whole", "differs", "differs", "8 and 7 rows", "{'step': 4, 'sta",
    ], found  # fmt: skip


# Damage.


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (truncate, "optimizer.pt"),
        (flip, "model.safetensors"),
        (Path.unlink, "rng_state.pth"),
        (flip, "0-kd_state.json"),
        (truncate, "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(place, caplog, damage, name):
    damage(Path("cut/checkpoint-9", name))
    assert main(list(RESUME)) == 0
    assert f"not resuming from checkpoint-9: cut/checkpoint-9/{name}" in caplog.text
    ends_equal()


def test_without_a_sound_checkpoint_it_begins_again(place, caplog):
    truncate(Path("cut/checkpoint-6/scheduler.pt"))
    Path("cut/checkpoint-9/scheduler.pt").unlink()
    assert main(list(RESUME)) == 0
    for text in (
        "checkpoint-6/scheduler.pt: ",
        "checkpoint-9/scheduler.pt: missing",
        "no complete checkpoint in cut: starting from the beginning",
    ):
        assert text in caplog.text
    ends_equal()


@pytest.mark.parametrize(
    ("damage", "files", "message"),
    [
        (flip, "middle/train/batch-*", "damaged (its checksum differs); it will be computed again"),
        (truncate, "middle/train/batch-*", "it will be computed again"),
        (Path.unlink, "middle/train/batch-*", None),
        (truncate, "weak/train/manifest.json", "damaged (it is not readable); it is written again"),
        (lambda path: flip(path, 200), "weak/train/manifest.json", "it is written again"),
        (Path.unlink, "weak/train/manifest.json", None),
        (flip, "middle/head.safetensors", "the head will be taken from the teacher"),
    ],
)
def test_a_damaged_store_is_named_and_computed_again(place, caplog, damage, files, message):
    shutil.rmtree("cut/checkpoint-9")  # so that the rest of the run reads all that is there
    damaged = sorted(Path("cut/store").glob(files))
    assert damaged
    for path in damaged:
        damage(path)
    assert main(list(RESUME)) == 0
    said = [record.getMessage() for record in caplog.records]
    if message is not None:
        assert all(any(str(path) in line and message in line for line in said) for path in damaged), said
    ends_equal()


def test_what_a_kill_left_after_the_last_checkpoint_is_cleared_away(place):
    shutil.copytree("whole", "again")
    Path("again/.incomplete/checkpoint-10-old").mkdir(parents=True)
    assert main(["distill", "run.yaml", SHORT, "output_dir=again", "--resume"]) == 0
    ends_equal("again")


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_without_the_plans_file_the_settings_are_not_known(place, capsys, damage):
    damage(Path("cut/plan.json"))
    assert "output_dir: cut holds " in fails(capsys, *RESUME)


# Full disks.


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """``limit(n)``: no file may have more bytes than that, which a program sees as it sees a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SmallDisk:
    def __init__(self, path: Path):
        self.path = path

    def grow(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", self.path], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize(
    ("too_large", "named"),
    [
        ("optimizer.pt", "cut/checkpoint-10: the file cannot be written; is the disk full, or"),
        ("model.safetensors", "cut/checkpoint-10: the disk is full, or a limit on files or quota reached (File too large)"),
    ],
)
def test_no_room_for_a_checkpoint(place, capsys, limit, too_large, named):
    before = {path: path.read_bytes() for path in Path("cut").glob("checkpoint-*/*")}
    limit(Path("cut/checkpoint-9", too_large).stat().st_size - 200)
    line = fails(capsys, *RESUME)
    assert named in line
    assert "make room and resume" in line
    assert {path: path.read_bytes() for path in Path("cut").glob("checkpoint-*/*")} == before
    assert not Path("cut/.incomplete").exists()
    limit(resource.RLIM_INFINITY)
    assert main(list(RESUME)) == 0
    ends_equal()


@pytest.mark.slow
def test_a_small_disk_that_grows(place, capsys, small_disk):
    """Full at whatever comes next, each time with one line; nothing is lost."""
    words = ["distill", "run.yaml", SHORT, f"output_dir={small_disk.path}/run"]
    lines: list[str] = []
    for kilobytes in range(20, 2000, 40):
        small_disk.grow(kilobytes)
        status = None
        with contextlib.suppress(SystemExit):
            status = main([*words, *(["--resume"] if lines else [])])
        if status == 0:
            break
        found = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in found), found
        lines += [line for line in found if line.startswith("fastkd: ")]
    assert len(lines) > 5
    assert all("disk" in line for line in lines), lines
    for what in ("checkpoint-", "store: ", "output_dir: "):
        assert any(what in line for line in lines), (what, lines)
    assert faults.differences(Path("whole"), small_disk.path / "run") == []


@pytest.mark.slow
def test_no_room_for_a_shard(place, capsys, limit):
    # All rows in one shard, which is larger than all that is written before it.
    words = ("distill", "run.yaml", SHORT, "store.batch_size=32", "difficulty.path=cut/difficulty.parquet")
    assert main([*words, "output_dir=large"]) == 0
    limit(Path("large/store/weak/train/batch-0000000.safetensors").stat().st_size - 200)
    line = fails(capsys, *words, "output_dir=new")
    assert "new/store/weak/train/batch-0000000.safetensors: the disk is full, or a limit" in line
    assert "make room" in line
    assert not list(Path("new/store").rglob(".*"))
    limit(resource.RLIM_INFINITY)
    assert main([*words, "output_dir=new", "--resume"]) == 0
    assert faults.differences(Path("large"), Path("new")) == []


# Changes between two starts.


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("plan.fractions=[0.2, 0.4, 0.4]", "plan.fractions"),
        ("seed=1", "seed was 0, now it is 1"),
        ("training.learning_rate=1e-3", "learning_rate was 0.003, now it is 0.001"),
        ("loss.divergence=reverse_kl", "loss.divergence was 'forward_kl', now it is 'reverse_kl'"),
    ],
)
def test_another_configuration_is_refused(place, capsys, change, expected):
    line = fails(capsys, *RESUME, change)
    assert "output_dir: cut holds another run" in line
    assert expected in line
    assert main(list(RESUME)) == 0
    ends_equal()


def test_a_batch_may_be_split_otherwise_but_not_be_another(place, capsys):
    line = fails(capsys, *RESUME, "training.per_device_train_batch_size=4")
    assert "cut/checkpoint-9 is of another run: batch_size was 4, now it is 8" in line
    assert main([*RESUME, "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"]) == 0


def overwrite(name: str) -> None:
    """Other weights under a model's old name."""
    model = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
    model.save_pretrained(name)


def test_another_teacher_under_the_store_is_refused(place, capsys):
    overwrite("weak")
    expected = "weak/train: this store was filled with other settings: teacher.weights is"
    assert expected in fails(capsys, *RESUME)
    assert expected in fails(capsys, "distill", "run.yaml", SHORT, "output_dir=new", "store.path=cut/store")


def test_another_teacher_is_refused_without_a_store(place, capsys):
    without = ("distill", "run.yaml", SHORT, "output_dir=new", "store=null", "difficulty.path=cut/difficulty.parquet", "data.eval=null")
    without = (*without, "training.eval_strategy=no")
    cut_off(place, *without)
    overwrite("weak")
    assert "new/checkpoint-9 is of another run: teachers.weak.weights was" in fails(capsys, *without, "--resume")


def test_another_student_is_refused(place, capsys):
    """Its weights come from the checkpoint, its rate of dropout does not."""
    config = json.loads(Path("student/config.json").read_text())
    Path("student/config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    assert "cut/difficulty.parquet: made with other settings: scorer.config is" in fails(capsys, *RESUME)
    Path("cut/difficulty.parquet").unlink()
    assert "is of another run: student.attention_dropout was 0.2, now it is 0.3" in fails(capsys, *RESUME)


def edit_rows(name: str, kind: str) -> None:
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    if kind == "edited":
        rows[4]["completion"] += " cat"
    elif kind == "removed":
        del rows[4]
    else:
        rows = [*rows[1:], rows[0]]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["edited", "removed", "reordered"])
def test_other_rows_are_refused(place, capsys, kind):
    edit_rows("train.jsonl", kind)
    assert re.search("difficulty: cut/difficulty.parquet: .*data is", fails(capsys, *RESUME))
    Path("cut/difficulty.parquet").unlink()
    assert "this store was filled with other settings: data." in fails(capsys, *RESUME)
    shutil.rmtree("cut/store")
    line = fails(capsys, *RESUME)
    assert "cut/checkpoint-9 is of another run: " in line
    assert ("samples was 23, now it is 22" if kind == "removed" else "data was") in line


@pytest.mark.parametrize("kind", ["edited", "removed", "reordered"])
def test_other_rows_to_evaluate_on_are_refused(place, capsys, kind):
    edit_rows("eval.jsonl", kind)
    assert "eval: this store was filled with other settings: data." in fails(capsys, *RESUME)
    shutil.rmtree("cut/store")
    assert "cut/checkpoint-9 is of another run: eval.eval was" in fails(capsys, *RESUME)


def exchange_words(*models: str) -> None:
    for name in models:
        path = Path(name, "tokenizer.json")
        tokenizer = json.loads(path.read_text())
        words = tokenizer["model"]["vocab"]
        words["cat"], words["dog"] = words["dog"], words["cat"]
        path.write_text(json.dumps(tokenizer))


def test_another_tokenizer_than_the_teachers_is_refused(place, capsys):
    exchange_words("student")
    assert "teachers.weak: the tokenizers differ" in fails(capsys, *RESUME)


def test_another_tokenizer_than_before_is_refused(place, capsys):
    exchange_words("student", "weak", "middle", "strong")
    assert re.search("difficulty: cut/difficulty.parquet: .*data is", fails(capsys, *RESUME))
    Path("cut/difficulty.parquet").unlink()
    assert "this store was filled with other settings: tokenizer is" in fails(capsys, *RESUME)
    shutil.rmtree("cut/store")
    assert "cut/checkpoint-9 is of another run: data was" in fails(capsys, *RESUME)


# Scores.


def test_scores_that_were_deleted_are_made_again(place):
    Path("cut/difficulty.parquet").unlink()
    assert main(list(RESUME)) == 0
    ends_equal()


def test_scores_that_were_edited_are_refused(place, capsys):
    table = pq.read_table("cut/difficulty.parquet")
    scores = table["score"].to_pylist()
    changed = table.set_column(table.column_names.index("score"), "score", pa.array([*scores[1:], scores[0]]))
    pq.write_table(changed, "cut/difficulty.parquet")
    assert "its scores are not those that were written" in fails(capsys, *RESUME)


def test_damaged_scores_are_refused(place, capsys):
    truncate(Path("cut/difficulty.parquet"))
    assert "difficulty.path: cut/difficulty.parquet: not a readable Parquet file" in fails(capsys, *RESUME)


def test_a_flipped_bit_in_the_scores_is_found(place, capsys):
    table = pq.read_table("cut/difficulty.parquet")
    place_of_score = pq.ParquetFile("cut/difficulty.parquet").metadata.row_group(0)
    index = place_of_score.to_dict()["columns"]
    column = next(c for c in index if c["path_in_schema"] == "score")
    flip(Path("cut/difficulty.parquet"), column["data_page_offset"] - 9)
    assert table["score"].to_pylist() != pq.read_table("cut/difficulty.parquet")["score"].to_pylist()
    for path in Path("cut").glob("checkpoint-*"):
        shutil.rmtree(path)
    assert "its scores are not those that were written" in fails(capsys, *RESUME)
