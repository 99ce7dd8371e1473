"""Batched generation: what it answers does not depend on how prompts were batched, and a run that goes on equals one never stopped."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastkd.generation import generate
from fastkd.preparation import position_limit

from .tiny import tiny_llama, tiny_tokenizer

PROMPTS = [[5], [6, 7, 8], [4, 9], [10, 11, 12, 13, 14], [7, 7], [20], [15, 16, 17, 18], [21, 22]]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(36)  # some of its answers end early


def flat(batches):
    return sorted(answer for batch in batches for answer in batch)


def one_by_one(model, prompt, new, ends=(2,)):
    """Greedy decoding with neither batch, padding, cache nor `generate`."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_greedy_answers_are_those_of_a_plain_loop(model, tokenizer):
    expected = [one_by_one(model.eval(), prompt, 12) for prompt in PROMPTS]
    assert len({len(e) for e in expected}) > 1, "some must end early for this test to mean something"
    for batch_size in (1, 3, 8):
        answers = flat(generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size))
        assert [a.position for a in answers] == list(range(len(PROMPTS)))
        for answer, ids in zip(answers, expected, strict=True):
            assert answer.tokens == len(ids)
            assert answer.ended == (ids[-1] == 2)
            assert answer.text == tokenizer.decode([i for i in ids if i > 3], skip_special_tokens=True)


def test_text_prompts_are_their_ids(model, tokenizer):
    ids = tokenizer("one two three")["input_ids"]
    by_text, by_ids = (flat(generate(model, tokenizer, [p], max_new_tokens=6)) for p in ("one two three", ids))
    assert by_text == by_ids


def test_batches_are_of_similar_length_and_come_one_by_one(model, tokenizer):
    batches = [[a.position for a in batch] for batch in generate(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=3)]
    assert batches == [[3, 6, 1], [2, 4, 7], [0, 5]]


def sampled(model, tokenizer, **options):
    return generate(model, tokenizer, PROMPTS, **{"max_new_tokens": 10, "temperature": 1.0, "seed": 5, "batch_size": 3, **options})


def test_sampling_is_seeded_and_goes_on_where_it_stopped(model, tokenizer):
    whole = list(sampled(model, tokenizer))
    assert whole == list(sampled(model, tokenizer))
    assert flat(whole) != flat(sampled(model, tokenizer, seed=6))
    # A half-saved batch is made again as a whole.
    done = {a.position for a in whole[0]} | {whole[1][0].position}
    assert list(sampled(model, tokenizer, done=done)) == whole[1:]
    assert list(sampled(model, tokenizer, done=set(range(len(PROMPTS))))) == []


def test_low_temperature_and_small_top_p_are_greedy(model, tokenizer):
    greedy = flat(generate(model, tokenizer, PROMPTS, max_new_tokens=10))
    assert flat(sampled(model, tokenizer, temperature=1e-4)) == greedy
    assert flat(sampled(model, tokenizer, top_p=1e-6)) == greedy


def test_sampling_draws_from_the_softmax(tokenizer):
    """The first token of many answers, against the model's own probabilities at that temperature."""
    model, prompt, n = tiny_llama(4).eval(), [5, 6], 3000
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 1.5, -1)
    counts = torch.zeros(len(p))
    for answer in flat(generate(model, tokenizer, [prompt] * n, max_new_tokens=1, temperature=1.5, batch_size=1000)):
        token = 2 if answer.ended else tokenizer.convert_tokens_to_ids(answer.text) if answer.text else None
        if token is not None:
            counts[token] += 1
    for i in range(4, 26):  # words: each decodes to itself
        bound = 5 * float((p[i] * (1 - p[i]) * n).sqrt()) + 1
        assert abs(float(counts[i]) - n * float(p[i])) < bound, i


def test_the_caller_is_left_undisturbed(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    settings = model.generation_config
    state = torch.get_rng_state()
    run = sampled(model, tokenizer)
    next(run)
    # In mid-run too: a caller draws numbers between two batches.
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert model.generation_config is settings
    list(run)
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_the_models_own_generation_settings_do_not_count(tokenizer):
    plain = tiny_llama(3).eval()
    other = copy.deepcopy(plain)
    other.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, top_k=2, no_repeat_ngram_size=1)
    runs = [flat(generate(m, tokenizer, PROMPTS, max_new_tokens=12)) for m in (plain, other)]
    assert runs[0] == runs[1]
    runs = [flat(sampled(m, tokenizer)) for m in (plain, other)]
    assert runs[0] == runs[1]


def test_the_models_further_end_tokens_count(model, tokenizer):
    first = [one_by_one(model, p, 1)[0] for p in PROMPTS]
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = [2, first[0]]
    answer = flat(generate(ending, tokenizer, PROMPTS[:1], max_new_tokens=5))[0]
    assert (answer.text, answer.tokens, answer.ended) == ("", 1, True)


def test_dropout_is_off(tokenizer):
    model = tiny_llama(3, attention_dropout=0.9)
    expected = flat(generate(model.eval(), tokenizer, PROMPTS, max_new_tokens=6))
    assert flat(generate(model.train(), tokenizer, PROMPTS, max_new_tokens=6)) == expected


def test_an_adapted_model_generates_with_its_adapter(model, tokenizer):
    peft = pytest.importorskip("peft")
    plain = flat(generate(model, tokenizer, PROMPTS, max_new_tokens=6))
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert flat(generate(adapted, tokenizer, PROMPTS, max_new_tokens=6)) == plain  # B is zero
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed = flat(generate(adapted, tokenizer, PROMPTS, max_new_tokens=6))
    assert changed != plain
    assert flat(generate(adapted.merge_and_unload(), tokenizer, PROMPTS, max_new_tokens=6)) == changed


def test_rotary_positions_do_not_end(model, tokenizer):
    """As in training, `check_fits` lets a row of any length pass."""
    assert model.config.max_position_embeddings == 64
    assert position_limit(model) is None
    prompt = [5 + i % 20 for i in range(70)]
    expected = one_by_one(model.eval(), prompt, 6)
    (answer,) = flat(generate(model, tokenizer, [prompt], max_new_tokens=6))
    assert answer.tokens == len(expected)
    assert answer.text == tokenizer.decode([i for i in expected if i > 3], skip_special_tokens=True)


def test_an_answer_ends_at_the_last_learned_position(tokenizer):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ).eval()
    assert position_limit(model) == 64
    answers = flat(generate(model, tokenizer, [[5] * 61, [5]], max_new_tokens=50, batch_size=1))
    assert answers[0].tokens <= 3
    with pytest.raises(ValueError, match="prompt of 1 has 64 tokens, the model 64 positions"):
        generate(model, tokenizer, [[5], [5] * 64], max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt of s9 has 70 tokens"):
        generate(model, tokenizer, [[5] * 70], max_new_tokens=4, names=["s9"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number >= 1, got 2.5"),
        ({"temperature": -1}, "temperature: expected 0"),
        ({"temperature": float("nan")}, "temperature: expected 0"),
        ({"top_p": 0.0}, "top_p: expected a number in"),
    ],
)
def test_bad_settings_are_refused_at_the_call(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, PROMPTS, **{"max_new_tokens": 4, **options})


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="prompt of 1 is empty"):
        generate(model, tokenizer, [[5], []], max_new_tokens=4)
