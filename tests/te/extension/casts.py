"""Casts to FP8 and the scales of the recipes.

A cast has the three steps of ``csrc/quantizer.cpp``: an output is made (`create`) or brought to the copies that the
quantizer wants (`update`), then its buffers are written (`_fill`). What no kernel writes keeps the bytes of NaN.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.te.extension import device

__all__ = [
    *("quantize", "dequantize", "bgrad_quantize", "fp8_transpose", "compute_amax", "create_empty_quantized_tensor"),
    *("fused_amax_and_scale_update_after_reduction", "multi_tensor_compute_scale_and_scale_inv"),
    *("fp8_block_scaling_compute_partial_amax", "fp8_block_scaling_partial_cast"),
]

DType = enum.IntEnum(
    "DType",
    {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6}
    | {"kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10},
)
"""``common/include/transformer_engine/transformer_engine.h NVTEDType``."""
FORMATS = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}
TORCH = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16, **FORMATS}
VALUES = {number: torch.arange(256, dtype=torch.uint8).view(dtype).float() for number, dtype in FORMATS.items()}
"""What every byte stands for: looking it up is four times as fast as torch's conversion on a CPU."""
NOT_WRITTEN = 0xFF
"""NaN as E4M3, as E5M2 and as the power of two of a scale."""
TILE, MX = 128, 32
"""Entries of a block that share a scale."""
LARGEST_FP32 = torch.finfo(torch.float32).max


def largest(dtype: int) -> float:
    """448 of E4M3, 57344 of E5M2: ``common/recipe/delayed_scaling.cu fp8_dtype_max``."""
    return float(torch.finfo(FORMATS[int(dtype)]).max)


def cast(scaled: Tensor, dtype: int) -> Tensor:
    """Bytes of fp32: to the nearest, ties to even, infinities to the largest number, NaN stays
    (``common/util/ptx.cuh``: ``cvt.rn.satfinite``)."""
    top = largest(dtype)
    return scaled.clamp(-top, top).to(FORMATS[int(dtype)]).view(torch.uint8)


def value(data: Tensor, dtype: int) -> Tensor:
    """fp32 of bytes, not scaled."""
    return VALUES[int(dtype)].index_select(0, data.flatten().int()).view(data.shape)


def amax_of(x: Tensor, *dims: int) -> Tensor:
    """Largest magnitude; NaN is passed over and inf is not, as ``fmaxf`` does
    (``common/recipe/current_scaling.cu amax_kernel``)."""
    magnitudes = x.detach().float().abs().nan_to_num(0.0, torch.inf)
    if not magnitudes.numel():
        return magnitudes.new_zeros(())
    return magnitudes.amax(dims)


def scale_of(amax: Tensor, dtype: int, *, epsilon: float, power_of_two: bool, for_inf: float = LARGEST_FP32) -> Tensor:
    """``common/recipe/recipe_common.cuh compute_scale_from_amax``: 1 where the amax is 0, infinite or NaN."""
    amax = torch.where(amax < epsilon, epsilon, amax)
    scale = largest(dtype) / amax
    scale = torch.where(scale.isinf(), for_inf, scale)
    if power_of_two:  # the mantissa is cut off
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where(amax.isinf() | amax.isnan() | (amax == 0), 1.0, scale)


def turned(data: Tensor) -> Tensor:
    """``[..., last]`` as ``[last, ...]`` (``csrc/quantizer.cpp make_transpose_shape``)."""
    return data.reshape(-1, data.shape[-1]).t().contiguous().view(turned_shape(data.shape))


def turned_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[-1], *shape[:-1])


# ---- outputs


def kind(of: Any) -> str:
    """Of a quantizer or of a tensor: ``tensor``, ``block``, ``mx`` or, of a tensor in high precision, ``none``."""
    name = type(of).__name__
    for beginning, found in (("Float8Block", "block"), ("MXFP8", "mx"), ("Float8", "tensor")):
        if name.startswith(beginning):
            return found
    if name.endswith("Quantizer") or not isinstance(of, Tensor):
        raise NotImplementedError(f"{name} is not stood in for (tests/te/extension/casts.py)")
    return "none"


def _wanted(quantizer: Any) -> tuple[bool, bool]:
    """Which copies an output has, by row and by column: of the per-tensor kind, Blackwell needs the first alone
    (``csrc/quantizer.cpp Float8Quantizer::create_tensor``)."""
    if kind(quantizer) == "tensor" and device.multiplies_any_layout():
        return True, False
    return quantizer.rowwise_usage, quantizer.columnwise_usage


def _buffers(quantizer: Any, shape: Sequence[int]) -> dict[str, Tensor]:
    """What a new output of every copy would hold, by attribute; `_fill` has not written it."""

    def not_written(*size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        buffer = torch.empty(size, dtype=dtype)
        return buffer.fill_(NOT_WRITTEN if dtype is torch.uint8 else torch.nan)

    if kind(quantizer) == "tensor":
        return {"_data": not_written(*shape), "_transpose": not_written(*turned_shape(shape))}
    dtype = torch.uint8 if kind(quantizer) == "mx" else torch.float32
    scales = [not_written(*quantizer.get_scale_shape(shape, columnwise), dtype=dtype) for columnwise in (False, True)]
    by_column = shape if kind(quantizer) == "mx" else turned_shape(shape)
    return {
        **{"_rowwise_data": not_written(*shape), "_rowwise_scale_inv": scales[0]},
        **{"_columnwise_data": not_written(*by_column), "_columnwise_scale_inv": scales[1]},
    }


def _is_by_column(name: str) -> bool:
    return name in ("_transpose", "_columnwise_data", "_columnwise_scale_inv")


def create(quantizer: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    """An output that nothing has written yet: ``csrc/quantizer.cpp``, each kind's ``create_tensor``."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
    from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage

    parts: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    copies = _wanted(quantizer)
    buffers = {name: x if copies[_is_by_column(name)] else None for name, x in _buffers(quantizer, shape).items()}
    if kind(quantizer) == "tensor":
        classes: tuple[Any, Any] = (Float8TensorStorage, Float8Tensor)
        parts |= {"data": buffers["_data"], "data_transpose": buffers["_transpose"]}
        parts |= {"fp8_scale_inv": torch.full((1,), torch.nan)}
    else:
        parts |= {name.removeprefix("_"): x for name, x in buffers.items()}
        if kind(quantizer) == "block":
            classes = (Float8BlockwiseQTensorStorage, Float8BlockwiseQTensor)
            parts |= {"is_2D_scaled": quantizer.block_scaling_dim == 2}
        else:
            classes = (MXFP8TensorStorage, MXFP8Tensor)
            parts |= {"with_gemm_swizzled_scales": quantizer.optimize_for_gemm}
    storage, whole = classes
    if quantizer.internal:
        return storage(fake_dtype=dtype, **parts)
    return whole(shape=torch.Size(shape), dtype=dtype, **parts)


def update(quantizer: Any, output: Any) -> None:
    """Give ``output`` the copies that the quantizer wants and take the others from it: ``csrc/quantizer.cpp``, each
    kind's ``convert_and_update_tensor``. A copy that is dropped cannot be read when it is stale."""
    copies = _wanted(quantizer)
    for name, new in _buffers(quantizer, output.size()).items():
        if not copies[_is_by_column(name)]:
            setattr(output, name, None)
        elif getattr(output, name) is None:
            setattr(output, name, new)
    if kind(quantizer) == "tensor":
        output._transpose_invalid = not copies[1]
    if kind(quantizer) == "mx":
        output._with_gemm_swizzled_scales = quantizer.optimize_for_gemm
    if kind(quantizer) != "block":
        output._fp8_dtype = quantizer.dtype


# ---- casts


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """``csrc/extensions/cast.cpp quantize``."""
    if noop is not None:
        raise NotImplementedError("quantize with a flag to do nothing (CUDA graphs) is not stood in for")
    return quantized(tensor.detach(), quantizer, output, tensor.dtype)


def quantized(x: Tensor, quantizer: Any, output: Any, dtype: torch.dtype) -> Any:
    if output is None:
        output = create(quantizer, x.shape, dtype)
    else:
        update(quantizer, output)
    {"tensor": _fill, "block": _fill_blocks, "mx": _fill_mx}[kind(quantizer)](x, quantizer, output)
    return output


def _fill(x: Tensor, quantizer: Any, output: Any) -> None:
    """Delayed scaling casts with the scale of passes before and notes the largest entry
    (``common/transpose/cast_transpose.cu``); current scaling with this tensor's, agreed upon by a group
    (``csrc/quantizer.cpp Float8CurrentScalingQuantizer::quantize_impl``)."""
    if output._data is None:
        raise NotImplementedError("per-tensor FP8 by column alone: TransformerEngine's own kernels reject it, too")
    wide = x.float()
    if hasattr(quantizer, "scale"):
        scale = quantizer.scale.reshape(1).clone()
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax_of(wide)))
    else:
        amax = amax_of(wide).reshape(1)
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
        scale = scale_of(
            amax, quantizer.dtype, epsilon=quantizer.amax_epsilon, power_of_two=quantizer.force_pow_2_scales
        )
    data = cast(wide * scale, quantizer.dtype)
    output._scale_inv.copy_((1 / scale).view_as(output._scale_inv))
    output._data.copy_(data.view_as(output._data))
    if output._transpose is not None:
        output._transpose.copy_(turned(data).view_as(output._transpose))


def _fill_blocks(x: Tensor, quantizer: Any, output: Any) -> None:
    """128 x 128 entries share a scale, or 128 of a row: ``common/transpose/quantize_transpose_square_blockwise.cu`` and
    ``quantize_transpose_vector_blockwise.cu``. The copy by column is the cast of the transpose. Scales of rows lie
    transposed; their buffer is padded (``csrc/quantizer.cpp Float8BlockQuantizer::get_scale_shape``)."""
    is_square = quantizer.block_scaling_dim == 2
    rows = x.float().flatten(0, -2)
    for name, matrix in (("_rowwise", rows), ("_columnwise", rows.t())):
        if (data := getattr(output, f"{name}_data")) is None:
            continue
        height, width = matrix.shape
        tile = TILE if is_square else 1
        below, right = -height % tile, -width % TILE
        tiles = torch.nn.functional.pad(matrix, (0, right, 0, below))
        tiles = tiles.view((height + below) // tile, tile, (width + right) // TILE, TILE)
        scale = scale_of(
            amax_of(tiles, 1, 3),
            quantizer.dtype,
            epsilon=quantizer.amax_epsilon,
            power_of_two=quantizer.force_pow_2_scales,
            for_inf=torch.finfo(x.dtype).max,
        )
        found = cast(tiles * scale[:, None, :, None], quantizer.dtype).view(height + below, width + right)
        data.copy_(found[:height, :width].reshape(data.shape))
        inverse = 1 / scale if is_square else (1 / scale).t()
        getattr(output, f"{name}_scale_inv")[: inverse.shape[0], : inverse.shape[1]] = inverse


def _fill_mx(x: Tensor, quantizer: Any, output: Any) -> None:
    """32 entries of a row share a power of two, in the second copy 32 of a column, which is not transposed:
    ``common/cast/mxfp8/quantize_mxfp8.cuh``. Scales keep their plain order where a GPU swizzles them for cuBLAS."""
    rows = x.float().flatten(0, -2)
    for name, matrix in (("_rowwise", rows), ("_columnwise", rows.t())):
        if (data := getattr(output, f"{name}_data")) is None:
            continue
        blocks = matrix.reshape(matrix.shape[0], -1, MX)
        exponents = exponent_of(amax_of(blocks, 2) * (1 / largest(quantizer.dtype)))
        found = cast(blocks * _reciprocal(exponents)[..., None], quantizer.dtype).view(matrix.shape)
        if name == "_columnwise":
            found, exponents = found.t(), exponents.t()
        data.copy_(found.reshape(data.shape))
        getattr(output, f"{name}_scale_inv")[: exponents.shape[0], : exponents.shape[1]] = exponents


def exponent_of(x: Tensor) -> Tensor:
    """fp32 to E8M0, the next power of two above: ``common/util/ptx_arch_spec.cuh float_to_e8m0``."""
    bits = x.view(torch.int32)
    exponent, mantissa = bits >> 23 & 0xFF, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(x.isinf(), 0xFE, torch.where(x.isnan(), 0xFF, exponent + up))
    return exponent.to(torch.uint8)


def _reciprocal(exponents: Tensor) -> Tensor:
    """``common/util/ptx.cuh exp2f_rcp<float>``; the largest exponent's is a denormal number."""
    return torch.where(exponents == 0xFF, torch.nan, torch.exp2(127.0 - exponents.float()))


def values_of(tensor: Any, *, by_column: bool = False) -> Tensor:
    """fp32 of one copy as the matrix ``[rows, last]``, whichever way the copy lies; an error if there is none."""
    name = kind(tensor)
    data = getattr(tensor, ("_transpose" if by_column else "_data") if name == "tensor" else _copy(by_column))
    if data is None or (name == "tensor" and by_column and tensor._transpose_invalid):
        usage = "column-wise" if by_column else "row-wise"
        raise RuntimeError(f"{type(tensor).__name__} is missing {usage} usage")  # as CanonicalizeGemmInput says
    wide = value(data, tensor._fp8_dtype)
    if name == "tensor":
        return (wide.flatten(1).t() if by_column else wide.flatten(0, -2)) * tensor._scale_inv
    inverse = tensor._columnwise_scale_inv if by_column else tensor._rowwise_scale_inv
    if name == "mx":
        wide = wide.flatten(0, -2)
        powers = torch.exp2(inverse.float() - 127).masked_fill(inverse == 0xFF, torch.nan)
        powers = powers.repeat_interleave(MX, 0 if by_column else 1)
        return wide * powers[: wide.shape[0], : wide.shape[1]]
    wide = wide.flatten(1) if by_column else wide.flatten(0, -2)
    if tensor._is_2D_scaled:
        scale = inverse.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    else:
        scale = inverse.t().repeat_interleave(TILE, 1)
    wide = wide * scale[: wide.shape[0], : wide.shape[1]]
    return wide.t() if by_column else wide


def _copy(by_column: bool) -> str:
    return "_columnwise_data" if by_column else "_rowwise_data"


def dequantize(tensor: Any, dtype: int) -> Tensor:
    """``common/cast/dispatch/dequantize.cuh dequantize_helper``: no blocks, and mxfp8 from capability 10.0 on."""
    if kind(tensor) == "block" or (kind(tensor) == "mx" and device.capability < device.BLACKWELL):
        raise NotImplementedError(f"dequantize of {type(tensor).__name__} on {device.capability}")
    if kind(tensor) == "tensor" and tensor._data is None:
        raise RuntimeError("dequantize reads the row-wise copy of per-tensor FP8, which is not there")
    by_column = kind(tensor) == "mx" and tensor._rowwise_data is None
    return values_of(tensor, by_column=by_column).reshape(tensor.size()).to(TORCH[int(dtype)])


def bgrad_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """``csrc/extensions/bias.cpp bgrad_quantize``: a bias's gradient is the sum over rows."""
    return tensor.detach().float().flatten(0, -2).sum(0).to(tensor.dtype), quantize(tensor, quantizer)


def fp8_transpose(data: Tensor, dtype: int, out: Tensor | None = None) -> Tensor:
    """``csrc/extensions/transpose.cpp fp8_transpose``."""
    return turned(data) if out is None else out.copy_(turned(data))


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """``csrc/extensions/recipe.cpp compute_amax``."""
    amax.copy_(amax_of(tensor))


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, _: torch.device, pin_memory: bool = False
) -> Any:
    """``csrc/extensions/cast.cpp create_empty_quantized_tensor``; whether memory is pinned has no meaning here."""
    return create(quantizer, shape, dtype)


# ---- scales


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: int, margin: float
) -> None:
    """``common/recipe/delayed_scaling.cu amax_and_scale_update_impl::kernel_bulk``.

    The newest entry of a history is line 0 until it is rolled to the end; the oldest, in line 1, counts once more. A
    tensor that has seen nothing but zeros is not rolled and keeps its scale; so does one with an infinite or NaN amax.
    """
    newest_of_all = amaxes.split([len(scale) for scale in scales])
    for given, history, scale in zip(newest_of_all, histories, scales, strict=True):
        newest = torch.where(given != 0, given, history[0])
        rolled = torch.cat([history[1:], newest[None]])
        amax = amax_of(rolled, 0) if algorithm == "max" else newest
        rolled[0] = 0
        history.copy_(torch.where(newest != 0, rolled, history))
        amax = torch.where(newest != 0, amax, 0.0) if algorithm == "max" else amax
        new = largest(dtype) * 2.0**-margin / amax
        new = torch.where(amax.isfinite() & (amax > 0), new, scale)
        scale.copy_(torch.where(new.isinf(), LARGEST_FP32, new))


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], top: float, power_of_two: bool, epsilon: float
) -> None:
    """``common/multi_tensor/compute_scale.cu ComputeScaleAndScaleInvFunctor``."""
    (dtype,) = (number for number in FORMATS if largest(number) == top)
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_of(amax, dtype, epsilon=epsilon, power_of_two=power_of_two))
        inverse.copy_(1 / scale)


def fp8_block_scaling_compute_partial_amax(
    part: Tensor, amax: Tensor, height: int, width: int, start: int, block: int
) -> None:
    """``common/recipe/fp8_block_scaling.cu fp8_block_scaling_compute_partial_amax_kernel``: of every block of a matrix,
    from that part of its entries, in order from ``start``, which this rank's optimizer holds."""
    rows, columns = _blocks(part, start, width, block)
    flat = torch.zeros(amax.numel()).scatter_reduce_(
        0, rows * amax.shape[1] + columns, part.detach().float().abs(), "amax"
    )
    amax.copy_(flat.view_as(amax))


def fp8_block_scaling_partial_cast(
    part: Tensor, out: Tensor, scale: Tensor, height: int, width: int, start: int, block: int, dtype: int
) -> None:
    """``common/recipe/fp8_block_scaling.cu fp8_block_scaling_partial_cast_kernel``."""
    rows, columns = _blocks(part, start, width, block)
    out.view(-1).copy_(cast(part.detach().float() * scale[rows, columns], dtype))


def _blocks(part: Tensor, start: int, width: int, block: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(start, start + part.numel())
    return index // width // block, index % width // block
