"""RMSNorm and rotary positions. Arithmetic is fp32, results have the input's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te.extension.casts import TORCH, quantized

__all__ = ["fused_rope_backward", "fused_rope_forward", "rmsnorm_bwd", "rmsnorm_bwd_add", "rmsnorm_fwd"]


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: int, sm_margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    """``csrc/extensions/normalization.cpp rmsnorm_fwd``, ``common/normalization/rmsnorm/rmsnorm_fwd_kernels.cuh``.

    Delayed scaling casts the fp32 result (``FULLY_FUSED``); other recipes cast what was rounded to ``dtype`` before.
    """
    wide = x.detach().float()
    scale = (wide.square().mean(-1) + eps).rsqrt()
    normed = wide * scale[:, None] * (weight.detach().float() + zero_centered)
    as_type = TORCH[int(dtype)]
    if quantizer is None:
        normed = normed.to(as_type)
        return (normed if out is None else out.copy_(normed)), None, scale
    if not hasattr(quantizer, "scale"):
        normed = normed.to(as_type)
    return quantized(normed, quantizer, out, as_type), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """``common/normalization/rmsnorm/rmsnorm_bwd_kernels.cuh``: gradients of input and weight."""
    dx, dw = _backward(grad, x, scale, weight, zero_centered)
    return dx.to(x.dtype), dw


def rmsnorm_bwd_add(
    grad: Tensor, x: Tensor, add: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """The same kernel, with another gradient of the input added before it is rounded."""
    dx, dw = _backward(grad, x, scale, weight, zero_centered)
    return (dx + add.float()).to(x.dtype), dw


def _backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, zero_centered: bool) -> tuple[Tensor, Tensor]:
    wide, hat = grad.detach().float(), x.detach().float() * scale[:, None]
    inner = wide * (weight.detach().float() + zero_centered)
    dx = scale[:, None] * (inner - hat * (inner * hat).mean(-1, keepdim=True))
    return dx, (wide * hat).sum(0).to(weight.dtype)


def fused_rope_forward(x: Tensor, angles: Tensor, *rest: Any) -> Tensor:
    """``common/fused_rope/fused_rope.cu fused_rope_block_forward``: halves of the first dimensions turn by an angle."""
    return _turned(x, angles.float().cos(), angles.float().sin(), *rest)


def fused_rope_backward(grad: Tensor, angles: Tensor, *rest: Any) -> Tensor:
    """``common/fused_rope/fused_rope.cu fused_rope_block_backward``: the same angle back; both halves share it."""
    return _turned(grad, angles.float().cos(), -angles.float().sin(), *rest)


def _turned(
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    borders: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Of ``[s, b, h, d]``, or of ``[t, h, d]`` whose documents begin at ``borders``, each at position 0."""
    if start_positions is not None or interleaved or cp_size != 1:
        raise NotImplementedError(
            "RoPE from other positions, interleaved or under context parallel is not stood in for"
        )
    size = cosine.shape[-1]
    wide, rest = x.detach()[..., :size].float(), x.detach()[..., size:]
    if borders is None:
        cosine, sine = cosine[: len(x)], sine[: len(x)]
    else:
        lengths = borders.diff().tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        cosine, sine = cosine[positions][:, 0], sine[positions][:, 0]
    first, second = wide.chunk(2, -1)
    found = wide * cosine + torch.cat((-second, first), -1) * sine
    return torch.cat((found.to(x.dtype), rest), -1)
