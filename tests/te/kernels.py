"""The kernels that a decoder in bf16 and delayed FP8 scaling calls, in plain torch: TransformerEngine trains on CPU.

Signatures and results are those that TransformerEngine's Python expects of its extension (2.20, on Hopper). They prove
nothing about the extension itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

FORMATS = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}
DTYPES = {4: torch.float32, 6: torch.bfloat16, **FORMATS}


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """A context in which the stand-in of the extension computes, and tensors on the CPU pass for tensors on a GPU."""
    from transformer_engine.pytorch import cpp_extensions
    from transformer_engine.pytorch.ops.basic import rmsnorm

    own = {name: value for name, value in globals().items() if name in KERNELS}
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="stand-in", total_memory=80 << 30)
    with contextlib.ExitStack() as stack:
        for module in (sys.modules["transformer_engine_torch"], cpp_extensions):  # the second took what the first had
            stack.enter_context(patch.multiple(module, create=True, layernorm_fwd=None, layernorm_bwd=None, **own))
        stack.enter_context(patch.multiple(rmsnorm, rmsnorm_fwd=rmsnorm_fwd, rmsnorm_bwd=rmsnorm_bwd))
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", property(lambda _: True)))
        stack.enter_context(patch("torch.cuda.device", lambda *_: contextlib.nullcontext()))
        stack.enter_context(patch("torch.cuda.get_device_properties", lambda *_: properties))
        yield


def _bytes(wide: Tensor, dtype: int) -> Tensor:
    largest = torch.finfo(FORMATS[dtype]).max
    return wide.clamp(-largest, largest).to(FORMATS[dtype]).view(torch.uint8)


def _turned(data: Tensor) -> Tensor:
    return data.flatten(0, -2).t().contiguous().view(data.shape[-1], *data.shape[:-1])


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    return _quantize(tensor.detach(), quantizer, output, tensor.dtype)


def _quantize(x: Tensor, quantizer: Any, output: Any, dtype: torch.dtype) -> Any:
    """With the scale of the passes before; the largest entry goes into the newest line of the history."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    wide, scale = x.float(), quantizer.scale.reshape(())
    quantizer.amax.copy_(torch.maximum(quantizer.amax, wide.abs().max()))
    data = _bytes(wide * scale, int(quantizer.dtype))
    turned = _turned(data) if quantizer.columnwise_usage else None
    if output is None:
        parts = {"data": data if quantizer.rowwise_usage else None, "data_transpose": turned, "quantizer": quantizer}
        parts |= {"fp8_scale_inv": (1 / scale).reshape(1), "fp8_dtype": quantizer.dtype}
        if quantizer.internal:
            return Float8TensorStorage(fake_dtype=dtype, **parts)
        return Float8Tensor(shape=x.shape, dtype=dtype, device=x.device, **parts)
    output._data = data if output._data is None else output._data.copy_(data.view_as(output._data))
    output._scale_inv.copy_(1 / scale)
    output._transpose, output._transpose_invalid = turned, turned is None
    return output


def dequantize(tensor: Any, dtype: int) -> Tensor:
    return _value(tensor._data, tensor).to(DTYPES[int(dtype)])


def _value(data: Tensor, tensor: Any) -> Tensor:
    return data.view(FORMATS[int(tensor._fp8_dtype)]).float() * tensor._scale_inv


def bgrad_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return tensor.flatten(0, -2).sum(0), quantize(tensor, quantizer)


def fp8_transpose(data: Tensor, dtype: int, out: Tensor | None = None) -> Tensor:
    return _turned(data) if out is None else out.copy_(_turned(data))


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: int, margin: float
) -> None:
    """Roll the histories; a scale follows from the largest entry of its whole history."""
    for given, history, scale in zip(amaxes.split([len(s) for s in scales]), histories, scales, strict=True):
        history[0] = given
        largest = history.amax(0)
        history.copy_(history.roll(-1, 0))
        history[0] = 0
        found = (largest > 0) & largest.isfinite()
        scale.copy_(torch.where(found, torch.finfo(FORMATS[int(dtype)]).max / largest / 2**margin, scale))


def generic_gemm(
    a: Any, turn_a: bool, b: Any, turn_b: bool, out: Tensor | None, quantizer: Any, dtype: Any, *rest: Any, **_: Any
) -> tuple[Any, None, None, None]:
    """``b @ a`` of row-major matrices, each perhaps transposed; ``rest[7]``: whether to add to ``out``."""
    x, y = _matrix(a, by_row=turn_a), _matrix(b, by_row=not turn_b)
    product = (y.t() if turn_b else y) @ (x.t() if turn_a else x)
    if not turn_b:
        product = product.view(*b.size()[:-1], -1)
    if out is not None:
        return out.copy_(out.float() + product if rest[7] else product.view_as(out)), None, None, None
    return product.to(DTYPES[int(dtype)]), None, None, None


def _matrix(operand: Any, *, by_row: bool) -> Tensor:
    """From the copy that Hopper's kernels read: FP8 is multiplied along rows alone."""
    if isinstance(operand, Tensor) and not hasattr(operand, "_scale_inv"):
        return operand.detach().float().flatten(0, -2)
    if by_row:
        return _value(operand._data, operand).flatten(0, -2)
    assert operand._transpose is not None and not operand._transpose_invalid, "no transposed copy"
    return _value(operand._transpose, operand).flatten(1).t()


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, *_: Any
) -> tuple[Any, None, Tensor]:
    wide = x.detach().float()
    scale = (wide.square().mean(-1) + eps).rsqrt()
    normed = wide * scale[:, None] * weight.detach().float()
    as_type = DTYPES[int(dtype)]
    return normed.to(as_type) if quantizer is None else _quantize(normed, quantizer, out, as_type), None, scale


def rmsnorm_bwd(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    hat = x.detach().float() * scale[:, None]
    inner = grad.float() * weight.detach().float()
    dx = scale[:, None] * (inner - hat * (inner * hat).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad.float() * hat).sum(0).to(weight.dtype)


def fused_rope_forward(x: Tensor, angles: Tensor, *_: Any) -> Tensor:
    return _rotated(x, angles.cos(), angles.sin())


def fused_rope_backward(grad: Tensor, angles: Tensor, *_: Any) -> Tensor:
    return _rotated(grad, angles.cos(), -angles.sin())


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.detach().float().chunk(2, -1)
    length = len(x)
    return (x.float() * cosine[:length] + torch.cat((-second, first), -1) * sine[:length]).to(x.dtype)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (x.float() * scale).masked_fill(mask.bool(), -10000.0).softmax(-1).to(x.dtype)


def scaled_masked_softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    grad, p = grad.float(), y.float()
    return (scale * p * (grad - (grad * p).sum(-1, keepdim=True))).to(y.dtype)


def get_fused_attn_backend(*_: Any, **__: Any) -> tuple[Any, str]:
    return sys.modules["transformer_engine_torch"].NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no GPU"


def get_cudnn_version() -> int:
    return 91500


KERNELS = (
    *("quantize", "dequantize", "bgrad_quantize", "fp8_transpose", "fused_amax_and_scale_update_after_reduction"),
    *("generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd", "fused_rope_forward", "fused_rope_backward"),
    *("scaled_masked_softmax_forward", "scaled_masked_softmax_backward", "get_fused_attn_backend"),
    "get_cudnn_version",
)
