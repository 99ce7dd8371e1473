"""How many tokens the losses take at a time, and the memory of their buffers."""

import math

import torch

__all__ = ["CHUNK_TOKENS", "LEAST_TOKENS", "buffer_bytes", "chunk_and_group", "chunk_size", "chunk_tokens_within"]

# Bytes of the buffers together, and the most tokens a chunk holds: larger chunks gain nothing that was measured (kernels want
# about 1000 rows to fill a GPU; on CPUs the GEMMs are at full speed from about 256 rows).
CHUNK_BYTES = {"cpu": 256 << 20}
CHUNK_BYTES_GPU = 1 << 30
CHUNK_TOKENS = 2048
LEAST_TOKENS = 64  # that the library takes of its own accord: with fewer the heads are read too often
TILE_TOKENS = 128  # of a GEMM's tile on a GPU
LEAST_CHUNK = 256  # of a group: with fewer rows a GPU's row kernel and the products wait for memory
MOST_CHUNK = 640


def _budget(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_GPU)


def chunk_size(tokens: int, bytes_per_token: int, device: torch.device, chunk_tokens: int) -> int:
    """Balanced chunks: their number first, from the budget, then equal sizes; on a GPU, of whole tiles of its GEMMs."""
    most = chunk_tokens
    if most <= 0:
        most = min(CHUNK_TOKENS, max(LEAST_TOKENS, _budget(device) // max(1, bytes_per_token)))
        if device.type != "cpu" and most > TILE_TOKENS:
            most -= most % TILE_TOKENS
    size = math.ceil(tokens / math.ceil(tokens / most))
    if device.type == "cpu":
        return size
    return min(math.ceil(size / TILE_TOKENS) * TILE_TOKENS, most, tokens)


def _group_sizes(tokens: int, logits_bytes: int, dz_bytes: int, device: torch.device, chunk_tokens: int) -> tuple[int, int]:
    """Tokens of a group and of its chunks, all alike; (0, 0) where a group has no room."""
    most = chunk_tokens or CHUNK_TOKENS
    budget = max(most // 4, LEAST_CHUNK) * logits_bytes + most * dz_bytes if chunk_tokens else _budget(device)
    best, least = (0, 0), math.inf
    for size in range(LEAST_CHUNK, MOST_CHUNK + 1, TILE_TOKENS):
        chunks = min((budget - size * logits_bytes) // (size * dz_bytes), most // size)
        if chunks < 1:
            continue
        group = size * chunks
        # A group reads and writes dW, a chunk reads both heads, most of it while the product before computes.
        cost = math.ceil(tokens / group) + math.ceil(tokens / size) / 8
        if cost <= least:
            best, least = (min(group, tokens), min(size, tokens)), cost
    return best


def chunk_and_group(tokens: int, logits_bytes: int, dz_bytes: int, device: torch.device, chunk_tokens: int) -> tuple[int, int]:
    """Tokens of a chunk and of a group, from the bytes of a token's logits and of its dz, 0 where that is not written apart."""
    size = chunk_size(tokens, logits_bytes, device, chunk_tokens)
    if dz_bytes and size < min(tokens, CHUNK_TOKENS):  # a chunk of as many tokens as would be taken anyway gains nothing
        group, smaller = _group_sizes(tokens, logits_bytes, dz_bytes, device, chunk_tokens)
        if smaller < group:
            return smaller, group
    return size, size


def buffer_bytes(
    tokens: int, vocabulary: int, shared: int, dtype: torch.dtype, logits_dtype: torch.dtype, device: torch.device, chunk_tokens: int = 0
) -> int:
    """Bytes that the loss's logits, and gradients of logits that are written apart, take for ``tokens`` counted tokens at once.

    Args:
        shared: of the vocabulary, that a dense teacher has logits of too; 0 without one.
        dtype: of the head and the hidden states; a GPU is taken to multiply 16 bits into fp32.
        chunk_tokens: 0: the library's choice.
    """
    if not tokens:
        return 0
    logits_bytes = logits_dtype.itemsize * (vocabulary + shared)
    dz_bytes = dtype.itemsize * vocabulary if device.type != "cpu" and dtype.itemsize == 2 and logits_dtype != dtype else 0
    size, group = chunk_and_group(tokens, logits_bytes, dz_bytes, device, chunk_tokens)
    return size * logits_bytes + (group * dz_bytes if size < group else 0)


def chunk_tokens_within(max_bytes: float, vocabulary: int, shared: int, logits_dtype: torch.dtype) -> int:
    """The largest ``chunk_tokens`` for which `buffer_bytes` is at most ``max_bytes``, whatever the number of counted tokens.

    Args:
        vocabulary, shared: as in `buffer_bytes`.

    Raises:
        ValueError: the logits of one token take more.
    """
    bytes_per_token = logits_dtype.itemsize * (vocabulary + shared)  # with dz apart a group takes less than a chunk as large would
    if max_bytes < bytes_per_token:
        needed = math.ceil(bytes_per_token / 2**14) / 2**6
        raise ValueError(
            f"max_loss_buffer_mb: expected at least {needed:g}, for the logits of one token of {vocabulary} + {shared}"
            f" entries, got {max_bytes / 2**20:g}"
        )
    return int(max_bytes // bytes_per_token)
