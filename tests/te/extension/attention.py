"""What TransformerEngine's unfused attention calls; no fused attention is stood in for, so none is chosen."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

__all__ = [
    *("scaled_softmax_forward", "scaled_softmax_backward"),
    *("scaled_masked_softmax_forward", "scaled_masked_softmax_backward"),
    *("convert_thd_to_bshd", "convert_bshd_to_thd", "get_fused_attn_backend", "get_cudnn_version"),
]
MASKED = -10000.0
Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
)
"""``common/include/transformer_engine/fused_attn.h``."""


def scaled_softmax_forward(x: Tensor, scale: float) -> Tensor:
    """``common/fused_softmax/scaled_masked_softmax.cu scaled_softmax_warp_forward``: fp32, rounded to the dtype."""
    return (x.detach().float() * scale).softmax(-1).to(x.dtype)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``common/fused_softmax/scaled_masked_softmax.cu scaled_masked_softmax_warp_forward``: what is masked counts as
    -10000, and a row with nothing else is zero."""
    scores = (x.detach().float() * scale).masked_fill(mask.bool(), MASKED)
    found = scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True) == MASKED, 0.0)
    return found.to(x.dtype)


def scaled_softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    """``common/fused_softmax/scaled_masked_softmax.cu scaled_masked_softmax_warp_backward``."""
    wide, p = grad.float(), y.float()
    return (scale * p * (wide - (wide * p).sum(-1, keepdim=True))).to(y.dtype)


scaled_masked_softmax_backward = scaled_softmax_backward


def convert_thd_to_bshd(tensor: Tensor, borders: Tensor, batch: int, length: int) -> Tensor:
    """``common/fused_attn/kv_cache.cu`` and ``csrc/extensions/attention.cpp``: documents ``[t, ...]`` as rows
    ``[b, s, ...]``, zero behind their ends."""
    parts = tensor.detach()[: int(borders[-1])].split(borders.diff().tolist())
    out = tensor.new_zeros(batch, int(length), *tensor.shape[1:])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


def convert_bshd_to_thd(tensor: Tensor, borders: Tensor, total: int) -> Tensor:
    """The way back."""
    rows = [row[:length] for row, length in zip(tensor.detach(), borders.diff().tolist(), strict=True)]
    out = tensor.new_zeros(int(total), *tensor.shape[2:])
    out[: int(borders[-1])] = torch.cat(rows)
    return out


def get_fused_attn_backend(*_: Any, **__: Any) -> tuple[Any, str]:
    """``csrc/extensions/attention.cpp get_fused_attn_backend``, with the answer of a machine that has none."""
    return Backend["NVTE_No_Backend"], "no fused attention is stood in for"


def get_cudnn_version() -> int:
    """``csrc/extensions/misc.cpp``: 9.15."""
    return 91500
