"""The optimizer's kernels over lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale", "multi_tensor_scale_tensor"]
Lists = list[list[Tensor]]


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    decay: float,
) -> None:
    """``common/multi_tensor/adam.cu AdamFunctor`` and ``AdamFunctorMaster``: gradients, parameters, both moments and
    perhaps fp32 parameters. Arithmetic is fp32; mode 0 adds the decay to the gradient, mode 1 to the update."""
    correction1, correction2 = (1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2))
    for g, p, m, v, master in zip(*lists[:4], lists[-1] if len(lists) > 4 else lists[1], strict=True):
        weight, gradient = master.float(), g.float()
        if mode == 0:
            gradient = gradient + decay * weight
        first = beta1 * m.float() + (1 - beta1) * gradient
        second = beta2 * v.float() + (1 - beta2) * gradient * gradient
        change = (first / correction1) / ((second / correction2).sqrt() + epsilon)
        if mode == 1:
            change = change + decay * weight
        for target, new in ((m, first), (v, second), (master, weight - lr * change)):
            target.copy_(new)
        if master is not p:
            p.copy_(master)


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, scale: float | Tensor) -> None:
    """``common/multi_tensor/scale.cu ScaleFunctor``; sets ``noop`` where an input is not finite."""
    for source, target in zip(*lists, strict=True):
        if not source.isfinite().all():
            noop.fill_(1)
        target.copy_(source.float() * scale)


multi_tensor_scale_tensor = multi_tensor_scale
"""``common/multi_tensor/scale.cu``, with the factor on the device."""


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``common/multi_tensor/l2norm.cu L2NormFunctor``; sets ``noop`` where the norm is not finite."""
    (tensors,) = lists
    norms = torch.stack([tensor.detach().float().norm() for tensor in tensors]) if tensors else torch.zeros(1)
    norm = norms.norm().reshape(1)
    if not norm.isfinite():
        noop.fill_(1)
    return norm, norms if per_tensor else None
