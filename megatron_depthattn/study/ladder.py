"""One dial for size: the number of layers. Everything else of a rung follows from it by the rules below.

    width      hidden = hidden_per_layer x layers, rounded to a multiple of head_size: constant aspect ratio, so that
               depth and width grow together
    heads      hidden / head_size query heads, rounded to whole groups of heads_per_group, each with one key/value head
    SwiGLU     8/3 x hidden, rounded up to ffn_multiple: as many weights as a plain block of 4 x hidden
    size       N = weights without the embedding table, which is a look-up; the output layer counts. Of the vanilla
               model, for every method of the rung: the methods of a rung are compared at one N
    batch      reference_batch x (N / reference_size)^(2/3) sequences, rounded to a power of two, in micro-batches of
               at most micro_batch
    rate       reference_lr x (N / reference_size)^(-1/3)
    tokens     tokens_per_parameter x N, rounded up to whole steps

The exponents of batch and rate are those that Porian et al. (2024, arXiv:2406.19146) find to bring small models' laws
in line with large ones', as later used for ladders of a few hundred million parameters; both can be set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ladder:
    """The dial's stops and the constants of the rules."""

    layers: list[int] = field(default_factory=list)
    """Layers of the rungs, from the smallest to the largest."""
    hidden_per_layer: float = 24.0
    head_size: int = 32
    heads_per_group: int = 2
    """Query heads of one key/value head."""
    ffn_multiple: int = 32
    reference_size: float = 1e6
    """N at which batch and learning rate are known."""
    reference_batch: float = 16.0
    """Sequences of a global batch there."""
    micro_batch: int = 16
    """Largest micro-batch, a power of two."""
    reference_lr: float = 3e-3
    batch_exponent: float = 2 / 3
    lr_exponent: float = -1 / 3

    def __post_init__(self) -> None:
        if not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 1:
            raise ValueError(
                f"ladder.layers is {self.layers}; list different numbers of layers, ascending, such as [4, 8]"
            )
        for name in ("hidden_per_layer", "reference_size", "reference_batch", "reference_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ladder.{name} is {getattr(self, name)}; set it above 0")

    def shape(self, layers: int) -> dict[str, Any]:
        """The run's keys of the model with so many layers."""
        hidden = max(1, round(self.hidden_per_layer * layers / self.head_size)) * self.head_size
        groups = max(1, round(hidden / (self.head_size * self.heads_per_group)))
        return {
            "model.num_layers": layers,
            "model.hidden_size": hidden,
            "model.num_attention_heads": groups * self.heads_per_group,
            "model.num_query_groups": groups,
            "model.kv_channels": self.head_size,
            "model.ffn_hidden_size": math.ceil(8 * hidden / 3 / self.ffn_multiple) * self.ffn_multiple,
        }

    def recipe(self, size: float) -> dict[str, Any]:
        """The run's keys of batch and learning rate for a model of so many weights."""
        ratio = size / self.reference_size
        batch = 2 ** max(0, round(math.log2(self.reference_batch * ratio**self.batch_exponent)))
        return {
            "train.global_batch_size": batch,
            "train.micro_batch_size": min(batch, self.micro_batch),
            "optimizer.lr": float(f"{self.reference_lr * ratio**self.lr_exponent:.3g}"),
        }
