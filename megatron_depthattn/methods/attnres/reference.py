"""The arithmetic of Attention Residuals."""

from __future__ import annotations

import torch
from torch import Tensor


def aggregate(
    query: Tensor, norm_weight: Tensor, recency_bias: Tensor, eps: float, stream: Tensor, *snapshots: Tensor
) -> Tensor:
    """Attention over depth: a weighted sum of ``snapshots`` and ``stream``, each ``[..., h]``, in fp32 (fp64 for fp64).

    A score is the product of ``query [h]`` with the normed candidate; the stream's has ``recency_bias [1]`` added.
    Values are the candidates themselves.
    """
    precise = torch.promote_types(stream.dtype, torch.float32)
    direction = query.to(precise) * norm_weight.to(precise)

    def score(candidate: Tensor) -> Tensor:
        wide = candidate.to(precise)
        return (wide @ direction) * torch.rsqrt(wide.square().mean(dim=-1) + eps)

    scores = [score(snapshot) for snapshot in snapshots] + [score(stream) + recency_bias.to(precise)]
    weights = torch.stack(scores, dim=-1).softmax(dim=-1)
    total = weights[..., -1:] * stream.to(precise)
    for index, snapshot in enumerate(snapshots):
        total = total + weights[..., index, None] * snapshot.to(precise)
    return total.to(stream.dtype)
