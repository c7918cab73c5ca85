"""The shape of Attention Residuals in block form: which snapshots of the residual stream each layer reads.

The residual stream flows as in a vanilla model. Every ``block_size`` sublayers it is also kept as a snapshot, the
embedding first: the inputs of every `block_layers`-th layer. In place of the stream each sublayer reads an attention
over the snapshots so far and the stream itself, and so does the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_depthattn.methods.definition import CrossLayerMethod, Parameters

SUBLAYERS = ("attention_aggregator", "mlp_aggregator")
FINAL = "final_aggregator"


@dataclass(frozen=True, kw_only=True)
class AttentionResiduals(CrossLayerMethod):
    """``block_size``: sublayers (two a layer) from one snapshot to the next."""

    title: ClassVar[str] = "Attention Residuals"

    block_size: int = 12

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(
                f"model.attnres.block_size is {self.block_size}; it counts sublayers, two a layer: set 1 or more."
            )

    @property
    def block_layers(self) -> int:
        """Layers from one snapshot to the next; snapshots are taken between layers."""
        return -(-self.block_size // 2)

    def snapshots(self, layer: int) -> tuple[int, ...]:
        """The layers whose inputs are the snapshots that ``layer`` finds, its own input included; ``num_layers``: what
        the final norm's aggregator finds."""
        return tuple(range(0, layer + 1, self.block_layers))

    def sources(self, layer: int) -> tuple[int, ...]:
        return tuple(snapshot for snapshot in self.snapshots(layer) if snapshot != layer)

    def layer_parameters(self, layer: int) -> Parameters:
        return {f"{name}.{part}": shape for name in SUBLAYERS for part, shape in self._aggregator().items()}

    def final_parameters(self) -> Parameters:
        return {f"{FINAL}.{part}": shape for part, shape in self._aggregator().items()}

    def _aggregator(self) -> Parameters:
        return {"query": (self.hidden_size,), "norm_weight": (self.hidden_size,), "recency_bias": (1,)}

    def flops(self, layer: int) -> int:
        candidates = len(SUBLAYERS) * (len(self.snapshots(layer)) + 1)
        if self.is_last(layer):
            candidates += len(self.snapshots(layer + 1)) + 1
        return 4 * self.hidden_size * candidates  # a score and a weighted sum
