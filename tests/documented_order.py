"""The order of samples as docs/streaming.md defines it, written out in full: no part of the package is used.

Whole epochs and whole blocks in plain loops, from position 0 on, where the package computes pieces.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np


def words(*key: int, count: int) -> list[int]:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count).tolist()


def ranked(values: list[int]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: values[i])


def epoch_order(sizes: list[int], seed: int, stream: int, epoch: int, window: int) -> list[int]:
    """One epoch: all samples on one line, each moved on it by up to half a window, all of them sorted."""
    first_ids = [sum(sizes[:i]) for i in range(len(sizes))]
    landed = []
    for shard in ranked(words(seed, stream, epoch, count=len(sizes))):
        for i, word in enumerate(words(seed, stream, epoch, 1 + shard, count=sizes[shard])):
            low, high = max(len(landed) - window // 2, 0), min(len(landed) + window // 2, sum(sizes))
            place = low + (word >> 11) / 2**53 * (high - low)
            landed.append((place, len(landed), first_ids[shard] + i))
    return [sample for _, _, sample in sorted(landed)]


def stream_order(sizes: list[int], seed: int, stream: int = 0, window: int = 1 << 18) -> Iterator[int]:
    """A stream's sample numbers, epoch after epoch, without end."""
    epoch = 0
    while True:
        yield from epoch_order(sizes, seed, stream, epoch, window)
        epoch += 1


def mixed_order(
    streams: list[list[int]], slots: Sequence[int], seed: int, later: Sequence[tuple[int, Sequence[int]]] = ()
) -> Iterator[int]:
    """The sample ids of several streams, block after block, without end; ``later``: other slots from a position on."""
    sequences = [stream_order(sizes, seed, number) for number, sizes in enumerate(streams)]
    offsets = [sum(map(sum, streams[:i])) for i in range(len(streams))]
    position = 0
    for (first, slots_here), (end, _) in itertools.pairwise([(0, slots), *later, (math.inf, ())]):
        owner = [stream for stream, count in enumerate(slots_here) for _ in range(count)]
        key = [first] if first else []
        for block in itertools.count():
            if position == end:
                break
            for slot in ranked(words(seed, 0x6D69_7874, block, *key, count=len(owner))):
                if position < end:
                    yield offsets[owner[slot]] + next(sequences[owner[slot]])
                    position += 1
