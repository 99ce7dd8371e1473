"""Batched generation: prompts in, answers out, the same on every run."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .data import _encode, _special_prefix
from .hf import _causal_lm, _eval_mode
from .preparation import pad_id, position_limit

__all__ = ["Answer", "check_settings", "generate"]


class Answer(NamedTuple):
    """What a model wrote for one prompt.

    Attributes:
        position: the prompt's place in the list that was given.
        text: without the prompt, the end token and other special tokens.
        tokens: generated tokens, the end token included.
        ended: the model wrote its end token; otherwise it was stopped.
    """

    position: int
    text: str
    tokens: int
    ended: bool


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` outside their range; those that are there of max_new_tokens, batch_size, temperature, top_p."""
    for name in ("max_new_tokens", "batch_size"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    if not 0 <= (temperature := settings.get("temperature", 0.0)) < float("inf"):
        raise ValueError(f"temperature: expected 0 (greedy) or a finite number > 0, got {temperature!r}")
    if not 0 < (top_p := settings.get("top_p", 1.0)) <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    done: Collection[int] = frozenset(),
    names: Sequence[str] | None = None,
    progress: str | None = None,
) -> Iterator[list[Answer]]:
    """One answer per prompt, batch by batch, so that a caller can save what there is.

    Batches hold prompts of similar length, the longest first (what does not fit in memory fails at once), padded on the left. They depend
    on the prompts and ``batch_size`` alone, and sampling is seeded per batch: an interrupted run that goes on with ``done`` gives what an
    uninterrupted one would have given. The settings in the model's own ``generation_config`` (sampling, penalties) are not used, but for
    its end tokens. The model's mode and the global random state are left as they were.

    Args:
        model: a causal LM of transformers, wrapped by PEFT or not, on its device.
        tokenizer: the model's tokenizer.
        prompts: token ids, or texts, to which the tokenizer's leading special tokens are added. None may be empty.
        max_new_tokens: longest answer, end token included. Shorter where the model has no learned position left; rotary ones do not end.
        temperature: 0 is greedy; otherwise the logits are divided by it and a token is sampled.
        top_p: when sampling, the smallest set of tokens whose probability reaches this is kept.
        seed: of the sampling.
        done: places of prompts that have their answer. Batches that hold no other are skipped.
        names: what messages call the prompts; by default their places.
        progress: label of a progress bar; None shows none.

    Returns:
        An iterator over lists of `Answer`, one list per batch.

    Raises:
        ValueError: a setting outside its range, an empty prompt, or one that leaves no position for an answer; before anything is run.
    """
    check_settings({"max_new_tokens": max_new_tokens, "batch_size": batch_size, "temperature": temperature, "top_p": top_p})
    prefix = _special_prefix(tokenizer) if any(isinstance(p, str) for p in prompts) else []
    ids = [_ids(tokenizer, prefix, prompt) for prompt in prompts]
    limit = position_limit(model)
    for i, prompt_ids in enumerate(ids):
        name, length = str(i) if names is None else names[i], len(prompt_ids)
        if not length:
            raise ValueError(f"prompts: the prompt of {name} is empty; generation needs at least one token")
        if limit is not None and length >= limit:
            raise ValueError(f"prompts: the prompt of {name} has {length} tokens, the model {limit} positions: none is left for an answer")
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    sampling = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0} if temperature else {}
    lm = _causal_lm(model)
    ends = _end_ids(lm, tokenizer)
    settings = {"do_sample": False, **sampling, "eos_token_id": ends or None, "pad_token_id": pad_id(tokenizer), "use_cache": True}

    def run() -> Iterator[list[Answer]]:
        with tqdm(total=len(ids), desc=progress, unit="answers", disable=progress is None) as bar:
            for number, batch in enumerate(batches):
                if not all(i in done for i in batch):
                    longest = len(ids[batch[0]])
                    room = max_new_tokens if limit is None else min(max_new_tokens, limit - longest)
                    config = GenerationConfig(**settings, max_new_tokens=room)
                    rows = _run(lm, [ids[i] for i in batch], config, f"{seed}/{number}")
                    yield [_answer(tokenizer, i, row, ends) for i, row in zip(batch, rows, strict=True)]
                bar.update(len(batch))

    return run()


def _ids(tokenizer: Any, prefix: list[int], prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    ids = _encode(tokenizer, prompt)
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def _end_ids(lm: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token, which training teaches, and the model's: an instruct model may have several."""
    own = getattr(lm.generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in found if i is not None)


def _run(lm: Any, prompts: list[list[int]], config: GenerationConfig, seed: str) -> list[list[int]]:
    """The new ids of each prompt of a batch, padding and all."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, longest - len(prompt) :] = 1
    device = lm.get_input_embeddings().weight.device
    # What `config` leaves open, transformers takes from the model's own generation_config.
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        # Not around the loop: a generator that stops inside would leave its caller in another random state and mode.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _eval_mode(lm):
            torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
            out = lm.generate(input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config)
    finally:
        lm.generation_config = own
    return out[:, longest:].tolist()


def _answer(tokenizer: Any, position: int, ids: list[int], ends: list[int]) -> Answer:
    place = next((i for i, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:place], skip_special_tokens=True)
    return Answer(position, text, len(ids) if place is None else place + 1, place is not None)
