"""What the rest of the stack has to know of a method whose layers share more than the hidden state.

Pure: integers in, integers and names out. Pipeline messages, memory, parameter counts, operations and the names of
exported weights follow from it.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from math import prod
from typing import ClassVar

Shape = tuple[int, ...]
Parameters = dict[str, Shape]
"""Shapes by name, relative to the layer or to the model."""


@dataclass(frozen=True, kw_only=True)
class CrossLayerMethod(ABC):
    """A method on a model of a given size. Layers count from 0.

    A layer may leave its input to later layers: it is then a *source* of theirs. Between two layers flow
    ``num_streams`` hidden states, one for most methods.
    """

    title: ClassVar[str]
    """The method's name in sentences."""

    num_layers: int
    hidden_size: int

    @property
    def num_streams(self) -> int:
        """Hidden states that flow from layer to layer."""
        return 1

    def sources(self, layer: int) -> tuple[int, ...]:
        """Earlier layers whose inputs ``layer`` reads, ascending."""
        return ()

    def layer_parameters(self, layer: int) -> Parameters:
        """What the method adds to ``layer``."""
        return {}

    def final_parameters(self) -> Parameters:
        """What it adds behind the last layer; the last layer holds them."""
        return {}

    def flops(self, layer: int) -> int:
        """Operations per token that the method adds to ``layer``, and behind the last one to the last.

        A multiplication with its addition counts as two; norms, activations and softmax are not counted, as elsewhere.
        """
        return 0

    @property
    def num_parameters(self) -> int:
        """Weights that the method adds to the vanilla model."""
        tables = [self.layer_parameters(layer) for layer in range(self.num_layers)] + [self.final_parameters()]
        return sum(prod(shape) for table in tables for shape in table.values())

    @property
    def total_flops(self) -> int:
        """Operations per token that the method adds to a forward pass."""
        return sum(self.flops(layer) for layer in range(self.num_layers))

    def is_last(self, layer: int) -> bool:
        """Whether ``layer`` is the model's last."""
        return layer == self.num_layers - 1
