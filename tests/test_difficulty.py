"""Difficulty scores: what each signal is, keyed by id, resumed to the byte, refused when made from something else."""

import itertools
import json
import os
import signal as signals
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from fastkd import difficulty
from fastkd.data import load_rows, tokenize
from fastkd.difficulty import ScoreError, attach, compare, easy_to_hard, facts, format_comparison, read_scores, score
from fastkd.generation import generate
from fastkd.models import fingerprint
from fastkd.quality import rouge_l, sample_losses

from .stories import load_stories
from .tiny import rows, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(36).eval()


@pytest.fixture(scope="module")
def raw():
    return rows(22, seed=3)


@pytest.fixture(scope="module")
def data(raw, tokenizer):
    return tokenize(raw, tokenizer, max_length=32)


def scored(raw, data, model=None, tokenizer=None, **options):
    """Scores as a list of dictionaries."""
    settings = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 8, "batch_size": 4, "progress": False, **options}
    return score(raw, data, **settings)


# Signals.


def test_loss_and_rouge_are_what_they_say(raw, data, model, tokenizer):
    table = scored(raw, data, model, tokenizer).to_pydict()
    assert table["id"] == data["sample_id"][:]
    losses = {loss.position: loss.mean for batch in sample_losses(model, tokenizer, data, batch_size=4) for loss in batch}
    assert table["loss"] == [losses[i] for i in range(len(data))]
    prompts = list(raw["prompt"])
    answers = sorted(a for batch in generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=4) for a in batch)
    assert table["rouge"] == [rouge_l(a.text, reference) for a, reference in zip(answers, raw["completion"], strict=True)]
    assert len(set(table["rouge"])) > 2
    assert table["length"] == [len(tokenizer(text)["input_ids"]) + 1 for text in raw["completion"]]  # and the end token


def test_fusion_is_written_out(raw, data, model, tokenizer):
    """POCL: 1/(60 + rank) of both signals, ranks from 1 for the easiest; here with each tie counted by hand."""
    table = scored(raw, data, model, tokenizer).to_pydict()

    def rank(values, i, better):
        ahead = sum(better(v, values[i]) for v in values)
        tied = sum(v == values[i] for v in values)
        return ahead + (1 + tied) / 2

    for i in range(len(data)):
        by_rouge = rank(table["rouge"], i, lambda a, b: a > b)
        by_loss = rank(table["loss"], i, lambda a, b: a < b)
        assert (table["rank_rouge"][i], table["rank_loss"][i]) == (by_rouge, by_loss)
        assert table["score"][i] == pytest.approx(1 / (60 + by_rouge) + 1 / (60 + by_loss), rel=1e-12)
    assert table["score"] == table["rouge_loss"]
    assert table["rank_rouge_loss"][int(np.argmax(table["score"]))] == 1


@pytest.mark.parametrize("name", ["loss", "length", "steps", "rouge"])
def test_a_higher_score_is_easier_whatever_the_signal(raw, data, model, tokenizer, name):
    table = scored(raw, data, model, tokenizer, signal=name)
    values = dict(zip(table["id"].to_pylist(), table[name].to_pylist(), strict=True))
    order = [values[i] for i in easy_to_hard(table)]
    assert order == sorted(values.values(), reverse=name == "rouge")
    ranks = np.asarray(table[f"rank_{name}"])
    assert ranks.sum() == len(data) * (len(data) + 1) / 2
    assert np.all(np.argsort(-np.asarray(table["score"]), kind="stable") == np.argsort(ranks, kind="stable"))


def test_ties_stand_in_the_order_of_the_data(tokenizer):
    raw = Dataset.from_list([{"id": i, "prompt": "a", "completion": "cat " * n} for i, n in (("z", 2), ("b", 1), ("a", 2), ("y", 1))])
    table = scored(raw, tokenize(raw, tokenizer, max_length=32), signal="length")
    assert easy_to_hard(table) == ["b", "y", "z", "a"]
    assert table["rank_length"].to_pylist() == [3.5, 1.5, 3.5, 1.5]


def test_cheap_signals_need_no_model(raw, data, tokenizer):
    table = scored(raw, data, signal="length", also=("steps",))
    assert table.column_names == ["id", "length", "steps", "rank_length", "rank_steps", "score"]
    assert facts(table)["scorer"] is None
    with pytest.raises(ScoreError, match="signal 'rouge': needs a scorer; expected model and tokenizer, got None"):
        scored(raw, data, signal="rouge")


@pytest.mark.parametrize(
    ("completion", "steps"),
    [
        ("She sold 24.\nIn all 72.\n#### 72", 2),
        ("She sold 24.\n\n  \nIn all 72.\n---\n#### 72", 2),  # blank and ruled lines hold no step
        ("It is 5. #### 5", 1),
        ("#### 5", 0),
        ("One line. And another sentence.", 1),
    ],
)
def test_steps_are_lines_before_the_answer(tokenizer, completion, steps):
    raw = Dataset.from_list([{"prompt": "a", "completion": completion}])
    assert scored(raw, tokenize(raw, tokenizer, max_length=None), signal="steps")["steps"].to_pylist() == [steps]


def test_each_answer_of_a_conversation_has_its_own_end(tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    turns = [("user", "a"), ("assistant", "one\ntwo\n#### 2"), ("user", "b"), ("assistant", "three\nfour\nfive\n#### 5")]
    raw = Dataset.from_list([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant {% endif %}"
    assert scored(raw, tokenize(raw, tokenizer, max_length=None), signal="steps")["steps"].to_pylist() == [5]


def test_a_first_label_does_not_count(model, tokenizer):
    """Nothing predicts it: not in the length, and the prompt does not end before it."""
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    rows_ = {"input_ids": ids, "labels": [[5, -100, -100, 8], [9, -100, 11]], "sample_index": [0, 1], "sample_id": ["a", "b"]}
    data = Dataset.from_dict(rows_)
    table = scored(data, data, model, tokenizer, also=("length",)).to_pydict()
    assert table["length"] == [1, 1]
    expected = sorted(a for batch in generate(model, tokenizer, [[5, 6, 7], [9, 10]], max_new_tokens=8, batch_size=4) for a in batch)
    assert table["rouge"] == [rouge_l(a.text, tokenizer.decode([i, j])) for a, (i, j) in zip(expected, ((5, 8), (9, 11)), strict=True)]
    nothing = Dataset.from_dict({**rows_, "labels": [[5, -100, -100, -100], [9, -100, 11]]})
    with pytest.raises(ScoreError, match="signal 'loss': not a finite number in a: nan"):
        scored(nothing, nothing, model, tokenizer, signal="loss")


def test_steps_of_conversations_and_text(tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    turns = [{"role": r, "content": c} for r, c in (("user", "one\ntwo"), ("assistant", "a\nb"), ("user", "c"), ("assistant", "d"))]
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant {% endif %}"
    raw = Dataset.from_list([{"messages": turns}])
    assert scored(raw, tokenize(raw, tokenizer, max_length=None), signal="steps")["steps"].to_pylist() == [3]
    raw = Dataset.from_list([{"text": "one\ntwo\nthree"}])
    assert scored(raw, tokenize(raw, tokenizer, max_length=None), signal="steps")["steps"].to_pylist() == [3]


def test_steps_of_gsm8k(shared_data, tokenizer):
    raw = load_rows(shared_data("gsm8k/train.jsonl"), columns={"prompt": "question", "completion": "answer"}).select(range(200))
    table = scored(raw, tokenize(raw, tokenizer, max_length=None), signal="steps")
    expected = [len([line for line in text.split("\n") if line and "####" not in line]) for text in raw["completion"]]
    assert table["steps"].to_pylist() == expected
    assert 2 <= np.mean(expected) <= 5


def test_a_users_own_column(tokenizer):
    raw = Dataset.from_list([{"id": i, "prompt": "a", "completion": "cat", "level": level} for i, level in (("x", 3), ("y", 1), ("z", 2))])
    data = tokenize(raw, tokenizer, max_length=32)
    assert easy_to_hard(scored(raw, data, signal="column:level")) == ["y", "z", "x"]
    assert easy_to_hard(scored(raw, data, signal="column:level", higher_is_easier=True)) == ["x", "z", "y"]
    table = scored(raw, data, signal="column:level", also=("length",))
    assert table.column_names == ["id", "column:level", "length", "rank_column:level", "rank_length", "score"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["easy", "hard"], "signal 'column:level': expected a number in every row, got str 'easy' in row 0"),
        ([1.0, None], "got NoneType None in row 1"),
        ([True, False], "got bool True in row 0"),
        ([1.0, float("nan")], "not a finite number in row 1: nan"),
    ],
)
def test_a_column_of_other_values_is_refused(tokenizer, values, message):
    raw = Dataset.from_list([{"prompt": "a", "completion": "cat", "level": value} for value in values])
    with pytest.raises(ScoreError, match=message):
        scored(raw, tokenize(raw, tokenizer, max_length=32), signal="column:level")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("perplexity", "signal: expected one of rouge_loss, loss, rouge, length, steps, column:NAME, got 'perplexity'"),
        ("column:", "got 'column:'"),
        ("column:nope", "no such column; the rows have id, prompt, completion"),
    ],
)
def test_an_unknown_signal_is_refused(raw, data, name, message):
    with pytest.raises(ScoreError, match=message):
        scored(raw, data, signal=name)


def test_rouge_needs_a_prompt(model, tokenizer):
    raw = Dataset.from_list([{"text": "one two three"}])
    with pytest.raises(ScoreError, match="the rows have no prompt to answer"):
        scored(raw, tokenize(raw, tokenizer, max_length=32), model, tokenizer, signal="rouge")


def test_a_loss_that_is_not_finite_is_named(raw, data, tokenizer):
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ScoreError, match=r"signal 'loss': not a finite number in s\d+, .*: nan"):
        scored(raw, data, model, tokenizer, signal="loss")


def test_real_weights_find_shuffled_stories_harder(shared_data, tokenizer):
    model = load_stories(shared_data("stories260K") / "stories260K.bin")
    torch.manual_seed(0)
    with torch.no_grad():
        stories = model.generate(torch.full((6, 1), 1), attention_mask=torch.ones(6, 1), max_new_tokens=50, do_sample=True, top_k=20)
    shuffled = stories[:, torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(stories.shape[1] - 1)])]
    raw = Dataset.from_dict(
        {"input_ids": stories.tolist() + shuffled.tolist(), "id": [f"{k}{i}" for k in ("told", "mixed") for i in range(6)]}
    )
    table = scored(raw, tokenize(raw, None, max_length=64), model, tokenizer, signal="loss", also=())
    assert all(i.startswith("told") for i in easy_to_hard(table)[:6])


# By id, never by position.


def test_scores_do_not_depend_on_where_a_sample_stands(raw, data, model, tokenizer):
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(0)).tolist()
    moved = raw.select(order)
    one, two = (
        {r["id"]: r for r in scored(rows_, tokenize(rows_, tokenizer, max_length=32), model, tokenizer).to_pylist()}
        for rows_ in (raw, moved)
    )
    for sample, row in one.items():
        for name, value in row.items():
            # Another batch, other last bits.
            expected = value if name == "id" else pytest.approx(value, rel=1e-5)
            assert two[sample][name] == expected, (sample, name)


def test_attach_goes_by_id(raw, data, model, tokenizer):
    table = scored(raw, data, model, tokenizer)
    wanted = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    moved = data.select([5, 3, 20, 0])
    got = attach(moved, table)
    assert got["score"][:] == [wanted[i] for i in moved["sample_id"]]
    assert got.features["score"].dtype == "float64"
    assert got.remove_columns("score")[2] == moved[2]
    assert attach(got, table)["score"][:] == got["score"][:]  # again: replaced


def test_attach_refuses_what_is_missing_or_doubled(raw, data, model, tokenizer):
    table = scored(raw, data, signal="length")
    with pytest.raises(ScoreError, match=r"scores: 2 of 22 samples have none: s0, s1; were they made from other data\?"):
        attach(data, table.slice(2))
    with pytest.raises(ScoreError, match="scores: ids must not repeat, got more than one s0"):
        attach(data, pa.concat_tables([table, table.slice(0, 1)]))
    with pytest.raises(ScoreError, match="sample ids must not repeat, got more than one s3"):
        attach(data.select([3, 4, 3]), table)


def test_ids_that_repeat_are_refused(tokenizer):
    raw = Dataset.from_list([{"id": "a", "prompt": "a", "completion": "cat"}] * 2)
    with pytest.raises(ScoreError, match="sample ids must not repeat, got more than one a"):
        scored(raw, tokenize(raw, tokenizer, max_length=32), signal="length")


# The file.


def test_the_file_has_columns_and_facts(raw, data, model, tokenizer, tmp_path):
    path = tmp_path / "sub" / "scores.parquet"
    table = scored(raw, data, model, tokenizer, path=path, scorer="tiny", stage_of=lambda ids: [4 * i // len(ids) for i in range(len(ids))])
    assert list(path.parent.iterdir()) == [path]
    assert table.column_names == [
        *("id", "rouge", "loss", "rouge_loss", "length", "steps"),
        *("rank_rouge", "rank_loss", "rank_rouge_loss", "rank_length", "rank_steps", "score", "stage"),
    ]
    read = read_scores(path)
    assert read.equals(table)
    assert facts(read) == facts(table)
    found = facts(read)
    assert found["signal"] == "rouge_loss"
    assert found["scorer"]["name"] == "tiny"
    assert len(found["scorer"]["weights"]) == len(found["data"]) == 64
    assert found["options"] == {"batch_size": 4, "max_new_tokens": 8, "temperature": 0.0}
    stages = dict(zip(read["id"].to_pylist(), read["stage"].to_pylist(), strict=True))
    assert [stages[i] for i in easy_to_hard(read)] == sorted(stages.values())


def count_runs(monkeypatch):
    runs = {"loss": 0, "rouge": 0}

    def counting(name, function):
        def inner(*args, **kwargs):
            for batch in function(*args, **kwargs):
                runs[name] += 1
                yield batch

        return inner

    monkeypatch.setattr(difficulty, "sample_losses", counting("loss", difficulty.sample_losses))
    monkeypatch.setattr(difficulty, "generate", counting("rouge", difficulty.generate))
    return runs


def test_a_matching_file_is_used_again(raw, data, model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "scores.parquet"
    table = scored(raw, data, model, tokenizer, path=path)
    content = path.read_bytes()
    runs = count_runs(monkeypatch)
    again = scored(raw, data, model, tokenizer, path=path, scorer="by another name", seed=9)  # greedy: the seed has no effect
    assert again.equals(table)
    assert path.read_bytes() == content
    assert runs == {"loss": 0, "rouge": 0}
    # The stage is the plan's, and may change without a new score.
    staged = scored(raw, data, model, tokenizer, path=path, stage_of=lambda ids: [1] * len(ids))
    assert runs == {"loss": 0, "rouge": 0}
    assert set(read_scores(path)["stage"].to_pylist()) == {1}
    assert staged.drop_columns("stage").equals(table)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"signal": "loss"}, 'signal is "rouge_loss" there and "loss" here'),
        ({"also": ()}, "signals is"),
        ({"batch_size": 5}, "options.batch_size is 4 there and 5 here"),
        ({"max_new_tokens": 9}, "options.max_new_tokens is 8 there and 9 here"),
        ({"temperature": 0.1}, "options."),
        ({"model": tiny_llama(37)}, "scorer.weights is"),
        ({"model": tiny_llama(36, rope_parameters={"rope_type": "default", "rope_theta": 100.0})}, "scorer.config is"),
        ({"data": "completion"}, "data is"),
        ({"data": "id"}, "data is"),
        ({"data": "order"}, "data is"),
    ],
)
def test_a_file_made_from_something_else_is_refused(raw, data, model, tokenizer, tmp_path, changed, field):
    path = tmp_path / "scores.parquet"
    scored(raw, data, model, tokenizer, path=path)
    content = path.read_bytes()
    changed = dict(changed)
    edit = changed.pop("data", None)
    if edit == "order":
        raw = raw.select([1, 0, *range(2, len(raw))])
    elif edit is not None:
        raw = raw.map(lambda row, i: {edit: "cat" if i == 7 else row[edit]}, with_indices=True)
    model = changed.pop("model", model)
    with pytest.raises(ScoreError, match=field) as error:
        scored(raw, tokenize(raw, tokenizer, max_length=32), model, tokenizer, path=path, **changed)
    assert str(path) in str(error.value)
    assert "choose another path, or delete the file" in str(error.value)
    assert path.read_bytes() == content


def test_one_weight_makes_another_scorer(model):
    other = tiny_llama(36)
    before = fingerprint(other)
    assert before == fingerprint(model)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    assert fingerprint(other)["weights"] != before["weights"]
    assert fingerprint(tiny_llama(36).bfloat16())["weights"] != before["weights"]


# Interrupted and resumed.


class Stop(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_run_goes_on_to_the_same_bytes(raw, data, model, tokenizer, tmp_path, monkeypatch, temperature):
    """Stopped after every batch in turn, and resumed once each: 6 batches of losses, 6 of answers."""
    options = {"temperature": temperature, "max_new_tokens": 5, "stage_of": lambda ids: [i // 6 for i in range(len(ids))]}
    whole = tmp_path / "whole.parquet"
    scored(raw, data, model, tokenizer, path=whole, **options)
    batches = 2 * -(-len(data) // 4)
    write = difficulty._Partial.add
    for stop in range(batches):
        path = tmp_path / f"{stop}.parquet"
        count = itertools.count()

        def stopping(self, *args, stop=stop, count=count):
            if next(count) == stop:
                raise Stop
            write(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(difficulty._Partial, "add", stopping)
            with pytest.raises(Stop):
                scored(raw, data, model, tokenizer, path=path, **options)
        assert not path.exists()
        with monkeypatch.context() as patch:
            runs = count_runs(patch)
            scored(raw, data, model, tokenizer, path=path, **options)
        assert sum(runs.values()) == batches - stop
        assert path.read_bytes() == whole.read_bytes()
        assert not (tmp_path / f"{stop}.parquet.partial.jsonl").exists()


def test_a_cut_line_costs_its_batch_alone(raw, data, model, tokenizer, tmp_path, monkeypatch):
    """The file cut at every byte of its last two lines, and at some of its first."""
    whole = tmp_path / "whole.parquet"
    scored(raw, data, model, tokenizer, path=whole)
    with monkeypatch.context() as patch:
        patch.setattr(difficulty, "_write", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            scored(raw, data, model, tokenizer, path=tmp_path / "a.parquet")
    partial = (tmp_path / "a.parquet.partial.jsonl").read_bytes()
    lines = partial.splitlines(keepends=True)
    assert len(lines) == 1 + 12
    cuts = [0, 1, len(lines[0]) - 1, len(lines[0]), len(lines[0]) + 5]
    cuts += range(len(partial) - len(lines[-1]) - len(lines[-2]), len(partial) + 1, 17)
    for cut in cuts:
        path = tmp_path / "b.parquet"
        beside = tmp_path / "b.parquet.partial.jsonl"
        beside.write_bytes(partial[:cut])
        with monkeypatch.context() as patch:
            runs = count_runs(patch)
            scored(raw, data, model, tokenizer, path=path)
        kept = max(0, len(partial[:cut].split(b"\n")) - 2)
        assert sum(runs.values()) == 12 - kept, cut
        assert path.read_bytes() == whole.read_bytes(), cut
        path.unlink()
    # Damage in the middle: what follows is computed again.
    beside.write_bytes(b"".join([*lines[:4], b"\0" * len(lines[4]), *lines[5:]]))
    scored(raw, data, model, tokenizer, path=path)
    assert path.read_bytes() == whole.read_bytes()


def test_partial_results_of_something_else_are_refused(raw, data, model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(difficulty, "_write", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            scored(raw, data, model, tokenizer, path=path)
    beside = tmp_path / "a.parquet.partial.jsonl"
    content = beside.read_bytes()
    with pytest.raises(
        ScoreError, match=r"a.parquet.partial.jsonl: made with other settings: options.max_new_tokens is 8 there and 7 here"
    ):
        scored(raw, data, model, tokenizer, path=path, max_new_tokens=7)
    assert beside.read_bytes() == content


KILLED = """
import sys, time
from pathlib import Path
from fastkd import difficulty
from fastkd.data import tokenize
from tests.tiny import rows, tiny_llama, tiny_tokenizer

add = difficulty._Partial.add
def slow(self, *args):
    add(self, *args)
    print("batch", flush=True)
    time.sleep(0.05)
if len(sys.argv) > 2:
    difficulty._Partial.add = slow
raw, tokenizer = rows(22, seed=3), tiny_tokenizer()
difficulty.score(raw, tokenize(raw, tokenizer, max_length=32), model=tiny_llama(36), tokenizer=tokenizer, path=sys.argv[1], batch_size=4,
                 max_new_tokens=8, progress=False)
"""


@pytest.mark.slow
def test_kill_9_and_go_on(raw, data, model, tokenizer, tmp_path):
    """A process killed twice in mid-run; one that is not killed ends the work, byte for byte."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.parquet")]
    for batches in (3, 5):  # in the losses, then in the answers
        process = subprocess.Popen([*command, "slow"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(batches):
            assert process.stdout.readline() == "batch\n"
        time.sleep(0.02)
        process.send_signal(signals.SIGKILL)
        process.communicate()
        assert process.returncode == -signals.SIGKILL
        assert not (tmp_path / "a.parquet").exists()
        assert (tmp_path / "a.parquet.partial.jsonl").stat().st_size > 0
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    subprocess.run([*command[:-1], str(tmp_path / "b.parquet")], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_a_failed_write_leaves_what_was_there(tmp_path, raw, data, model, tokenizer, monkeypatch):
    path = tmp_path / "a.parquet"
    scored(raw, data, model, tokenizer, path=path)
    content = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(difficulty.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        scored(raw, data, model, tokenizer, path=path, stage_of=lambda ids: [0] * len(ids))
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


# Reading.


def test_a_users_own_file_will_do(data, tmp_path):
    path = tmp_path / "own.parquet"
    pq.write_table(pa.table({"id": data["sample_id"][:], "score": list(range(len(data)))}), path)
    table = read_scores(path)
    assert facts(table) == {}
    assert attach(data, table)["score"][:] == [float(i) for i in range(len(data))]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "b", "a"], "score": [1.0, 2.0, 3.0]}, "ids must not repeat, got more than one a"),
        ({"id": ["a"], "value": [1.0]}, "no column 'score'; it has id, value"),
        ({"id": ["a", "b"], "score": [1.0, float("nan")]}, "score: expected a finite number, got nan for b"),
        ({"id": ["a", "b"], "score": [1.0, None]}, "got None for b"),
        ({"id": ["a"], "score": ["high"]}, "got 'high' for a"),
    ],
)
def test_unusable_files_are_refused(tmp_path, columns, message):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ScoreError, match=message) as error:
        read_scores(path)
    assert str(error.value).startswith(str(path))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ScoreError, match="no such file"):
        read_scores(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ScoreError, match="not a readable Parquet file"):
        read_scores(tmp_path / "broken.parquet")


# Agreement.


def order_table(signals, ids=None):
    n = len(next(iter(signals.values())))
    columns = {"id": ids or [f"s{i}" for i in range(n)]}
    for name, easiness in signals.items():
        columns[name] = list(map(float, easiness))
        columns[f"rank_{name}"] = [1.0 + sum(e > x for e in easiness) + (sum(e == x for e in easiness) - 1) / 2 for x in easiness]
    columns["score"] = list(map(float, next(iter(signals.values()))))
    return pa.table(columns)


def test_same_opposite_and_unrelated_orders():
    n = 400
    generator = np.random.default_rng(0)
    base = np.arange(n)
    pairs = compare({"x": order_table({"loss": base, "rouge": base * 2 + 1, "length": -base, "steps": generator.permutation(n)})})
    found = {(p["a"], p["b"]): p for p in pairs}
    assert len(found) == 6
    same, opposite, unrelated = found["loss", "rouge"], found["loss", "length"], found["loss", "steps"]
    assert (same["spearman"], same["kendall"], same["hardest_quarter"]) == (pytest.approx(1), pytest.approx(1), 1.0)
    assert (opposite["spearman"], opposite["kendall"], opposite["hardest_quarter"]) == (pytest.approx(-1), pytest.approx(-1), 0.0)
    assert abs(unrelated["spearman"]) < 0.15
    assert abs(unrelated["hardest_quarter"] - 0.25) < 0.12
    assert all(p["samples"] == n for p in pairs)


def test_agreement_by_hand():
    # One swap of neighbours in four: 5 of 6 pairs agree, sum of squared rank differences 2.
    (pair,) = compare({"x": order_table({"loss": [4, 3, 2, 1], "rouge": [4, 3, 1, 2]})})
    assert pair["kendall"] == pytest.approx((5 - 1) / 6)
    assert pair["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert pair["hardest_quarter"] == 0.0
    # With a tie, tau-b divides by sqrt(6 * 5): 5 pairs differ in both, all in the same direction.
    (pair,) = compare({"x": order_table({"loss": [4, 3, 2, 1], "rouge": [4, 3, 2, 2]})})
    assert pair["kendall"] == pytest.approx(5 / np.sqrt(30))


def test_a_signal_without_differences_has_no_agreement():
    (pair,) = compare({"x": order_table({"loss": [1, 2, 3, 4], "steps": [1, 1, 1, 1]})})
    assert (pair["spearman"], pair["kendall"], pair["hardest_quarter"]) == (None, None, None)
    assert "n/a" in format_comparison([pair])
    json.dumps(pair, allow_nan=False)


def test_files_are_compared_by_id(tmp_path, raw, data, model, tokenizer):
    scored(raw, data, model, tokenizer, path=tmp_path / "one.parquet")
    moved = raw.select(list(reversed(range(4, len(raw)))))
    scored(moved, tokenize(moved, tokenizer, max_length=32), model, tokenizer, path=tmp_path / "two.parquet", batch_size=1)
    pairs = compare([tmp_path / "one.parquet", tmp_path / "two.parquet"])
    assert [p["a"] for p in pairs] == ["one: score", "one: loss", "one: rouge"]  # the score is rouge_loss in both
    loss = next(p for p in pairs if p["a"] == "one: loss")
    assert (loss["samples"], loss["b"]) == (len(raw) - 4, "two: loss")
    # The same scorer on the same samples, read backwards.
    assert loss["spearman"] == pytest.approx(1)
    assert loss["hardest_quarter"] == 1.0
    other = tmp_path / "three.parquet"
    scored(raw, data, tiny_llama(7), tokenizer, path=other)
    assert compare([tmp_path / "one.parquet", other])[1]["spearman"] < 0.99
    text = format_comparison(compare([tmp_path / "one.parquet", tmp_path / "two.parquet", other]))
    assert text.count("loss / ") >= 3
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1


def test_what_cannot_be_compared(tmp_path, raw, data):
    scored(raw, data, signal="length", also=(), path=tmp_path / "a.parquet")
    scored(raw, data, signal="length", also=(), path=tmp_path / "b.parquet")
    with pytest.raises(ScoreError, match="expected one or more score files, got none"):
        compare([])
    with pytest.raises(ScoreError, match="one file is compared between its signals, and it has 1; give a second file"):
        compare([tmp_path / "a.parquet"])
    with pytest.raises(ScoreError, match="expected different files"):
        compare([tmp_path / "a.parquet", tmp_path / "a.parquet"])
    with pytest.raises(ScoreError, match="x and y share 0 sample ids"):
        compare({"x": order_table({"loss": [1, 2]}), "y": order_table({"loss": [1, 2]}, ids=["p", "q"])})
    (pair,) = compare([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert pair["spearman"] == pytest.approx(1)
