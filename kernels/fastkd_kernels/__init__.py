"""Row kernels for knowledge distillation: torch, Triton and the standard library only."""

__all__ = ["divergences", "offset_gemm", "offset_torch", "rows", "rows_parallel_torch", "rows_torch", "spec", "topk", "topk_torch"]
