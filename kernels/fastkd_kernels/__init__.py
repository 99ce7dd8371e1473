"""Row kernels for knowledge distillation: torch, Triton and the standard library only."""

__all__ = ["divergences", "rows", "rows_torch", "spec"]
