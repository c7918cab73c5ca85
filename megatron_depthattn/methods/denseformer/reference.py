"""DenseFormer's arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(weights: Tensor, *states: Tensor) -> Tensor:
    """The sum of ``states``, each ``[..., h]``, times the entries of ``weights [n]``; in fp32 (fp64 for fp64)."""
    precise = torch.promote_types(states[0].dtype, torch.float32)
    total = torch.zeros_like(states[0], dtype=precise)
    for weight, state in zip(weights.to(precise), states, strict=True):
        total = total + weight * state.to(precise)
    return total.to(states[0].dtype)
