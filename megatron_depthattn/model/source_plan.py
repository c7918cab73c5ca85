"""Who reads whom: the source plan of a model whose layers share more than the hidden state.

Everything that a layer, a pipeline stage or a memory estimate has to know about cross-layer traffic follows from
a few integers and the pipeline cut. It is computed here, once, as a pure function, so that no rank has to be asked
and every rank can check that it holds the same plan.

Layers count from 0. A *source* of layer ``l`` is an earlier layer that left something for ``l`` to read: with
Depth-Attention its key and mixed value, with other methods its input. The model is cut into chunks; chunk ``c`` runs
on pipeline rank ``c % num_ranks``. A rank that once received or made a source keeps it while one of its chunks still
has to read it, so a source crosses the boundary between two ranks at most once in a micro-batch, and only if some
rank behind that boundary reads it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any


class CrossLayerPlan(ABC):
    """The sources of every layer and what crosses every pipeline edge; a frozen dataclass with these fields.

    Attributes:
        num_layers: layers of the whole model.
        kinds: what a source leaves to later layers: names of one tensor each.
        chunk_starts: index of the first layer of every pipeline chunk, in model order; ``(0,)`` without pipelining.
            With interleaving there is one entry per virtual stage. The first chunk may hold the embedding alone, and
            the last the output layer alone: the chunk behind then starts at 0, and the last at ``num_layers``.
        num_ranks: pipeline ranks, which take turns at the chunks; None: every chunk has a rank of its own.
    """

    num_layers: int
    chunk_starts: tuple[int, ...]
    num_ranks: int | None
    kinds: tuple[str, ...]

    @abstractmethod
    def sources(self, layer: int) -> tuple[int, ...]:
        """Layers that ``layer`` reads, ascending."""

    def __post_init__(self) -> None:
        starts = self.chunk_starts
        sizes = [end - start for start, end in pairwise((*starts, self.num_layers))]
        if not starts or starts[0] != 0 or min(sizes) < 0 or 0 in sizes[1:-1]:
            raise ValueError(
                f"the pipeline cuts {self.num_layers} layers at {list(starts)}: every chunk must hold at least "
                "one layer, but for that of the embedding and that of the loss; use fewer pipeline or virtual stages, "
                "or more layers."
            )
        if self.num_ranks is not None and (self.num_ranks < 1 or len(starts) % self.num_ranks):
            raise ValueError(
                f"{self.num_ranks} pipeline ranks cannot take turns at {len(starts)} chunks: every rank must hold the "
                "same number of chunks."
            )

    @cached_property
    def _readers(self) -> tuple[tuple[int, ...], ...]:
        """For each layer, the layers that read it."""
        readers: list[list[int]] = [[] for _ in range(self.num_layers)]
        for layer in range(self.num_layers):
            for source in self.sources(layer):
                readers[source].append(layer)
        return tuple(map(tuple, readers))

    @cached_property
    def _chunks(self) -> tuple[int, ...]:
        """For each layer, its chunk."""
        return tuple(bisect_right(self.chunk_starts, layer) - 1 for layer in range(self.num_layers))

    def _ranks_between(self, earlier: int, later: int) -> int:
        """Boundaries between ranks that lie on the way from chunk ``earlier`` to the rank of chunk ``later``."""
        return (later - earlier) % (self.num_ranks or len(self.chunk_starts))

    def chunk_of(self, layer: int) -> int:
        """The chunk that holds ``layer``."""
        return self._chunks[layer]

    def entering(self, chunk: int) -> tuple[int, ...]:
        """Sources that ``chunk`` receives from the chunk before it, ascending: new to its rank, and read there or on a
        rank further on."""

        def enters(source: int) -> bool:
            made = self._chunks[source]
            distance = self._ranks_between(made, chunk)
            if distance != chunk - made:  # the rank has had it since an earlier chunk
                return False
            return any(self._ranks_between(made, self._chunks[reader]) >= distance for reader in self._readers[source])

        return tuple(source for source in range(self.chunk_starts[chunk]) if enters(source))

    def held(self, layer: int) -> tuple[int, ...]:
        """Sources that the rank of ``layer`` keeps once ``layer`` has run and, as the last of its chunk, has sent.

        Ascending; those that a later layer of the chunk or a later chunk of the rank reads, or that the chunk's last
        layer has yet to send.
        """
        chunk = self._chunks[layer]
        sends = chunk + 1 < len(self.chunk_starts) and not self.leaves_chunk(layer)
        to_be_sent = self.entering(chunk + 1) if sends else ()

        def is_held(source: int) -> bool:
            readers = (reader for reader in self._readers[source] if reader > layer)
            return source in to_be_sent or any(self._ranks_between(chunk, self._chunks[r]) == 0 for r in readers)

        return tuple(filter(is_held, range(layer + 1)))

    def kept(self, chunk: int) -> tuple[int, ...]:
        """Sources that the rank of ``chunk`` keeps for its later chunks, ascending."""
        end = (*self.chunk_starts[1:], self.num_layers)[chunk]
        return self.held(end - 1)

    def is_inside(self, chunk: int) -> bool:
        """Whether ``chunk`` has layers before and behind its start; else the embedding or the model's output enters."""
        return 0 < self.chunk_starts[chunk] < self.num_layers

    def enters_chunk(self, layer: int) -> bool:
        """Whether ``layer`` is the first of a chunk that receives from another."""
        return layer in self.chunk_starts[1:]

    def leaves_chunk(self, layer: int) -> bool:
        """Whether ``layer`` is the last of a chunk that sends to another."""
        return layer + 1 in self.chunk_starts[1:]

    def edges(self) -> tuple[tuple[int, ...], ...]:
        """For every pipeline edge in model order, the sources that cross it."""
        return tuple(self.entering(chunk) for chunk in range(1, len(self.chunk_starts)))

    def digest(self) -> str:
        """A fingerprint that is equal on two ranks exactly if their plans are equal."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SourcePlan(CrossLayerPlan):
    """Depth-Attention's plan.

    Attributes:
        stride: every ``stride``-th layer (0, stride, 2*stride, ...) is a source of all later layers.
        recent_window: the last ``recent_window`` layers are sources as well.
        layers_per_loop: of a looped model whose stride and window count the layers of one loop; a layer's sources are
            then those of its own loop, and the same layer in every earlier loop. None: one loop, or they count through
            all of them.
    """

    num_layers: int
    stride: int
    recent_window: int = 0
    chunk_starts: tuple[int, ...] = (0,)
    num_ranks: int | None = None
    layers_per_loop: int | None = None
    kinds: tuple[str, ...] = ("key", "value")

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
        super().__post_init__()

    def sources(self, layer: int) -> tuple[int, ...]:
        """Its earlier selves, then every ``stride``-th earlier layer of the loop and the last ``recent_window``."""
        per_loop = self.layers_per_loop or self.num_layers
        start = layer - layer % per_loop
        own_loop = (i for i in range(start, layer) if (i - start) % self.stride == 0 or i >= layer - self.recent_window)
        return (*range(layer % per_loop, start, per_loop), *own_loop)


@dataclass(frozen=True)
class ListedPlan(CrossLayerPlan):
    """The plan of any other method.

    Attributes:
        reads: for every layer the layers that it reads, ascending.
    """

    reads: tuple[tuple[int, ...], ...]
    chunk_starts: tuple[int, ...] = (0,)
    num_ranks: int | None = None
    kinds: tuple[str, ...] = ("input",)

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        return len(self.reads)

    def sources(self, layer: int) -> tuple[int, ...]:
        return self.reads[layer]


def source_kinds(weights: str, mixes: str) -> tuple[str, ...]:
    """What a Depth-Attention layer leaves to later ones: the key that scores it, if any does, and what they mix."""
    mixed = {"value": ("value",), "key": ("mixed_key",), "key_value": ("mixed_key", "value")}[mixes]
    return mixed if weights == "uniform" else ("key", *mixed)


def default_stride(num_layers: int, num_loops: int = 1, loop_sources: str = "same_layer") -> int:
    """The released models' choice: half the layers that it counts, so that no layer reads more than two of them.

    Args:
        num_layers: of one loop.
        loop_sources: "same_layer" counts those of one loop, "unrolled" those of all.
    """
    return max(1, num_layers * (num_loops if loop_sources == "unrolled" else 1) // 2)


def hop_bytes(
    plan: CrossLayerPlan,
    *,
    hidden_size: int,
    source_size: int,
    tokens: int,
    bytes_per_element: int,
    num_streams: int = 1,
) -> Sequence[int]:
    """Bytes that one micro-batch sends forward over every pipeline edge (backward sends the same again).

    Args:
        hidden_size: elements per token of the hidden state on one rank.
        source_size: elements per token of one source on one rank, all its kinds together; of Depth-Attention's key and
            value ``2 * kv_heads * head_size``.
        tokens: tokens of a micro-batch on one rank.
        bytes_per_element: 4 for fp32, 2 for bf16.
        num_streams: hidden states that flow from layer to layer; the embedding and the model's output are one.
    """
    streams = (num_streams if plan.is_inside(chunk) else 1 for chunk in range(1, len(plan.chunk_starts)))
    widths = (n * hidden_size + len(edge) * source_size for n, edge in zip(streams, plan.edges(), strict=True))
    return [tokens * bytes_per_element * width for width in widths]
