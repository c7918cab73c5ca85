"""Who reads whom: the source plan of a Depth-Attention model.

Everything that a layer, a pipeline stage or a memory estimate has to know about cross-layer traffic follows from
four integers and the pipeline cut. It is computed here, once, as a pure function, so that no rank has to be asked
and every rank can check that it holds the same plan.

Layers count from 0. A *source* of layer ``l`` is an earlier layer whose key and mixed value ``l`` attends over; a
source is *live* at ``l`` when some layer at or after ``l`` still reads it. Only live sources are ever kept or sent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property


@dataclass(frozen=True)
class SourcePlan:
    """The sources of every layer and what crosses every pipeline edge.

    Attributes:
        num_layers: layers of the whole model.
        stride: every ``stride``-th layer (0, stride, 2*stride, ...) is a source of all later layers.
        recent_window: the last ``recent_window`` layers are sources as well.
        chunk_starts: index of the first layer of every pipeline chunk, in model order; ``(0,)`` without pipelining.
            With interleaving there is one entry per virtual stage.
    """

    num_layers: int
    stride: int
    recent_window: int = 0
    chunk_starts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(
                f"depth_attention_stride is {self.stride}; it counts layers between sources: set it to 1 or more "
                "(1: every earlier layer), or leave it unset for half the layers."
            )
        if self.recent_window < 0:
            raise ValueError(
                f"depth_attention_recent_window is {self.recent_window}; it counts layers: set it to 0 or more."
            )
        starts = self.chunk_starts
        if (
            not starts
            or starts[0] != 0
            or any(b <= a for a, b in zip(starts, (*starts[1:], self.num_layers), strict=True))
        ):
            raise ValueError(
                f"the pipeline cuts {self.num_layers} layers at {list(starts)}: every chunk must hold at least "
                "one layer; use fewer pipeline or virtual stages, or more layers."
            )

    def sources(self, layer: int) -> tuple[int, ...]:
        """Layers that ``layer`` reads, ascending: every ``stride``-th earlier one and the last ``recent_window``."""
        return tuple(i for i in range(layer) if i % self.stride == 0 or i >= layer - self.recent_window)

    @cached_property
    def _last_reader(self) -> tuple[int, ...]:
        """For each layer, the last layer that reads it (-1: nobody)."""
        last = [-1] * self.num_layers
        for layer in range(self.num_layers):
            for source in self.sources(layer):
                last[source] = layer
        return tuple(last)

    def live(self, layer: int) -> tuple[int, ...]:
        """Sources made before ``layer`` that ``layer`` or a later one still reads, ascending."""
        return tuple(i for i in range(layer) if self._last_reader[i] >= layer)

    def enters_chunk(self, layer: int) -> bool:
        """Whether ``layer`` is the first of a chunk that receives from another."""
        return layer in self.chunk_starts[1:]

    def leaves_chunk(self, layer: int) -> bool:
        """Whether ``layer`` is the last of a chunk that sends to another."""
        return layer + 1 in self.chunk_starts[1:]

    def edges(self) -> tuple[tuple[int, ...], ...]:
        """For every pipeline edge in model order, the sources that cross it."""
        return tuple(self.live(start) for start in self.chunk_starts[1:])

    def digest(self) -> str:
        """A fingerprint that is equal on two ranks exactly if their plans are equal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def default_stride(num_layers: int) -> int:
    """The released models' choice: half the layers, so that no layer has more than two sources."""
    return max(1, num_layers // 2)


def hop_bytes(
    plan: SourcePlan, *, hidden_size: int, source_size: int, tokens: int, bytes_per_element: int
) -> Sequence[int]:
    """Bytes that one micro-batch sends forward over every pipeline edge (backward sends the same again).

    Args:
        hidden_size: numbers per token of the hidden state on one rank.
        source_size: numbers per token of one source on one rank: key and value, ``2 * kv_heads * head_size``.
        tokens: tokens of a micro-batch on one rank.
        bytes_per_element: 4 for fp32, 2 for bf16.
    """
    return [tokens * bytes_per_element * (hidden_size + len(edge) * source_size) for edge in plan.edges()]
