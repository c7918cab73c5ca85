"""The arithmetic of manifold-constrained hyper-connections. ``n`` streams lie side by side: ``[..., n * h]``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Sums are divided by no less."""


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Nearly doubly stochastic matrices ``[..., n, n]``: rows and columns in turn divided by their sums."""
    matrix = (logits - logits.amax(dim=(-2, -1), keepdim=True)).exp().clamp(min=SMALLEST)
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-1, keepdim=True).clamp(min=SMALLEST)
        matrix = matrix / matrix.sum(dim=-2, keepdim=True).clamp(min=SMALLEST)
    return matrix


def connect(
    streams: Tensor, weights: Mapping[str, Tensor], *, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a sublayer reads, and how its output is written back.

    Args:
        streams: ``[..., n * h]``.
        weights: of one connector, by the names of the method's definition.

    Returns:
        The sublayer's input ``[..., h]`` in the streams' dtype; the weight of its output for every stream ``[..., n]``
        and the mixing of the streams ``[..., n, n]``, in fp32 (fp64 for fp64).
    """
    precise = torch.promote_types(streams.dtype, torch.float32)
    own = {name: weight.to(precise) for name, weight in weights.items()}
    n = own["pre_bias"].numel()
    wide = streams.to(precise)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * own["norm_weight"]
    pre, post, residual = (normed @ own["projection"].T).split([n, n, n * n], dim=-1)
    read = torch.sigmoid(own["pre_scale"] * pre + own["pre_bias"])
    write = 2 * torch.sigmoid(own["post_scale"] * post + own["post_bias"])
    mix = sinkhorn((own["residual_scale"] * residual + own["residual_bias"]).unflatten(-1, (n, n)), iterations)
    return weighted_streams(streams, read), write, mix


def weighted_streams(streams: Tensor, weights: Tensor) -> Tensor:
    """The sum ``[..., h]`` of the streams ``[..., n * h]``, each times its entry of ``weights [..., n]`` (in fp32)."""
    parts = streams.to(weights.dtype).unflatten(-1, (weights.size(-1), -1))
    return (weights.unsqueeze(-1) * parts).sum(dim=-2).to(streams.dtype)


def write_back(streams: Tensor, output: Tensor, write: Tensor, mix: Tensor) -> Tensor:
    """The next streams: ``R_i = sum_j mix[i, j] R_j + write[i] * output``, with ``output [..., h]``."""
    parts = streams.to(mix.dtype).unflatten(-1, (mix.size(-1), -1))
    following = mix @ parts + write.unsqueeze(-1) * output.to(mix.dtype).unsqueeze(-2)
    return following.flatten(-2).to(streams.dtype)
