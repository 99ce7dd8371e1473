"""Tiny models, tokenizers and rows, made on the spot: no download, milliseconds to build."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (  # noqa: SIM905
    "<pad> <s> </s> <unk> one two three four five six seven eight nine ten plus minus is what and the a cat dog sat ran on mat"
).split()
VOCABULARY = 40


def tiny_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad)


def tiny_llama(seed: int, hidden: int = 16, layers: int = 2, tied: bool = False, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = config.pop("heads", 2)
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        **config,
    )
    return LlamaForCausalLM(settings)


def rows(n: int, seed: int = 0) -> Dataset:
    """``n`` prompts and completions of different lengths, with ids."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(4, len(WORDS), (count,), generator=generator).tolist())

    return Dataset.from_list([{"id": f"s{i}", "prompt": words(1, 5), "completion": words(1, 9)} for i in range(n)])
