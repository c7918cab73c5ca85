"""FP8 matrix products emulated in local layers, so that the checks of FP8 run on CPU too.

Per-tensor current scaling, as the recipe `tensorwise`: inputs and weights to E4M3, gradients to E5M2, products in the
layer's own dtype. It says how large the error of rounding is; it proves nothing about kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as an FP8 ``dtype`` would hold it, the largest entry scaled to the largest number."""
    scale = torch.finfo(dtype).max / x.abs().max().clamp(min=1e-30).float()
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = rounded(x, torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = rounded(grad, torch.float8_e5m2)
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


def emulate(linear: torch.nn.Module) -> None:
    """Let one of Megatron's local linear layers compute in emulated FP8, and say so as TransformerEngine's do."""
    linear._forward_impl = lambda input, weight, **_: _Product.apply(input, weight)
    linear.fp8 = True
