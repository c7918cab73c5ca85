"""RMSNorm for the local backend: torch's, marked for Megatron's gradient reduction.

Megatron's wrapper of the same torch module rejects sequence parallel because nobody marks the weight. Under
sequence parallel every tensor rank norms another part of the sequence, so the weight's gradient must be summed over
them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` with the constructor that Megatron's specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
