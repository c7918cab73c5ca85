"""Matrix products, from the copies of FP8 tensors that the GPU's kernels read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.te.extension import device
from tests.te.extension.casts import TORCH, kind, values_of

__all__ = ["generic_gemm", "get_cublasLt_version", "get_num_cublas_streams"]


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_input: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, None, None, None]:
    """``b @ a`` of row-major matrices, each perhaps transposed: ``csrc/extensions/gemm.cpp gemm`` and
    ``getGemmOutputShape``. Sums are fp32 and rounded once, also where they are added to ``out``."""
    unknown = {"an FP8 output": quantizer, "a bias": bias, "gelu": gelu, "userbuffers": comm_overlap}
    unknown |= {"a factor": alpha != 1 or beta not in (None, float(accumulate))}
    if asked := [name for name, value in unknown.items() if value is not None and value is not False]:
        raise NotImplementedError(f"generic_gemm with {', '.join(asked)} is not stood in for")
    x = _operand(a, by_column=not transpose_a, is_transposed=transpose_a)
    y = _operand(b, by_column=transpose_b, is_transposed=not transpose_b)
    _check_shapes(a, b, x, y, transpose_a, transpose_b)
    product = (y.t() if transpose_b else y) @ (x.t() if transpose_a else x)
    if not transpose_b:
        product = product.view(*b.size()[:-1], product.shape[-1])
    if out is not None:
        if out.shape != product.shape:
            raise RuntimeError(f"GEMM output has invalid dims (expected {product.shape}, got {out.shape})")
        out.copy_(out.float() + product if accumulate else product)
        return out, None, None, None
    return product.to(TORCH[int(dtype)] if dtype is not None else a.dtype), None, None, None


def _operand(tensor: Any, *, by_column: bool, is_transposed: bool) -> Tensor:
    """``common/gemm/cublaslt_gemm.cu CanonicalizeGemmInput``: rows for what is summed along rows, else the copy by
    column. Blackwell multiplies per-tensor FP8 in any layout and takes the rows wherever it has them."""
    if kind(tensor) == "none":
        return tensor.detach().float().flatten(0, -2)
    if kind(tensor) == "tensor" and device.multiplies_any_layout():
        by_column = tensor._data is None
    if kind(tensor) == "block" and device.capability >= device.BLACKWELL:
        raise NotImplementedError("a product of block-scaled tensors, which TransformerEngine emulates by mxfp8 there")
    if kind(tensor) == "mx" and device.capability < device.BLACKWELL:
        raise RuntimeError(f"no MXFP8 product on compute capability {device.capability}")
    return values_of(tensor, by_column=by_column)


def _check_shapes(a: Any, b: Any, x: Tensor, y: Tensor, transpose_a: bool, transpose_b: bool) -> None:
    """``common/gemm/cublaslt_gemm.cu CanonicalizeGemmInput``, in its own words; and cuBLAS's own condition on the rows
    of what it writes (https://docs.nvidia.com/cuda/cublas, tensor core usage)."""
    kinds = {kind(a), kind(b)}
    if len(kinds) > 1:
        raise RuntimeError(f"Inputs A and B to GEMM need to have compatible scaling modes, but got {sorted(kinds)}")
    if kinds == {"none"}:
        return
    summed = x.shape[1] if transpose_a else x.shape[0]
    other = y.shape[0] if transpose_b else y.shape[1]
    if summed != other:
        raise RuntimeError(f"Invalid matrix dimensions for GEMM ({tuple(x.shape)} and {tuple(y.shape)})")
    rows, columns = (x.shape[0] if transpose_a else x.shape[1]), (y.shape[1] if transpose_b else y.shape[0])
    multiple = 32 if kinds == {"mx"} else 16
    if summed % multiple:
        raise RuntimeError(f"Leading dimension requirement for FP8 GEMM: {summed} is no multiple of {multiple}")
    if rows % 8:
        raise RuntimeError(f"Outer dimension requirement on A for FP8 GEMM: {rows} is no multiple of 8")
    if kind(b) == "block" and not b._is_2D_scaled and columns % 8:
        raise RuntimeError(f"Outer dimension requirement on B for NVTE_BLOCK_SCALING GEMM: {columns}")


def get_cublasLt_version() -> int:
    """``csrc/extensions/misc.cpp``: of CUDA 13.0, as the requirements of the recipes ask for."""
    return 130000


def get_num_cublas_streams() -> int:
    """``common/util/multi_stream.cpp nvte_get_num_compute_streams``."""
    return 4
