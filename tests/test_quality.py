"""ROUGE-L, final answers, perplexity, and the summary over seeds."""

import json
import math
import statistics
import sys
import types
from fractions import Fraction

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from fastkd.data import load_rows, tokenize
from fastkd.quality import (
    answers_match,
    completion_turns,
    evaluate,
    extract_answer,
    format_quality,
    lm_eval_suite,
    prompt_ids,
    rouge_l,
    sample_losses,
)

from .stories import load_stories
from .tiny import rows, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(1)


# Final answers.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = 24 clips.\n#### 72", 72),
        ("#### 1,234", 1234),
        ("#### $1,234.50", "1234.5"),
        ("####42", 42),
        ("#### -5", -5),
        ("#### \u22125", -5),
        ("#### -$3", -3),
        ("#### $-3", -3),
        ("#### 42 apples", 42),
        ("####\n7", 7),
        ("#### 8\nQuestion: what is 5 + 5?\n#### 10", 8),  # a base model that writes on
        ("The answer is 7.", 7),
        ("The answer is 7.5.", "7.5"),
        ("the ANSWER is: **$18**, as 9 * 2", 18),
        ("**Answer:** 1,000,000", 1000000),
        ("Final answer:\n12", 12),
        ("The answer is 5 + 3 = 8. Take 100 more.", 8),
        ("First the answer is 3. No: the answer is 4", 4),
        ("So it is \\boxed{18}.", 18),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("It costs 3 and 4, in total 7", 7),
        ("She has 7.", 7),
        ("She has 7!", 7),
        ("She pays $5.00", 5),
        ("It grew by 50%", 50),
        ("It grew by 50\\%", 50),
        ("1/2", "1/2"),
        ("0.5", "1/2"),
        (".5", "1/2"),
        ("a third, 2/6", "1/3"),
        ("10-5", 5),  # a range or a difference, not a negative number
        ("= -5", -5),
        ("x = (-5)", -5),
        ("<<48/2=24>>24", 24),
        ("3,4", 4),  # a list
        ("12,34", 34),
        ("version 1.2.3 has 6", 6),
        ("5km", 5),
        ("42.0", 42),
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("No, because 5 is odd.", "no"),
        ("#### Yes", "yes"),
        ("#### Paris, France.", "paris france"),
        ("The answer is no.", "no"),
        ("True", "true"),
        ("", None),
        ("####", None),
        ("I do not know.", None),
        ("COVID-x and B2 and v1.2.3", None),
        ("1/0", None),
        ("9" * 5000, None),  # Python refuses to read it
    ],
)
def test_final_answers(text, expected):
    found = extract_answer(text)
    if (isinstance(expected, str) and not expected[0].isalpha()) or isinstance(expected, int):
        expected = Fraction(expected)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The answer is 42.0", "so 42\n#### 42", True),
        ("It is $1,234", "#### 1234", True),
        ("42", "#### 43", False),
        ("Yes, she has 5 of them", "#### 5", True),  # the reference says that a number is wanted
        ("She has 5, so yes", "#### yes", True),
        ("No. There are 5", "yes", False),
        ("I do not know", "#### 5", False),
        ("I do not know", "I do not know", False),  # no answer never matches
        ("", "", False),
        ("", "#### 1", False),
        ("Paris", "#### Paris", True),
        ("London", "#### Paris", False),
        ("1/2", "#### 0.5", True),
        ("0.3333", "#### 1/3", False),
    ],
)
def test_matching_answers(answer, reference, same):
    assert answers_match(answer, reference) is same


def test_every_gsm8k_reference_has_its_answer(shared_data):
    """All 7,473: the number after the sign, by another road than ours."""
    lines = shared_data("gsm8k/train.jsonl").read_text().splitlines()
    for line in lines:
        text = json.loads(line)["answer"]
        assert extract_answer(text) == Fraction(text.split("#### ")[1].replace(",", "")), text
    assert len(lines) > 7000


def test_kind_is_checked():
    with pytest.raises(ValueError, match="kind: expected 'number'"):
        extract_answer("5", "numbers")


def test_rouge_l_is_the_f_measure():
    # Longest common subsequence "the cat mat": precision 3/3, recall 3/6.
    assert rouge_l("the cat mat", "the cat sat on a mat") == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert rouge_l("Cats running", "cat runs") == 1.0  # stems, lower case
    assert rouge_l("", "a cat") == 0.0


# Losses.


def plain_loss(model, row):
    """Cross-entropy from the model's own logits, one row at a time."""
    labels = torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.double(), labels.long(), ignore_index=-100))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_losses_are_the_models_cross_entropy(model, tokenizer, batch_size):
    data = tokenize(rows(11), tokenizer, max_length=32)
    model.train()
    found = sorted(loss for batch in sample_losses(model, tokenizer, data, batch_size=batch_size) for loss in batch)
    assert model.training
    model.eval()
    assert [loss.position for loss in found] == list(range(11))
    for loss, row in zip(found, data, strict=True):
        assert loss.mean == pytest.approx(plain_loss(model, row), rel=1e-5)
        assert loss.tokens == sum(label != -100 for label in row["labels"])


def test_losses_skip_what_is_done(model, tokenizer):
    data = tokenize(rows(7), tokenizer, max_length=32)
    whole = list(sample_losses(model, tokenizer, data, batch_size=2))
    done = {loss.position for batch in whole[:2] for loss in batch}
    assert list(sample_losses(model, tokenizer, data, batch_size=2, done=done)) == whole[2:]


def test_losses_honour_head_bias_scale_and_cap(tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=0.5,
            initializer_range=0.5,
        )
    ).eval()
    data = tokenize(rows(5), tokenizer, max_length=32)
    for batch in sample_losses(model, tokenizer, data):
        for loss in batch:
            assert loss.mean == pytest.approx(plain_loss(model, data[loss.position]), rel=1e-5)


def test_real_weights_know_their_stories(shared_data, tokenizer):
    """The 260K Llama's loss on its own stories is far below chance, and below that on shuffled ones."""
    model = load_stories(shared_data("stories260K") / "stories260K.bin")
    torch.manual_seed(0)
    with torch.no_grad():
        stories = model.generate(torch.full((8, 1), 1), attention_mask=torch.ones(8, 1), max_new_tokens=60, do_sample=True, top_k=20)
    shuffled = stories[:, torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(stories.shape[1] - 1)])]
    means = []
    for ids in (stories, shuffled):
        data = tokenize(Dataset.from_dict({"input_ids": ids.tolist()}), None, max_length=64)
        means.append(statistics.fmean(loss.mean for batch in sample_losses(model, tokenizer, data) for loss in batch))
    assert means[0] < 2.5
    assert means[1] > means[0] + 2
    assert means[0] < math.log(512)


def test_what_the_model_has_no_embedding_for_is_refused(tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1)).eval()
    long = tokenize(Dataset.from_dict({"input_ids": [[1] * 9]}), tokenizer, max_length=None)
    with pytest.raises(ValueError, match="the model has 8 positions, the data has a row of 9 tokens"):
        sample_losses(model, tokenizer, long)
    foreign = tokenize(Dataset.from_dict({"input_ids": [[1, 12]]}), tokenizer, max_length=None)
    with pytest.raises(ValueError, match="10 token embeddings, the data has id 12"):
        sample_losses(model, tokenizer, foreign)
    with pytest.raises(ValueError, match="batch_size: expected a whole number >= 1, got 0"):
        sample_losses(model, tokenizer, long, batch_size=0)


# Prompts and references.


def test_prompts_are_what_comes_before_the_completion(tokenizer):
    raw = Dataset.from_list([{"prompt": "one two", "completion": "three"}, {"prompt": "a", "completion": "cat sat"}])
    data = tokenize(raw, tokenizer, max_length=32)
    assert prompt_ids(data) == [tokenizer("one two")["input_ids"], tokenizer("a")["input_ids"]]
    assert completion_turns(raw, data, tokenizer) == [["three"], ["cat sat"]]
    assert prompt_ids(tokenize(raw, tokenizer, max_length=32, completion_only_loss=False)) is None


def test_references_are_whole_where_the_tokens_are_cut(tokenizer):
    raw = Dataset.from_list([{"prompt": "one two", "completion": "three four five six"}])
    assert completion_turns(raw, tokenize(raw, tokenizer, max_length=3), tokenizer) == [["three four five six"]]


def test_references_of_conversations_text_and_ids(tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )

    def turn(role, content):
        return {"role": role, "content": content}

    raw = Dataset.from_list([{"messages": [turn("user", "one"), turn("assistant", "two"), turn("user", "a"), turn("assistant", "cat")]}])
    data = tokenize(raw, tokenizer, max_length=None)
    assert completion_turns(raw, data, tokenizer) == [["two", "cat"]]
    assert tokenizer.decode(prompt_ids(data)[0]).split()[-1] == "<unk>"  # "assistant", where generation would start
    raw = Dataset.from_list([{"prompt": [turn("user", "one")], "completion": [turn("assistant", "two three")]}])
    assert completion_turns(raw, tokenize(raw, tokenizer, max_length=None), tokenizer) == [["two three"]]
    raw = Dataset.from_list([{"text": "a cat sat"}])
    data = tokenize(raw, tokenizer, max_length=None)
    assert completion_turns(raw, data, tokenizer) == [["a cat sat"]]
    assert prompt_ids(data) is None
    raw = Dataset.from_list([{"input_ids": [4, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}])
    data = tokenize(raw, tokenizer, max_length=None)
    assert completion_turns(raw, data, tokenizer) == [["three four"]]
    assert prompt_ids(data) == [[4, 5]]


def test_rows_left_out_do_not_shift_the_references(tokenizer):
    raw = Dataset.from_list([{"prompt": "a", "completion": ""}, {"prompt": "one two", "completion": "three"}])
    with pytest.warns(UserWarning, match="left out"):
        data = tokenize(raw, tokenizer, max_length=32)
    assert completion_turns(raw, data, tokenizer) == [["three"]]


# The whole.


def test_a_model_that_knows_the_answers_scores_full(tokenizer, tmp_path):
    """Trained by heart, so that generation, references and metrics are exercised on right and wrong answers."""
    raw = Dataset.from_list(
        [
            {"id": "a", "prompt": "one plus two is", "completion": "#### 3"},
            {"id": "b", "prompt": "what is the cat", "completion": "a cat sat on the mat"},
        ]
    )
    for word in ("####", "3"):
        assert tokenizer.convert_tokens_to_ids(word) == tokenizer.unk_token_id  # hence a tokenizer of its own
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["####", "3"])
    model = tiny_llama(0, hidden=32)
    data = tokenize(raw, tokenizer, max_length=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = sum(model(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = evaluate(model, tokenizer, raw, data, max_new_tokens=12, answers_path=tmp_path / "answers.jsonl", progress=False)
    assert result["metrics"]["rouge_l"] == {"mean": 1.0, "std": None, "per_seed": [1.0]}
    assert result["metrics"]["exact_match"]["mean"] == 1.0
    assert result["counts"]["references_with_answer"] == 1
    assert result["counts"]["ended"] == [2]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(line["id"], line["match"], line["rouge_l"], line["ended"]) for line in lines] == [
        ("a", True, 1.0, True),
        ("b", None, 1.0, True),
    ]
    assert lines[1]["answer"] == "a cat sat on the mat"
    # The same model, other references.
    other = Dataset.from_list([{**raw[0], "completion": "#### 4"}, {**raw[1], "completion": "dog"}])
    wrong = evaluate(model, tokenizer, other, tokenize(other, tokenizer, max_length=32), max_new_tokens=12, progress=False)
    assert wrong["metrics"]["exact_match"]["mean"] == 0.0
    assert wrong["metrics"]["rouge_l"]["mean"] < 0.2
    assert wrong["metrics"]["ce"]["mean"] > result["metrics"]["ce"]["mean"] + 1


def test_perplexity_weighs_tokens_not_rows(model, tokenizer):
    raw = rows(9)
    data = tokenize(raw, tokenizer, max_length=32)
    result = evaluate(model.eval(), tokenizer, raw, data, metrics=("perplexity", "ce"), progress=False)
    losses = [(plain_loss(model, row), sum(label != -100 for label in row["labels"])) for row in data]
    ce = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert result["metrics"]["ce"]["mean"] == pytest.approx(ce, rel=1e-6)
    assert result["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(ce), rel=1e-5)
    assert result["counts"]["tokens"] == sum(n for _, n in losses)
    assert "temperature" not in result["settings"]  # nothing was generated


def test_several_seeds_have_mean_and_standard_deviation(model, tokenizer):
    raw = rows(6)
    data = tokenize(raw, tokenizer, max_length=32)
    options = {"temperature": 1.5, "max_new_tokens": 8, "metrics": ("rouge_l",), "progress": False}
    result = evaluate(model, tokenizer, raw, data, seeds=(0, 1, 2), **options)
    found = result["metrics"]["rouge_l"]
    assert len(set(found["per_seed"])) == 3
    mean = sum(found["per_seed"]) / 3
    assert found["mean"] == pytest.approx(mean)
    assert found["std"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in found["per_seed"]) / 2))
    alone = evaluate(model, tokenizer, raw, data, seeds=(1,), **options)["metrics"]["rouge_l"]
    assert (alone["per_seed"], alone["std"]) == ([found["per_seed"][1]], None)
    text = format_quality(result)
    assert "3 seeds at temperature 1.5" in text
    assert f"{100 * found['std']:.2f}" in text
    assert json.loads(json.dumps(result)) == result


def test_greedy_runs_once_and_says_so(model, tokenizer):
    raw = rows(4)
    data = tokenize(raw, tokenizer, max_length=32)
    result = evaluate(model, tokenizer, raw, data, seeds=(0, 1, 2), max_new_tokens=4, progress=False)
    assert len(result["metrics"]["rouge_l"]["per_seed"]) == 1
    assert any("one run instead of 3" in note for note in result["notes"])
    assert "greedy" in format_quality(result)


def test_plain_text_has_a_perplexity_only(model, tokenizer):
    raw = Dataset.from_list([{"text": "one two three"}, {"text": "a cat sat"}])
    data = tokenize(raw, tokenizer, max_length=32)
    result = evaluate(model, tokenizer, raw, data, progress=False)
    assert set(result["metrics"]) == {"perplexity", "ce"}
    assert any("no prompt" in note for note in result["notes"])
    assert "no prompt" in format_quality(result)
    with pytest.raises(ValueError, match="rouge_l: the rows have no prompt"):
        evaluate(model, tokenizer, raw, data, metrics=("rouge_l",), progress=False)


def test_references_without_a_marked_answer_are_noted(model, tokenizer):
    raw = Dataset.from_list([{"prompt": "one two", "completion": "the dog ran in 1999 with a cat"}])
    data = tokenize(raw, tokenizer, max_length=32)
    result = evaluate(model, tokenizer, raw, data, max_new_tokens=4, progress=False)
    assert any("1 references do not mark their answer" in note for note in result["notes"])
    assert result["metrics"]["exact_match"]["mean"] == 0.0
    words = Dataset.from_list([{"prompt": "one two", "completion": "the dog"}])
    with pytest.raises(ValueError, match="exact_match: no reference has a final answer"):
        evaluate(model, tokenizer, words, tokenize(words, tokenizer, max_length=32), metrics=("exact_match",), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("rouge",)}, "metrics: expected some of rouge_l, exact_match, perplexity, ce, got rouge"),
        ({"metrics": ()}, "got none"),
        ({"seeds": ()}, "seeds: expected one or more"),
        ({"seeds": (1, 1)}, "seeds: expected one or more different"),
    ],
)
def test_bad_arguments(model, tokenizer, options, message):
    raw = rows(2)
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, raw, tokenize(raw, tokenizer, max_length=32), progress=False, **options)


def test_gsm8k_rows_go_through(shared_data, model, tokenizer):
    raw = load_rows(shared_data("gsm8k/train.jsonl"), columns={"prompt": "question", "completion": "answer"}).select(range(4))
    data = tokenize(raw, tokenizer, max_length=64)
    kept = data.filter(lambda row: sum(label == -100 for label in row["labels"]) < 60)
    result = evaluate(model, tokenizer, raw, kept, max_new_tokens=3, progress=False)
    assert result["counts"]["references_with_answer"] == len(kept)


# lm-eval.


def test_lm_eval_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastkd\[eval\]'"):
        lm_eval_suite("model", ["hellaswag"])


def test_lm_eval_is_called(monkeypatch):
    calls = []

    def simple_evaluate(**arguments):
        calls.append(arguments)
        return {"results": {"hellaswag": {"acc,none": 0.25}}, "versions": {"hellaswag": 1.0}, "config": object()}

    stub = types.ModuleType("lm_eval")
    stub.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", stub)
    out = lm_eval_suite("runs/mine", ("hellaswag",), model_args={"dtype": "float32"}, limit=10)
    assert out == {"results": {"hellaswag": {"acc,none": 0.25}}, "versions": {"hellaswag": 1.0}}
    expected = {"pretrained": "runs/mine", "dtype": "float32"}
    assert calls == [{"model": "hf", "model_args": expected, "tasks": ["hellaswag"], "limit": 10}]
    with pytest.raises(ValueError, match="tasks: expected a list"):
        lm_eval_suite("runs/mine", "hellaswag")
