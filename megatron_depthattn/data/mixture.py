"""Several streams as one endless sequence, in fixed proportions.

Positions are cut into blocks of 1000. In each block every stream has as many slots as its proportion says, and the
order of the slots is a random permutation that depends on seed and block alone. The k-th slot of a stream, counted
from the start of training, takes position k of that stream's own endless sequence: a small stream is in its third
epoch while a large one is in its first. Where a stream stands after any number of samples is one multiplication and
one look into a block, so a resumed run needs no more than the count of consumed samples.
"""

from collections.abc import Sequence

import numpy as np

from megatron_depthattn.data.order import Ids, SampleIds, random_words

SLOTS_PER_BLOCK = 1000
"""Proportions are rounded to thousandths."""


def slots_of(proportions: Sequence[float]) -> tuple[int, ...]:
    """Slots of each stream in a block, by largest remainder; they add up to `SLOTS_PER_BLOCK`.

    Args:
        proportions: positive, of any sum.

    Raises:
        ValueError: a stream would get no slot.
    """
    shares = np.array(proportions, np.float64) / sum(proportions) * SLOTS_PER_BLOCK
    shares = shares.round(9)  # 0.7 / (0.7 + 0.3) is a hair off 0.7
    slots = np.floor(shares).astype(np.int64)
    remainders = np.argsort(slots - shares, kind="stable")  # largest first, the earlier stream of two equal ones
    slots[remainders[: SLOTS_PER_BLOCK - slots.sum()]] += 1
    for i, (proportion, count) in enumerate(zip(proportions, slots.tolist(), strict=True)):
        if count == 0:
            raise ValueError(
                f"data.streams[{i}].proportion is {proportion}, which rounds to none of {SLOTS_PER_BLOCK} samples: "
                f"set at least 1/{SLOTS_PER_BLOCK} of the sum of all proportions, or leave the stream out"
            )
    return tuple(slots.tolist())


class Mixture:
    """Slots of several streams, block after block.

    Args:
        slots: slots of each stream in a block.
        seed: of the order of the slots.
    """

    def __init__(self, slots: Sequence[int], seed: int) -> None:
        self._slots, self._seed = np.array(slots, np.int64), seed
        self._block_size = int(self._slots.sum())
        self._by_owner = np.repeat(np.arange(len(slots)), self._slots)

    def _owners(self, block: int) -> Ids:
        """The stream of each slot of a block: int64 [block size]."""
        # The constant keeps these words apart from those of the streams' own shuffles.
        words = random_words(self._block_size, self._seed, 0x6D69_7874, block)
        return self._by_owner[np.argsort(words, kind="stable")]

    def locate(self, positions: Ids) -> tuple[Ids, Ids]:
        """The stream that each position belongs to, and the position within that stream: int64, as `positions`."""
        blocks, slots = np.divmod(positions, self._block_size)
        streams, inner = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            here, owners = blocks == block, self._owners(block)
            streams[here] = owners[slots[here]]
            earlier = np.empty_like(owners)  # slots of the same stream before each slot
            for stream, count in enumerate(self._slots):
                earlier[owners == stream] = np.arange(count)
            inner[here] = block * self._slots[streams[here]] + earlier[slots[here]]
        return streams, inner

    def consumed(self, positions: int) -> Ids:
        """How many of the first `positions` positions belong to each stream: int64 [number of streams]."""
        block, slots = divmod(positions, self._block_size)
        begun = np.bincount(self._owners(block)[:slots], minlength=len(self._slots))
        return block * self._slots + begun


class MixedSequence:
    """Sample ids of a mixture: those of stream i are numbered after all samples of the streams before it.

    Args:
        sequences: each stream's own endless sequence.
        offsets: the id of each stream's sample 0.
    """

    def __init__(self, mixture: Mixture, sequences: Sequence[SampleIds], offsets: Sequence[int]) -> None:
        self._mixture, self._sequences, self._offsets = mixture, sequences, offsets

    def sample_ids(self, positions: Ids) -> Ids:
        """Sample ids at stream positions: int64 of the same shape."""
        streams, inner = self._mixture.locate(positions)
        result = np.empty_like(positions)
        for stream in np.unique(streams).tolist():
            here = streams == stream
            result[here] = self._offsets[stream] + self._sequences[stream].sample_ids(inner[here])
        return result
