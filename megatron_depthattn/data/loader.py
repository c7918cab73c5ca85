"""From sample ids to micro-batches, read ahead by processes of their own.

The loader's processes are forked, so they inherit what the run does on a signal; and a scheduler sends its signals to
every process of a job. They must go on: the run wants to finish its step and save. So they ignore SIGINT, SIGUSR1 and
SIGUSR2, and end on SIGTERM only if their parent sent it. They end within a second of its death.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_depthattn.data.order import Ids, SampleIds, num_micro_batches, steps

STEPS_AHEAD = 2
"""Whole steps that every loader process holds ready."""
SECONDS_BETWEEN_LOOKS = 1.0
"""How long a loader process can outlive its parent."""
_IGNORED = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

MicroBatch = dict[str, torch.Tensor]
_Step = tuple[torch.Tensor, torch.Tensor] | str


class _Steps(Dataset[_Step]):
    """Maps the sample ids of a step to their tokens; this is what the loader's processes run."""

    def __init__(self, samples: Dataset[torch.Tensor]) -> None:
        self.samples = samples

    def __getitem__(self, ids: Ids) -> _Step:
        """Tokens int32 [num_micro_batches, mbs, N + 1] and their ids; or what is wrong with the data."""
        try:
            rows = torch.stack([self.samples[int(i)] for i in ids.ravel()])
        except ValueError as error:
            return str(error)  # raised in a worker, it would come out as pages of traceback
        # int32: half the bytes to hand over. Two tensors a step and not more, because each holds a file descriptor.
        return rows.to(torch.int32).view(*ids.shape, -1), torch.from_numpy(np.ascontiguousarray(ids))


def _shield_worker(parent: int, _number: int) -> None:
    """Make a loader process deaf to a scheduler's signals, and end it with its parent.

    It was forked with these signals blocked. DataLoader looks for the parent's death as well, but only between two
    batches, and not if the parent died in the first moments.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)

    def end_with_parent() -> None:
        while True:
            received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
            if os.getppid() != parent or (received and received.si_pid == parent):
                os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


class TokenLoader(Iterator[list[MicroBatch]]):
    """Endless iterator of steps; `data_seconds` sums the time spent waiting for the next one, in seconds."""

    def __init__(self, loader: "DataLoader[_Step]") -> None:
        # Blocked before the fork: a signal in a worker's first moments would still meet the inherited handlers.
        on_child = signal.getsignal(signal.SIGCHLD)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*_IGNORED, signal.SIGTERM))
        try:
            self._iterator: Iterator[_Step] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if threading.current_thread() is threading.main_thread():
            # DataLoader's handler raises the death of a worker wherever the program is, be it in the middle of
            # saving; without it the next `next` tells.
            signal.signal(signal.SIGCHLD, on_child)
        self.data_seconds = 0.0

    def __next__(self) -> list[MicroBatch]:
        """The micro-batches of one step.

        Raises:
            ValueError: a shard is damaged or missing.
            ChildProcessError: a loader process died.
        """
        if self._iterator is None:
            raise StopIteration
        start = time.perf_counter()
        try:
            step = next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(  # no ValueError: a new start may get further
                f"a loader process of this rank died: {' '.join(str(error).split())}. Most likely the machine ran out "
                "of memory (see dmesg), or of shared memory (df /dev/shm): set data.num_workers=0, or give it more"
            ) from error
        self.data_seconds += time.perf_counter() - start
        if isinstance(step, str):
            raise ValueError(step)
        return [
            {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "sample_ids": ids}
            for rows, ids in zip(step[0].long(), step[1], strict=True)
        ]

    def close(self) -> None:
        """Stop the workers. Safe to call twice; `next` then raises StopIteration."""
        self._iterator = None  # DataLoader's iterator ends its workers when the last reference goes


def build_loader(
    dataset: Dataset[torch.Tensor],
    sequence: SampleIds,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> TokenLoader:
    """The steps of one data-parallel rank, from `consumed_samples` on, without end.

    What workers have read ahead is not counted anywhere: the caller's own count of consumed samples is the state.

    Args:
        num_workers: processes that read ahead, a step each in turn; 0 reads in the caller.

    Returns:
        An iterator of lists of micro-batches {"tokens": int64 [mbs, N], "labels": int64 [mbs, N],
        "sample_ids": int64 [mbs]}, where labels[:, t] is the token after tokens[:, t].

    Raises:
        ValueError: the sizes do not divide (now, not in a worker).
    """
    layout = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "data_parallel_size": data_parallel_size,
    }
    num_micro_batches(**layout)
    # batch_size=None: each item of the sampler is a whole step of ids, computed in this process once and not in every
    # worker. fork: workers start at once, with the index in memory, and never touch an accelerator.
    loader: DataLoader[_Step] = DataLoader(
        _Steps(dataset),
        sampler=steps(sequence, consumed_samples, data_parallel_rank=data_parallel_rank, **layout),  # type: ignore[arg-type]  # an iterator is enough: it is taken once
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=STEPS_AHEAD if num_workers else None,
        worker_init_fn=partial(_shield_worker, os.getpid()),
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # it draws a seed for its workers, and that must not come out of the run's
    )
    return TokenLoader(loader)
