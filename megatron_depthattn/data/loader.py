"""From sample ids to micro-batches, read ahead by processes of their own.

The loader's processes are forked, so they inherit what the run does on a signal; and a scheduler sends its signals to
every process of a job. They must continue: the run wants to finish its step and save. So they ignore SIGINT, SIGUSR1
and SIGUSR2, and end on SIGTERM only if their parent sent it. They end within a second of its death.

They write a step into memory that was shared with them when they were forked, and say so through a pipe. DataLoader's
own way needs room in /dev/shm and a socket below TMPDIR, whose path can be too long, and fails in a thread of the
worker's, where the error is printed, the step is dropped, and the run waits for it for ever.
"""

import math
import mmap
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_depthattn.data.corpus import Corpus
from megatron_depthattn.data.order import Ids, SampleIds, num_micro_batches, steps
from megatron_depthattn.data.predownload import Predownloader
from megatron_depthattn.data.stream import TokenDataset

STEPS_AHEAD = 2
"""Whole steps that every loader process holds ready."""
SECONDS_BETWEEN_LOOKS = 1.0
"""How long a loader process can outlive its parent, and be dead unnoticed."""
_IGNORED = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

MicroBatch = dict[str, torch.Tensor]
START, PADDING = 1, 2
"""Marks of a token, as bits: it is the first of a document; it is padding."""


class _Steps(Dataset[str | None]):
    """Reads the samples of a step into a slot; this is what the loader's processes run.

    Args:
        slots: int32 [number of slots, num_micro_batches, mbs, N + 1], shared with forked processes; a
            smaller step fills the first micro-batches of its slot.
        marks: uint8, of the same shape and shared as well: of every token; None: nobody asks.
        vocab_size: what a token must be below; None: not checked.
    """

    def __init__(
        self,
        samples: Corpus | TokenDataset,
        slots: torch.Tensor,
        marks: torch.Tensor | None,
        vocab_size: int | None,
    ) -> None:
        self.samples, self.slots, self.marks, self.vocab_size = samples, slots, marks, vocab_size

    def __getitem__(self, item: tuple[int, Ids]) -> str | None:
        """Fill a slot with the samples of these ids; returns what is wrong with the data, or None."""
        slot, ids = item
        rows = self.slots[slot, : len(ids)]
        try:
            for place, number in enumerate(ids.ravel().tolist()):
                if self.marks is None:
                    rows.flatten(0, 1)[place].copy_(self.samples[number])
                    continue
                sample, marks = self.samples.sample(number), self.marks[slot].flatten(0, 1)[place]
                rows.flatten(0, 1)[place].copy_(sample.tokens)
                marks.copy_(sample.starts)  # True is START
                marks[len(marks) - sample.padding :] |= PADDING
        except (ValueError, OSError) as error:
            return str(error)  # raised in a worker, it would come out as pages of traceback
        low, high = (int(token) for token in rows.aminmax())
        if self.vocab_size is not None and not 0 <= low <= high < self.vocab_size:
            # The embedding would crash a GPU, or look up nothing where tensor ranks share it.
            return (
                f"the data has token {low if low < 0 else high}, in samples {ids.min()} to {ids.max()}, and "
                f"model.vocab_size is {self.vocab_size}: prepare the data with the model's tokenizer"
            )
        return None


def _end_worker(error: Exception, _result: object) -> None:
    """End a loader process that cannot say how a step went: Python prints the error and continues."""
    print(f"error: a loader process could not hand over a step: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _shield_worker(parent: int, _number: int) -> None:
    """Make a loader process ignore a scheduler's signals, and end it with its parent.

    It was forked with these signals blocked. DataLoader looks for the parent's death as well, but only between two
    batches, and not if the parent died in the first moments.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]

    def end_with_parent() -> None:
        while True:
            received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
            if os.getppid() != parent or (received and received.si_pid == parent):
                os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


class TokenLoader(Iterator[list[MicroBatch]]):
    """The steps of one data-parallel rank, from `consumed_samples` on, without end.

    What workers have read ahead is not counted anywhere: the caller's own count of consumed samples is the state.

    Args:
        samples: what is read.
        sequence: the order in which it is read.
        num_workers: processes that read ahead, a step each in turn; 0 reads in the caller.
        vocab_size: what a token must be below; None: not checked.
        pin_memory: into page-locked memory, from which a copy to a GPU need not be waited for.
        predownload: samples of all ranks, of a `Corpus`, whose shards a further process makes ahead of need.
        batch_sizes: of each step, none above ``global_batch_size``; None: always that.
        document_mask: micro-batches say where documents begin.
        layout: the keyword arguments of `batch_positions`.

    Yields:
        Lists of micro-batches, see `micro_batches`.

    Raises:
        ValueError: the sizes do not divide (now, not in a worker).
    """

    def __init__(
        self,
        samples: Corpus | TokenDataset,
        sequence: SampleIds,
        *,
        consumed_samples: int,
        num_workers: int = 0,
        vocab_size: int | None = None,
        pin_memory: bool = False,
        predownload: int = 0,
        batch_sizes: Iterable[int] | None = None,
        document_mask: bool = False,
        **layout: int,
    ) -> None:
        sizes = {name: size for name, size in layout.items() if name != "data_parallel_rank"}
        step = num_micro_batches(**sizes), layout["micro_batch_size"], samples.sequence_length + 1
        ids = steps(sequence, consumed_samples, batch_sizes, **layout)
        # A step is asked for when the one that lies as many as are read ahead before it has been received; that one is
        # copied from its slot a moment later. Hence one slot more.
        shape = num_workers * STEPS_AHEAD + 1, *step
        self._slots = _shared(shape, torch.int32)
        self._marks = _shared(shape, torch.uint8) if document_mask or samples.pads else None
        self._document_mask = document_mask
        self._asked: deque[tuple[int, Ids]] = deque()
        self._predownloader: Predownloader | None = None
        # batch_size=None: each item of the sampler is a whole step of ids, computed in this process once and not in
        # every worker. fork: workers start at once, with the index in memory, and never touch an accelerator.
        loader: DataLoader[str | None] = DataLoader(
            _Steps(samples, self._slots, self._marks, vocab_size),
            sampler=self._ask(ids),  # type: ignore[arg-type]  # an iterator is enough: it is taken once
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=STEPS_AHEAD if num_workers else None,
            timeout=SECONDS_BETWEEN_LOOKS if num_workers else 0,
            worker_init_fn=partial(_shield_worker, os.getpid()),
            multiprocessing_context="fork" if num_workers else None,
            generator=torch.Generator(),  # it draws a seed for its workers, and that must not come out of the run's
        )
        # Blocked before the fork: a signal in a worker's first moments would still meet the inherited handlers.
        on_child = signal.getsignal(signal.SIGCHLD)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*_IGNORED, signal.SIGTERM))
        try:
            if predownload:
                assert isinstance(samples, Corpus)
                self._predownloader = Predownloader(
                    samples,
                    ids,
                    ahead=predownload,
                    data_parallel_size=layout["data_parallel_size"],
                    begin=partial(_shield_worker, os.getpid(), 0),
                )
            self._iterator: Iterator[str | None] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if threading.current_thread() is threading.main_thread():
            # DataLoader's handler raises the death of a worker wherever the program is, be it in the middle of
            # saving; without it the next `next` does.
            signal.signal(signal.SIGCHLD, on_child)
        self._pin_memory = pin_memory

    def _ask(self, steps: Iterator[Ids]) -> Iterator[tuple[int, Ids]]:
        for number, ids in enumerate(steps):
            self._asked.append((number % len(self._slots), ids))
            if self._predownloader:
                self._predownloader.note(asked=ids.size)
            yield self._asked[-1]

    def __next__(self) -> list[MicroBatch]:
        """The micro-batches of one step.

        Raises:
            ValueError: a shard is damaged or missing, or a token is outside the vocabulary.
            ChildProcessError: a loader process died.
        """
        error = self._wait()
        slot, ids = self._asked.popleft()
        if self._predownloader:
            self._predownloader.note(taken=ids.size)
        rows = self._slots[slot, : len(ids)].long()  # a copy: the slot is filled again
        marks = self._marks[slot, : len(ids)] if self._marks is not None else None
        if error is not None:
            raise ValueError(error)
        options = {"document_mask": self._document_mask, "pin_memory": self._pin_memory}
        return micro_batches(rows, marks, torch.from_numpy(ids), **options)

    def _wait(self) -> str | None:
        while (results := self._iterator) is not None:
            try:
                return next(results)
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    continue  # all workers live
                if "DataLoader worker" not in str(error):
                    raise
                raise ChildProcessError(  # no ValueError: a new start may get further
                    f"a loader process of this rank died: {' '.join(str(error).split())}. Most likely the machine ran "
                    "out of memory (see dmesg): set data.num_workers=0, or give it more"
                ) from error
        raise StopIteration  # closed, perhaps by another thread

    def close(self) -> None:
        """Stop the workers. Safe to call twice; `next` then raises StopIteration."""
        self._iterator = None  # DataLoader's iterator ends its workers when the last reference goes
        if self._predownloader:
            self._predownloader.close()


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that forked processes write to as well."""
    return torch.frombuffer(mmap.mmap(-1, dtype.itemsize * math.prod(shape)), dtype=dtype).view(shape)


def micro_batches(
    rows: torch.Tensor,
    marks: torch.Tensor | None,
    sample_ids: torch.Tensor,
    *,
    document_mask: bool,
    pin_memory: bool = False,
) -> list[MicroBatch]:
    """A step's micro-batches, as new tensors.

    Args:
        rows: int64 [micro-batches, mbs, N + 1], the tokens.
        marks: uint8 of the same shape; None: no padding, and no borders are asked for.
        sample_ids: int64 [micro-batches, mbs].
        pin_memory: what a device needs goes into page-locked memory.

    Returns:
        Each has "tokens" and "labels", int64 [mbs, N], where labels[:, t] is the token after tokens[:, t], and
        "sample_ids", int64 [mbs]. With marks also "loss_mask", bool [mbs, N]: whether the label is to be predicted,
        which padding is not, nor, with a document mask, the first token of a document. With that also "cu_seqlens",
        int32 [documents + 1]: where documents begin and the last one ends, in the micro-batch as one row of mbs * N
        tokens; every sample begins one.
    """
    parts = {"tokens": rows[..., :-1].contiguous(), "labels": rows[..., 1:].contiguous()}
    if marks is not None:
        parts["loss_mask"] = marks[..., 1:] & (PADDING | START * document_mask) == 0
    if pin_memory:
        parts = {name: part.pin_memory() for name, part in parts.items()}
    parts["sample_ids"] = sample_ids
    batches = [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]
    if document_mask and marks is not None:
        for batch, own in zip(batches, marks, strict=True):
            is_first = (own[:, :-1] & START).bool()
            is_first[:, 0] = True
            batch["cu_seqlens"] = torch.cat([is_first.view(-1).nonzero()[:, 0], torch.tensor([is_first.numel()])]).int()
    return batches
