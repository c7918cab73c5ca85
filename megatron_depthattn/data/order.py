"""Which samples make up which micro-batch: pure integer arithmetic over the count of consumed samples.

The training stream is one endless sequence of positions 0, 1, 2, ...; position `p` is sample number `p % n`
of epoch `p // n`, in that epoch's order. The global batch that starts after `c` consumed samples holds the
positions `c ... c + global_batch_size - 1`, whatever the layout; a layout only decides who reads which:

    position = c + (m * data_parallel_size + r) * micro_batch_size + k

for micro-batch `m` of the step, data-parallel rank `r` and row `k` of the micro-batch. Tensor, pipeline and
context ranks of one replica share `r` and therefore read the same rows. `c` is the whole state of the stream:
a resumed run needs nothing else, and may use another layout or another global batch size.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class SampleSequence:
    """The endless sequence of sample ids over epochs.

    Args:
        num_samples: samples in one epoch, at least 1.
        order: maps an epoch (from 0) to a permutation of `arange(num_samples)`, int64 [num_samples]. It must
            depend on nothing else: every process and every resumed run calls it anew.
    """

    def __init__(self, num_samples: int, order: Callable[[int], Ids]) -> None:
        if num_samples < 1:
            raise ValueError(f"a sample sequence needs at least 1 sample, got {num_samples}: prepare more data")
        self.num_samples = num_samples
        self._order = order
        self._epoch = -1
        self._ids: Ids = np.empty(0, np.int64)

    def _epoch_ids(self, epoch: int) -> Ids:
        # One epoch is kept: an order over 10^8 samples is 0.8 GB, and positions only move forward.
        if epoch != self._epoch:
            ids = self._order(epoch)
            if ids.shape != (self.num_samples,):
                raise ValueError(f"the order of epoch {epoch} has shape {ids.shape}, expected ({self.num_samples},)")
            self._ids, self._epoch = ids, epoch
        return self._ids

    def sample_ids(self, positions: Ids) -> Ids:
        """Sample ids at stream positions.

        Args:
            positions: int64, any shape, counted in samples since the start of training.

        Returns:
            int64 of the same shape, each in [0, num_samples).
        """
        epochs = positions // self.num_samples
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):  # ascending: a batch across an epoch's end builds each order once
            here = epochs == epoch
            result[here] = self._epoch_ids(int(epoch))[positions[here] % self.num_samples]
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


def batch_sample_ids(sequence: SampleSequence, consumed_samples: int, **layout: int) -> Ids:
    """Sample ids that one data-parallel rank reads in the step after `consumed_samples` samples.

    Args:
        layout: the keyword arguments of `batch_positions`.

    Returns:
        int64 [num_micro_batches, micro_batch_size].
    """
    return sequence.sample_ids(batch_positions(consumed_samples, **layout))


def micro_batches(sequence: SampleSequence, consumed_samples: int, **layout: int) -> Iterator[Ids]:
    """Endless micro-batches of one data-parallel rank, from `consumed_samples` on, epoch after epoch.

    Args:
        layout: the keyword arguments of `batch_positions`.

    Yields:
        int64 [micro_batch_size], sample ids.
    """
    while True:
        yield from batch_sample_ids(sequence, consumed_samples, **layout)
        consumed_samples += layout["global_batch_size"]
