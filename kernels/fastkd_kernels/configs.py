"""Block and warp choices of the row kernel, as data."""

__all__ = ["row_config"]


def row_config(width: int, statistic: bool) -> tuple[int, int]:
    """(block, warps) for rows of ``width`` logits.

    4096 x 8 warps leaves 16 elements a thread: enough loads in flight to cover memory latency, and far from the registers' limit on every
    target that is compiled in the tests (kernels of 32768-wide blocks spill kilobytes). Small rows take a block of their own size.
    """
    block = 4096
    while block // 2 >= max(width, 256):
        block //= 2
    return block, max(1, min(8, block // 512))
