"""Depth-Attention mixing, written as its formula: what every other implementation is tested against.

Method: arXiv:2606.05014. For one token and one key/value head j, with S the source layers of layer l:

    qbar    = mean of the queries of the heads that share KV head j
    score_i = scale * qbar . k_i                    for i in S, and for the layer itself
    a       = softmax of the scores
    vmix    = sum over S of a_i * vmix_i + a_l * v_l

An ablation of the paper weighs all alike, a_i = 1 / (n + 1) with n = |S|: `uniform_mix`. Others mix keys in place of
values, or both, with the same weights, always of unmixed keys:

    kmix    = sum over S of a_i * kmix_i + a_l * k_l

which is a call with the `kmix_i` of the sources for `values` and the layer's `k` for `v` (beside, as ever, for `k`).

Shapes: H query heads, G key/value heads (H a multiple of G), d head size, n sources; "..." is any leading
shape, such as [sequence, batch], the same for all tensors. Query head h belongs to KV head h // (H / G).

Numbers: everything between inputs and output is computed in fp32 (fp64 when an input is fp64), and the
output is rounded once. The mix of a layer is a source of later layers, so an error made here is passed on
along the depth. Scores are elementwise products and a sum, not a matrix product: TF32 and autocast leave
their precision alone.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor


def compute_dtype(q: Tensor, v: Tensor) -> torch.dtype:
    """Dtype of everything between inputs and output: fp64 when q or v is fp64, else fp32."""
    return torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)


@overload
def depth_mix_reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    return_weights: Literal[False] = False,
) -> Tensor: ...


@overload
def depth_mix_reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def depth_mix_reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix a layer's values with those of its source layers; gradients by plain autograd.

    Args:
        q: queries [..., H, d], all normed and either all before or all after RoPE, like every key.
        keys: one key tensor [..., G, d] per source layer.
        values: one mixed value tensor [..., G, d] per source layer, in the order of `keys`.
        k: the layer's own keys [..., G, d].
        v: the layer's own values [..., G, d].
        scale: factor of the scores, normally 1 / sqrt(d).
        return_weights: also return the softmax weights.

    Returns:
        The mixed values [..., G, d] in v's dtype; without a source, `v` itself. With `return_weights` also
        the weights [..., G, n + 1] in fp32 (fp64 for fp64 inputs): sources in order, then the layer.
    """
    dtype = compute_dtype(q, v)
    if not keys:
        return (v, torch.ones_like(v[..., :1], dtype=dtype)) if return_weights else v

    num_groups = k.shape[-2]
    heads_per_group = q.shape[-2] // num_groups
    qbar = torch.unflatten(q.to(dtype), -2, (num_groups, heads_per_group)).mean(dim=-2)  # [..., G, d]
    candidate_keys = torch.stack([key.to(dtype) for key in (*keys, k)], dim=-2)  # [..., G, n + 1, d]
    candidate_values = torch.stack([value.to(dtype) for value in (*values, v)], dim=-2)  # [..., G, n + 1, d]

    scores = scale * (qbar.unsqueeze(-2) * candidate_keys).sum(dim=-1)  # [..., G, n + 1]
    weights = scores.softmax(dim=-1)
    mixed = (weights.unsqueeze(-1) * candidate_values).sum(dim=-2).to(v.dtype)
    return (mixed, weights) if return_weights else mixed


def uniform_mix(states: Sequence[Tensor], own: Tensor) -> Tensor:
    """Average a layer's state with those of its source layers; autograd keeps nothing for backward.

    Args:
        states: one mixed state [..., G, d] per source layer.
        own: the layer's own [..., G, d].

    Returns:
        The mixed state [..., G, d] in own's dtype; without a source, `own` itself.
    """
    if not states:
        return own
    dtype = compute_dtype(own, own)
    total = sum((state.to(dtype) for state in states), start=own.to(dtype))
    return (total / (len(states) + 1)).to(own.dtype)
