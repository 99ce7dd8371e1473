"""Every row of the table: status 2, one line that says file, key and remedy, no model loaded, no file changed."""

import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from datasets import disable_progress_bars, enable_progress_bars

from fastkd import cli

from ..tiny import rows, tiny_llama, tiny_tokenizer
from .table import TABLE, Row

RUN = """
student: {from: teacher, layers: [0, 2, 3]}
teacher: teacher
data: {train: train.jsonl, eval: eval.jsonl, max_length: 16}
loss: {temperature: 2}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 3e-3, logging_steps: 1, save_steps: 2, use_cpu: true,
  disable_tqdm: true}
output_dir: out
"""


class Loaded(BaseException):
    """Not an Exception, so that nothing turns it into a line."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("bad"), Path.cwd()
    os.chdir(folder)
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    try:
        save("teacher", tiny_llama(2, hidden=24, layers=4))
        save("second", tiny_llama(3, hidden=24, layers=4))
        save("other", tiny_llama(2, hidden=24, layers=4))
        file = Path("other/tokenizer.json")
        file.write_text(file.read_text().replace('"cat"', '"kat"'))
        short = transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
        save("short", transformers.GPT2LMHeadModel(short))
        for name, n, seed in (("train", 16, 0), ("eval", 6, 1), ("few", 4, 2)):
            Path(f"{name}.jsonl").write_text("".join(json.dumps({**row, "id": f"{name}{i}"}) + "\n" for i, row in enumerate(rows(n, seed))))
        Path("run.yaml").write_text(RUN)
        assert cli.main(["distill", "run.yaml", "output_dir=begun", "store={path: store}", "loss.temperature=2"]) == 0
        assert (
            cli.main(["score", "run.yaml", "data.train=few.jsonl", "difficulty={signal: length, path: scores.parquet}", "output_dir=s"])
            == 0
        )
        yield folder
    finally:
        enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()
        os.chdir(before)


def save(folder: str, model: transformers.PreTrainedModel) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def contents(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "a folder"
        for file in folder.rglob("*")
    }


def test_names_are_different():
    assert len({row.name for row in TABLE}) == len(TABLE) >= 60


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name.replace(" ", "-"))
def test_a_bad_input_is_one_line(row: Row, place, tmp_path, monkeypatch, capsys):
    def loaded(*args, **kwargs):
        raise Loaded

    if row.lacks and find_spec(row.lacks):
        pytest.skip(f"{row.lacks} is installed")
    if not row.loads:
        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", loaded)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where a GGUF file's copy would go
    there = set(place.iterdir())
    for name, content in row.files.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if row.make is not None:
        row.make(place)
    before = contents(place)
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(row.words))
        after = contents(place)
    finally:
        for path in place.iterdir():
            if path not in there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, error = capsys.readouterr()
    assert stopped.value.code == 2
    if row.loads:
        after.pop("out")  # an empty folder, which the Trainer makes
    assert after == before
    (line,) = error.splitlines()
    start = ": ".join(filter(None, ("fastkd", row.file, row.key if row.file.endswith(".yaml") else "")))
    assert line.startswith(f"{start}: "), line
    assert row.key in line, line
    assert row.remedy in line[len(start) :], line
