"""Depth-Attention mixing that keeps nothing for backward but its own inputs.

Plain autograd on the formula (reference.py) keeps fp32 copies of the query mean and of every source's keys
and values: in bf16 training twice the memory of the sources themselves, in every layer. The inputs are
mostly alive anyway: the layer stack keeps the sources and, when the mix is called after RoPE, attention
keeps q and k. The scores cost 2 * n * G * d multiplications a token, so the backward pass computes scores
and weights again, and the gradients explicitly. With c_i the scores, a the weights and g = dL/dvmix:

    dv_i  = a_i * g                     da_i = g . v_i
    dc_i  = a_i * (da_i - sum_j a_j da_j)
    dk_i  = scale * dc_i * qbar         dqbar = scale * sum_i dc_i * k_i
    dq_h  = dqbar / (H / G)             for each query head h of the group

Shapes and precision are those of reference.py. Sources are visited one at a time: besides results, the
largest temporaries are a few [..., G, d] tensors in fp32, whatever the number of sources.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_depthattn.ops.reference import compute_dtype

_T = TypeVar("_T")


def depth_mix_lean(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Mix a layer's values with those of its source layers, saving only the given tensors for backward.

    Args:
        q: queries [..., H, d].
        keys: one key tensor [..., G, d] per source layer.
        values: one mixed value tensor [..., G, d] per source layer, in the order of `keys`.
        k: the layer's own keys [..., G, d].
        v: the layer's own values [..., G, d].
        scale: factor of the scores, normally 1 / sqrt(d).

    Returns:
        The mixed values [..., G, d] in v's dtype, a new tensor; without a source, `v` itself.

    Raises:
        RuntimeError: from autograd, when a second derivative is asked for, or when an input was changed in
            place between forward and backward.
    """
    if not keys:
        return v
    return cast(Tensor, _LeanDepthMix.apply(scale, q, *keys, k, *values, v))


class _LeanDepthMix(torch.autograd.Function):
    """`apply(scale, q, *keys, *values)`: here the layer itself is simply the last candidate of both lists."""

    @staticmethod
    def forward(ctx: Any, scale: float, q: Tensor, *candidates: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, *candidates)
        keys, values = _split(candidates)
        v = values[-1]
        weights = _weights(_group_mean(q, like=v), keys, scale)
        mixed = weights[..., -1:] * v
        for i, value in enumerate(values[:-1]):
            mixed.addcmul_(weights[..., i : i + 1], value)
        return mixed.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
        q, *candidates = ctx.saved_tensors
        keys, values = _split(candidates)
        _, needs_q, *needs_candidates = ctx.needs_input_grad
        needs_key, needs_value = _split(needs_candidates)

        qbar = _group_mean(q, like=values[-1])
        weights = _weights(qbar, keys, ctx.scale)
        grad = grad_mixed.to(qbar.dtype)
        grad_values = [
            (weights[..., i : i + 1] * grad).to(value.dtype) if needs else None
            for i, (value, needs) in enumerate(zip(values, needs_value, strict=True))
        ]
        if not (needs_q or any(needs_key)):
            return None, None, *(None for _ in keys), *grad_values

        grad_weights = _dot_each(grad, values)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))
        grad_scores *= ctx.scale
        grad_keys = [
            (grad_scores[..., i : i + 1] * qbar).to(key.dtype) if needs else None
            for i, (key, needs) in enumerate(zip(keys, needs_key, strict=True))
        ]
        grad_q = _grad_q(q, keys, grad_scores) if needs_q else None
        return None, grad_q, *grad_keys, *grad_values


def _split(candidates: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
    """The first half belongs to the keys, the second half to the values."""
    num_candidates = len(candidates) // 2
    return candidates[:num_candidates], candidates[num_candidates:]


def _group_mean(q: Tensor, like: Tensor) -> Tensor:
    """Mean query [..., G, d] of each KV group, in the computing dtype; q [..., H, d], `like` [..., G, d]."""
    num_groups = like.shape[-2]
    heads = torch.unflatten(q, -2, (num_groups, q.shape[-2] // num_groups))
    return heads.mean(dim=-2, dtype=compute_dtype(q, like))


def _dot_each(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Dot products over d of x [..., G, d] with each of n tensors [..., G, d]: [..., G, n], in x's dtype."""
    return torch.stack([(x * other).sum(dim=-1) for other in others], dim=-1)


def _weights(qbar: Tensor, keys: Sequence[Tensor], scale: float) -> Tensor:
    """Softmax weights [..., G, n + 1] of the candidates with the given keys."""
    return _dot_each(qbar, keys).mul_(scale).softmax(dim=-1)


def _grad_q(q: Tensor, keys: Sequence[Tensor], grad_scores: Tensor) -> Tensor:
    """Gradient of q [..., H, d] from that of the dot products qbar . k_i [..., G, n + 1]."""
    grad_qbar = grad_scores[..., :1] * keys[0]
    for i, key in enumerate(keys[1:], start=1):
        grad_qbar.addcmul_(grad_scores[..., i : i + 1], key)
    heads_per_group = q.shape[-2] // grad_qbar.shape[-2]
    return grad_qbar.div_(heads_per_group).to(q.dtype).repeat_interleave(heads_per_group, dim=-2)
