"""The GPU that is stood in for: its compute capability decides which copies of an FP8 tensor a product reads."""

HOPPER, BLACKWELL = (9, 0), (10, 0)
capability: tuple[int, int] = HOPPER


def multiplies_any_layout() -> bool:
    """``common/util/cuda_runtime.cpp`` and ``gemm/cublaslt_gemm.cu nvte_is_non_tn_fp8_gemm_supported``: Blackwell takes
    per-tensor FP8 in any layout, Hopper row by row alone."""
    return (10, 0) <= capability < (12, 0) or capability >= (13, 0)
