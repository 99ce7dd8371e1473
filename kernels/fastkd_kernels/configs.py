"""Block and warp choices of the row kernel, as data."""

__all__ = ["row_config"]


def row_config(width: int) -> tuple[int, int]:
    """(block, warps) for rows of ``width`` logits.

    2048 x 4 warps leaves 16 elements a thread: enough loads in flight to cover memory latency. It keeps every divergence off the stack on
    every target that is compiled in the tests; 4096 x 8, as many elements a thread, spills a register of two of them (32768-wide blocks
    spill kilobytes). Small rows take a block of their own size.
    """
    block = 2048
    while block // 2 >= max(width, 256):
        block //= 2
    return block, max(1, min(4, block // 512))
