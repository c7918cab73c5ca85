"""Ranges of flattened tensors as rectangles: none is left out, none is there twice, and they are in order."""

import itertools

import pytest
import torch

from megatron_depthattn.train.megatron_state import rectangles


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5), (1, 6), (6, 1), (3, 2, 4), (2, 1, 3, 2)], ids=str)
def test_rectangles_are_the_range(shape):
    elements = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(elements.numel() + 1), 2):
        found = list(rectangles(start, stop, shape))
        blocks = [elements[tuple(slice(o, o + s) for o, s in zip(*each, strict=True))] for each in found]
        assert [int(x) for block in blocks for x in block.flatten()] == list(range(start, stop))
        assert len(found) <= max(1, 2 * len(shape) - 1)
        assert all(block.numel() for block in blocks)
