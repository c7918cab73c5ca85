"""Which samples make up which micro-batch: integers in, sample ids out.

A stream of samples is one endless sequence of positions 0, 1, 2, ...; position `p` is the `p % n`-th sample of epoch
`p // n`, in that epoch's order. The global batch that starts after `c` consumed samples holds the positions
`c ... c + global_batch_size - 1`, whatever the layout; a layout only decides who reads which:

    position = c + (m * data_parallel_size + r) * micro_batch_size + k

for micro-batch `m` of the step, data-parallel rank `r` and row `k` of the micro-batch. Tensor, pipeline and context
ranks of one replica share `r` and therefore read the same rows. `c` is the whole state: a resumed run needs nothing
else, and may use another layout or another global batch size; with a ramp of the batch size each step has its own.

An epoch's order is a function of seed, stream, epoch and position. The shards come in random order, which makes a line
of all samples; then every sample moves to a random place on that line, at most half a window away, and the samples are
taken in the order of where they landed (the idea of streaming's py1e: shards enter and leave the window one by
one, so a cold cache does not fetch every shard at once). Because no sample moves further than that, a piece of the
order needs only the samples around it: a start in the middle of 10^8 samples costs one window, not the whole epoch.

Several streams become one in proportions that hold from one position to another: a stage. Its positions are cut into
blocks of 1000, from its first one on; the next stage cuts the last of them short. In each block every stream has as
many slots as its proportion says, and the order of the slots is a random permutation that depends on seed, stage and
block alone. The k-th slot of a stream, counted from the start of training, takes position k of that stream's own
endless sequence, whatever stages it lies in: a small stream is in its third epoch while a large one is in its first.
Where a stream stands after any number of samples is one multiplication and one look into a block for each stage, so a
resumed run needs no more than the count of consumed samples.

Draws are raw words of PCG64: NumPy promises that stream for ever, and does not promise `Generator`'s methods.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

MIN_WINDOW = 1 << 18
"""Samples over which a sample can move, at least; four times the largest shard if that is more."""
SLOTS_PER_BLOCK = 1000
"""Proportions are rounded to thousandths."""


class SampleIds(Protocol):
    """What maps stream positions to sample ids."""

    def sample_ids(self, positions: Ids) -> Ids:
        """Sample ids at stream positions: int64 of the same shape."""


def random_words(count: int, *key: int) -> npt.NDArray[np.uint64]:
    """uint64 [count], a function of the key alone."""
    words: npt.NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return words


class EpochOrder:
    """One epoch's order of the samples of one stream, of which any piece can be asked for.

    Args:
        samples_per_shard: int64 [number of shards], in the order in which samples are numbered.
        key: seed, stream and epoch.
        window: samples over which a sample can move.
    """

    def __init__(self, samples_per_shard: Ids, key: Sequence[int], window: int) -> None:
        self._key, self._reach = tuple(key), window // 2
        self._shards = np.argsort(random_words(len(samples_per_shard), *self._key), kind="stable")
        self._sizes = samples_per_shard[self._shards]
        self._first_ids = (np.cumsum(samples_per_shard) - samples_per_shard)[self._shards]
        self._ends = np.cumsum(self._sizes)

    def ids(self, start: int, stop: int) -> Ids:
        """Sample ids at positions `start ... stop - 1` of the epoch: int64 [stop - start]."""
        # A sample's rank differs from its place on the line by at most two reaches: everything before `low` comes
        # before `start`, everything after `high` comes after `stop`, and the rest is sorted here.
        low, high = max(0, start - 2 * self._reach), min(int(self._ends[-1]), stop + 2 * self._reach)
        first, last = np.searchsorted(self._ends, [low, high - 1], side="right")
        landed, ids = zip(*(self._moved(i) for i in range(int(first), int(last) + 1)), strict=True)
        skipped = low - int(self._ends[first] - self._sizes[first])
        piece = slice(skipped, skipped + high - low)
        order = np.argsort(np.concatenate(landed)[piece], kind="stable")[start - low : stop - low]
        result: Ids = np.concatenate(ids)[piece][order]
        return result

    def _moved(self, i: int) -> tuple[npt.NDArray[np.float64], Ids]:
        """Where the samples of the i-th shard of the line landed, and their ids."""
        count = np.arange(self._sizes[i])
        # The upper 53 bits of a word are a uniform number in [0, 1).
        uniform = (random_words(len(count), *self._key, 1 + int(self._shards[i])) >> np.uint64(11)) * 2.0**-53
        line = self._ends[i] - self._sizes[i] + count
        # Not beyond the ends of the line: else the first positions of an epoch would all be samples from its beginning.
        low, high = np.maximum(line - self._reach, 0), np.minimum(line + self._reach, self._ends[-1])
        return low + uniform * (high - low), self._first_ids[i] + count


def window_of(samples_per_shard: Ids, least: int = MIN_WINDOW) -> int:
    """Samples over which a sample can move: one smaller than a shard would leave it unmixed with its neighbours."""
    return max(least, 4 * int(samples_per_shard.max()))


class SampleSequence:
    """The endless sequence of one stream's sample ids, epoch after epoch.

    Args:
        samples_per_shard: int64 [number of shards]; samples are numbered through the shards in this order.
        seed: of the shuffle.
        shuffle: false: every epoch in the order of the numbers.
        stream: number of the stream, so that two streams of one seed are shuffled independently.
        window: samples over which a sample can move, at least.
    """

    def __init__(
        self, samples_per_shard: Ids, *, seed: int, shuffle: bool, stream: int = 0, window: int = MIN_WINDOW
    ) -> None:
        self.num_samples = int(samples_per_shard.sum())
        self._samples_per_shard, self._shuffle, self._key = samples_per_shard, shuffle, (seed, stream)
        self._window = window_of(samples_per_shard, window)
        self._piece_key, self._piece_ids = (-1, -1), np.empty(0, np.int64)

    def _piece(self, epoch: int, number: int) -> Ids:
        """The `number`-th window of an epoch's order."""
        if (epoch, number) != self._piece_key:  # positions move forward, so one piece is enough
            order = EpochOrder(self._samples_per_shard, (*self._key, epoch), self._window)
            start = number * self._window
            self._piece_ids = order.ids(start, min(start + self._window, self.num_samples))
            self._piece_key = epoch, number
        return self._piece_ids

    def sample_ids(self, positions: Ids) -> Ids:
        """Sample ids at stream positions.

        Args:
            positions: int64, any shape, counted in samples since the start of training.

        Returns:
            int64 of the same shape, each in [0, num_samples).
        """
        epochs, within = np.divmod(positions, self.num_samples)
        if not self._shuffle:
            return within
        numbers = within // self._window
        result = np.empty_like(positions)
        pairs = np.unique(np.stack([epochs.ravel(), numbers.ravel()]), axis=1)  # ascending
        for epoch, number in pairs.T.tolist():
            here = (epochs == epoch) & (numbers == number)
            result[here] = self._piece(epoch, number)[within[here] - number * self._window]
        return result


def slots_of(proportions: Sequence[float]) -> tuple[int, ...]:
    """Slots of each stream in a block, by largest remainder; they add up to `SLOTS_PER_BLOCK`.

    Args:
        proportions: of any sum above 0; none where a stream rests.

    Raises:
        ValueError: a stream that does not rest would get no slot.
    """
    shares = np.array(proportions, np.float64) / sum(proportions) * SLOTS_PER_BLOCK
    shares = shares.round(9)  # 0.7 / (0.7 + 0.3) is a hair off 0.7
    slots = np.floor(shares).astype(np.int64)
    remainders = np.argsort(slots - shares, kind="stable")  # largest first, the earlier stream of two equal ones
    slots[remainders[: SLOTS_PER_BLOCK - slots.sum()]] += 1
    for i, (proportion, count) in enumerate(zip(proportions, slots.tolist(), strict=True)):
        if proportion and count == 0:
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
        stage: further numbers that it depends on.
    """

    def __init__(self, slots: Sequence[int], seed: int, *stage: int) -> None:
        self._slots, self._seed, self._stage = np.array(slots, np.int64), seed, stage
        self._block_size = int(self._slots.sum())
        self._by_owner = np.repeat(np.arange(len(slots)), self._slots)

    def _owners(self, block: int) -> Ids:
        """The stream of each slot of a block: int64 [block size]."""
        # The constant keeps these words apart from those of the streams' own shuffles.
        words = random_words(self._block_size, self._seed, 0x6D69_7874, block, *self._stage)
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


class StagedMixture:
    """Mixtures one after the other; each takes up every stream where the one before has left it.

    Args:
        stages: the first position of each, rising from 0, and slots of each stream in a block.
        seed: of the order of the slots.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[int]]], seed: int) -> None:
        self._firsts = np.array([first for first, _ in stages], np.int64)
        self._mixtures = [Mixture(slots, seed, *([first] if first else [])) for first, slots in stages]
        lengths = zip(self._mixtures, np.diff(self._firsts).tolist(), strict=False)  # the last has no end
        counts = [np.zeros(len(stages[0][1]), np.int64), *(mixture.consumed(length) for mixture, length in lengths)]
        self._begun = np.cumsum(counts, axis=0)  # taken from each stream before each stage

    def _stage_of(self, positions: Ids) -> Ids:
        stages: Ids = np.searchsorted(self._firsts, positions, side="right") - 1
        return stages

    def locate(self, positions: Ids) -> tuple[Ids, Ids]:
        """The stream that each position belongs to, and the position within that stream: int64, as `positions`."""
        streams, inner, stages = np.empty_like(positions), np.empty_like(positions), self._stage_of(positions)
        for stage in np.unique(stages).tolist():
            here = stages == stage
            streams[here], within = self._mixtures[stage].locate(positions[here] - self._firsts[stage])
            inner[here] = self._begun[stage][streams[here]] + within
        return streams, inner

    def consumed(self, positions: int) -> Ids:
        """How many of the first `positions` positions belong to each stream: int64 [number of streams]."""
        stage = int(self._stage_of(np.array(positions)))
        taken: Ids = self._begun[stage] + self._mixtures[stage].consumed(positions - int(self._firsts[stage]))
        return taken


class MixedSequence:
    """Sample ids of a mixture: those of stream i are numbered after all samples of the streams before it.

    Args:
        sequences: each stream's own endless sequence.
        offsets: the id of each stream's sample 0.
    """

    def __init__(self, mixture: StagedMixture, sequences: Sequence[SampleIds], offsets: Sequence[int]) -> None:
        self._mixture, self._sequences, self._offsets = mixture, sequences, offsets

    def sample_ids(self, positions: Ids) -> Ids:
        """Sample ids at stream positions: int64 of the same shape."""
        streams, inner = self._mixture.locate(positions)
        result = np.empty_like(positions)
        for stream in np.unique(streams).tolist():
            here = streams == stream
            result[here] = self._offsets[stream] + self._sequences[stream].sample_ids(inner[here])
        return result


def num_micro_batches(*, global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Micro-batches of one data-parallel rank in one step.

    Raises:
        ValueError: the global batch is not a whole number of micro-batches on every data-parallel rank.
    """
    rows = micro_batch_size * data_parallel_size
    if min(global_batch_size, micro_batch_size, data_parallel_size) < 1 or global_batch_size % rows:
        raise ValueError(
            f"train.global_batch_size {global_batch_size} is not a positive multiple of "
            f"train.micro_batch_size {micro_batch_size} x data-parallel size {data_parallel_size}: "
            f"set a multiple of {max(rows, 1)}"
        )
    return global_batch_size // rows


def batch_positions(
    consumed_samples: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Ids:
    """Stream positions that one data-parallel rank reads in the step after `consumed_samples` samples.

    Returns:
        int64 [num_micro_batches, micro_batch_size].
    """
    grid = np.arange(global_batch_size, dtype=np.int64).reshape(-1, data_parallel_size, micro_batch_size)
    return consumed_samples + grid[:, data_parallel_rank]


def steps(
    sequence: SampleIds, consumed_samples: int, batch_sizes: Iterable[int] | None = None, **layout: int
) -> Iterator[Ids]:
    """Endless steps of one data-parallel rank, from `consumed_samples` on, epoch after epoch.

    Args:
        batch_sizes: of each step; None: always the layout's.
        layout: the keyword arguments of `batch_positions`.

    Yields:
        int64 [num_micro_batches, micro_batch_size], sample ids.
    """
    for size in batch_sizes or repeat(layout["global_batch_size"]):
        yield sequence.sample_ids(batch_positions(consumed_samples, **(layout | {"global_batch_size": size})))
        consumed_samples += size
