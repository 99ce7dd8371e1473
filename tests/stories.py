"""stories260K, a real Llama of 260,032 parameters that wrote children's stories, from its llama2.c file."""

import struct
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def load_stories(path: Path) -> LlamaForCausalLM:
    raw = path.read_bytes()
    dim, ff, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", raw[:28])
    numbers = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    place = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return numbers[place - count : place].view(shape)

    def half_split(w: torch.Tensor, n: int) -> torch.Tensor:
        """Rotary pairs (2 i, 2 i + 1) of each head become (i, i + half), as transformers pairs them."""
        return w.view(layers, n, dim // heads // 2, 2, dim).transpose(2, 3).reshape(layers, -1, dim)

    kv = dim // heads * kv_heads
    weights = {"model.embed_tokens.weight": take(vocabulary, dim)}
    stacked = {"input_layernorm": take(layers, dim)}
    stacked["self_attn.q_proj"] = half_split(take(layers, dim, dim), heads)
    stacked["self_attn.k_proj"] = half_split(take(layers, kv, dim), kv_heads)
    stacked["self_attn.v_proj"] = take(layers, kv, dim)
    stacked["self_attn.o_proj"] = take(layers, dim, dim)
    stacked["post_attention_layernorm"] = take(layers, dim)
    stacked["mlp.gate_proj"] = take(layers, ff, dim)
    stacked["mlp.down_proj"] = take(layers, dim, ff)
    stacked["mlp.up_proj"] = take(layers, ff, dim)
    for name, values in stacked.items():
        weights |= {f"model.layers.{i}.{name}.weight": values[i] for i in range(layers)}
    weights["model.norm.weight"] = take(dim)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=ff,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]  # tied
    assert not unexpected
    return model.eval()


def decode(ids: list[int], tokenizer_file: Path) -> str:
    """Text of token ids, by llama2.c's tokenizer file: a score, a length and that many bytes for each token."""
    raw, place, pieces = tokenizer_file.read_bytes(), 4, []
    while place < len(raw):
        _, length = struct.unpack_from("fi", raw, place)
        pieces.append(raw[place + 8 : place + 8 + length])
        place += 8 + length
    return b"".join(pieces[i] for i in ids if i > 2).decode(errors="replace")
