"""Which samples make up which micro-batch: integers in, sample ids out.

A stream of samples is one endless sequence of positions 0, 1, 2, ...; position `p` is the `p % n`-th sample of epoch
`p // n`, in that epoch's order. The global batch that starts after `c` consumed samples holds the positions
`c ... c + global_batch_size - 1`, whatever the layout; a layout only decides who reads which:

    position = c + (m * data_parallel_size + r) * micro_batch_size + k

for micro-batch `m` of the step, data-parallel rank `r` and row `k` of the micro-batch. Tensor, pipeline and context
ranks of one replica share `r` and therefore read the same rows. `c` is the whole state: a resumed run needs nothing
else, and may use another layout or another global batch size.

An epoch's order is a function of seed, stream, epoch and position. The shards come in random order, which makes a line
of all samples; then every sample moves to a random place on that line, at most half a window away, and the samples are
taken in the order of where they landed (the idea of streaming's py1e: shards enter and leave the window one by
one, so a cold cache does not fetch every shard at once). Because no sample moves further than that, a piece of the
order needs only the samples around it: a start in the middle of 10^8 samples costs one window, not the whole epoch.

Draws are raw words of PCG64: NumPy promises that stream for ever, and does not promise `Generator`'s methods.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

MIN_WINDOW = 1 << 18
"""Samples over which a sample can move, at least; four times the largest shard if that is more."""


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
        if self.num_samples < 1:
            raise ValueError("a sample sequence needs at least 1 sample, got 0: prepare more data")
        self._samples_per_shard, self._shuffle, self._key = samples_per_shard, shuffle, (seed, stream)
        # A window smaller than a shard would leave that shard unmixed with its neighbours.
        self._window = max(window, 4 * int(samples_per_shard.max()))
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
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(f"data-parallel rank {data_parallel_rank} is outside [0, {data_parallel_size})")
    if consumed_samples < 0:
        raise ValueError(f"consumed_samples is {consumed_samples}; it counts samples and starts at 0")
    count = num_micro_batches(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
    )
    grid = np.arange(global_batch_size, dtype=np.int64).reshape(count, data_parallel_size, micro_batch_size)
    return consumed_samples + grid[:, data_parallel_rank]


def steps(sequence: SampleIds, consumed_samples: int, **layout: int) -> Iterator[Ids]:
    """Endless steps of one data-parallel rank, from `consumed_samples` on, epoch after epoch.

    Args:
        layout: the keyword arguments of `batch_positions`.

    Yields:
        int64 [num_micro_batches, micro_batch_size], sample ids.
    """
    while True:
        yield sequence.sample_ids(batch_positions(consumed_samples, **layout))
        consumed_samples += layout["global_batch_size"]
