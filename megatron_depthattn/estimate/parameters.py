"""The parameters of one pipeline chunk on one rank, and the buffers that hold them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

from megatron_depthattn.methods.definition import CrossLayerMethod

ALIGNMENT = 64
"""Numbers: Megatron's buffers begin every parameter at a multiple of this ..."""
BUCKET_ALIGNMENT = 128
"""... and end at a multiple of this and of the ranks that share the optimizer (param_and_grad_buffer.py)."""


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Of the whole model; split over ``tensor`` ranks where Megatron splits them."""

    hidden_size: int
    query_size: int
    """All query heads: heads times head size."""
    key_size: int
    head_size: int
    ffn_size: int
    vocab_size: int
    """Padded."""
    tensor: int = 1


@dataclass(frozen=True)
class Weight:
    """One parameter on one rank."""

    numel: int
    is_linear: bool = False
    """A matrix of the decoder's linear layers, which FP8 recipes convert."""
    is_shared: bool = False
    """An embedding that the first and the last stage hold."""


def chunk_weights(
    sizes: LayerSizes,
    layers: Sequence[int],
    *,
    method: CrossLayerMethod | None,
    is_first: bool,
    is_last: bool,
    tie_embeddings: bool,
) -> list[Weight]:
    """In the order in which Megatron registers them.

    Args:
        layers: those of the chunk that hold weights of their own.
        is_first, is_last: of the model's chunks.
    """
    embedding = sizes.vocab_size * sizes.hidden_size // sizes.tensor
    is_copied = tie_embeddings and is_first != is_last
    weights = [Weight(embedding, is_shared=is_copied)] if is_first else []
    for layer in layers:
        weights += _layer(sizes)
        if method:
            weights += [Weight(prod(shape)) for shape in method.layer_parameters(layer).values()]
            if method.is_last(layer):
                weights += [Weight(prod(shape)) for shape in method.final_parameters().values()]
    if is_last:
        weights.append(Weight(sizes.hidden_size))
        if is_copied or not tie_embeddings:
            weights.append(Weight(embedding, is_shared=is_copied))
    return weights


def _layer(sizes: LayerSizes) -> list[Weight]:
    hidden, tensor = sizes.hidden_size, sizes.tensor
    return [
        Weight(hidden),
        Weight(hidden * sizes.query_size // tensor, is_linear=True),
        Weight(hidden * (sizes.query_size + 2 * sizes.key_size) // tensor, is_linear=True),
        Weight(sizes.head_size),
        Weight(sizes.head_size),
        Weight(hidden),
        Weight(hidden * 2 * sizes.ffn_size // tensor, is_linear=True),
        Weight(hidden * sizes.ffn_size // tensor, is_linear=True),
    ]


@dataclass(frozen=True)
class Buffer:
    """Megatron's flat buffer of a chunk's parameters, which the distributed optimizer shares out."""

    buckets: tuple[tuple[int, int], ...]
    """Begin and end of every bucket."""
    spans: tuple[tuple[int, int], ...]
    """Begin and end of every parameter."""

    @property
    def numel(self) -> int:
        """With what was padded."""
        return self.buckets[-1][1] if self.buckets else 0

    def shard(self, rank: int, ranks: int) -> list[int]:
        """Numbers of every parameter, or piece of one, that the optimizer of ``rank`` of ``ranks`` has."""
        pieces = []
        for begin, end in self.buckets:
            size = (end - begin) // ranks
            first, last = begin + rank * size, begin + (rank + 1) * size
            pieces += [min(b, last) - max(a, first) for a, b in self.spans if a < last and b > first]
        return pieces


def buffer_of(weights: Sequence[Weight], *, ranks: int) -> Buffer:
    """Megatron lays parameters out from the last to the first; shared embeddings get a bucket of their own.

    Args:
        ranks: data-parallel times context-parallel, which share the optimizer.
    """
    spans, buckets = [], []
    bucket_start = position = 0
    unit = lcm(ranks, BUCKET_ALIGNMENT)

    def close() -> None:
        nonlocal bucket_start, position
        position = _up(position, unit)
        buckets.append((bucket_start, position))
        bucket_start = position

    for weight in reversed(weights):
        position = _up(position, ALIGNMENT)
        if weight.is_shared and position > bucket_start:
            close()
        spans.append((position, position + weight.numel))
        position += weight.numel
        if weight.is_shared:
            close()
    if position > bucket_start:
        close()
    return Buffer(tuple(buckets), tuple(spans))


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
