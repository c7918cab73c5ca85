"""A range of a tensor's flattened elements as parts of a checkpoint: rectangles of the whole model's tensor.

Sharded optimizers cut parameters without regard to their rows. A range of a matrix is at most three rectangles: the end
of a row, whole rows, and the beginning of one. Rectangles of any size and place are ordinary parts of a checkpoint, so
each data-parallel rank writes and reads its own range, under the names and shapes that every other layout uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, an entry for each dimension."""


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[Rectangle]:
    """The rectangles that elements ``start`` to ``stop`` of a flattened tensor consist of, in their order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, last * row, stop, shape)


def _in_row(index: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Rectangle]:
    begin = index * prod(shape[1:])
    for offsets, sizes in rectangles(start - begin, stop - begin, shape[1:]):
        yield (index, *offsets), (1, *sizes)


def range_parts(
    whole: ShardedTensor | ShardedTensorFactory, start: int, values: Tensor, prefix: str = ""
) -> list[ShardedTensor]:
    """Parts of a checkpoint for some flattened elements of a rank's tensor.

    Args:
        whole: what Megatron says of this rank's tensor: its name, and its place in the whole model's tensor.
        start: the first of the elements.
        values: ``[number of elements]``; the parts are views of it.
        prefix: goes before the tensor's name.
    """
    parts = []
    for begin, piece in _pieces(whole):
        shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        first, last = max(start, begin), min(start + values.numel(), begin + prod(shape))
        for offsets, sizes in rectangles(first - begin, last - begin, shape):
            part = replace(
                piece,
                key=prefix + piece.key,
                data=values.narrow(0, first - start, prod(sizes)).view(sizes),
                dtype=values.dtype,
                local_shape=sizes,
                global_offset=tuple(map(sum, zip(piece.global_offset, offsets, strict=True))),
                axis_fragmentations=None,  # no regular grid
                prepend_axis_num=0,
                replica_id=(*piece.replica_id[:-1], 0),  # data-parallel ranks hold ranges, not copies
            )
            parts.append(part)
            first += prod(sizes)
    return parts


def _pieces(whole: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, ShardedTensor]]:
    """The tensors that Megatron stores a rank's tensor as (gate and up are two), each with its first element."""
    if isinstance(whole, ShardedTensor):
        yield 0, replace(whole, data=None)
        return
    for piece in nested_values(replace(whole, data=torch.empty(whole.data.shape, device="meta")).build()):
        assert piece.data.is_contiguous(), f"{piece.key} is no range of the tensor that {whole.key} is made of"
        yield piece.data.storage_offset(), replace(piece, data=None)
