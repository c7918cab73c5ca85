"""Random access to a prepared corpus (MDS shards) and the loader that turns sample ids into micro-batches.

mosaicml-streaming finds, downloads, checks and expands the shards. Its own iteration is not used: it deals
samples out by torchrun rank, while a replica's tensor, pipeline and context ranks must read the same rows.
Order and position are ours (`order.py`); StreamingDataset serves single samples by number. Four of its habits
are handled here:

- Shared memory left behind by a killed run makes it refuse a cache folder, and two runs that start in one
  moment pick the same names: one start at a time on a machine, leftovers removed first where they matter.
- It expands a shard into `<name>.tmp` under a lock that another run on the same folder does not share: a file
  lock beside the shards makes that safe.
- A shard that fails its hash stays marked "in preparation", and every other process waits for it for ever:
  the mark is taken back.
- With compressed shards and no remote, it deletes a raw shard whose compressed file is missing, its
  only copy: such a folder is refused first.

Hashes are checked when a shard is downloaded or expanded, not each time a raw file is read again.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from streaming import Stream, StreamingDataset
from streaming.base.distributed import barrier, get_local_rank, get_world_size
from streaming.base.format import Reader
from streaming.base.shuffle import get_shuffle
from streaming.base.storage import CloudDownloader
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader, Dataset

from megatron_depthattn.data.order import SampleSequence, micro_batches, num_micro_batches

MANIFEST_NAME = "manifest.json"
TOKEN_COLUMN = "tokens"
DOWNLOAD_TIMEOUT_SECONDS = 120.0
LOCK_TIMEOUT_SECONDS = 300.0
_REMOTE = 1  # streaming's state of a shard that is not here yet


class _LockedStream(Stream):
    """A stream whose shards are prepared by one process at a time, over all runs and nodes on the folder."""

    def prepare_shard(self, shard: Reader) -> int:
        folder = Path(self.local, self.split)
        if not os.access(folder, os.W_OK):
            raise ValueError(
                f"{folder} is not writable and its shards are compressed: set data.cache to a folder that is"
            )
        with FileLock(folder / ".prepare.lock"):
            try:
                return int(super().prepare_shard(shard))
            except ValueError as error:
                raise ValueError(
                    f"{error}: its bytes differ from the hash in index.json; fetch or prepare it again"
                ) from error


class _Shards(StreamingDataset):
    """StreamingDataset that lets go of a shard whose preparation failed, so that nobody waits for it."""

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            self._shard_states[shard_id] = _REMOTE
            raise


def _check_local_shards(folder: Path) -> None:
    """Refuse a local split that lacks files, before streaming tidies it up. `folder` holds index.json."""
    index = folder / "index.json"
    if not index.is_file():
        raise ValueError(f"{folder} has no index.json: give data.path a folder written by tools/prepare_data.py")
    present = set(os.listdir(folder))
    for shard in json.loads(index.read_text())["shards"]:
        stored = shard["zip_data"] or shard["raw_data"]
        if stored["basename"] not in present:
            raise ValueError(f"{folder / stored['basename']} is missing: copy or prepare the corpus again")


def _read_manifest(path: str, cache: str | None) -> dict[str, Any] | None:
    """The corpus's manifest, or None where there is none (MDS shards from elsewhere)."""
    if "://" not in path:
        file = Path(path, MANIFEST_NAME)
        return json.loads(file.read_text()) if file.is_file() else None
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        file = Path(folder, MANIFEST_NAME)
        try:
            CloudDownloader.direct_download(f"{path.rstrip('/')}/{MANIFEST_NAME}", str(file), DOWNLOAD_TIMEOUT_SECONDS)
        except FileNotFoundError:
            return None
        return json.loads(file.read_text())


def _open_shards(path: str, split: str, cache: str | None) -> StreamingDataset:
    """Construct the StreamingDataset. Every rank of the world must call this: streaming synchronises them."""
    if get_world_size() > 1 and not torch.distributed.is_initialized():
        raise ValueError("the data set was opened before torch.distributed: call init_process_group first")
    remote = path if cache is not None else None
    # The lock is per machine and user: streaming picks shared-memory names by looking for free ones. It is held
    # over streaming's own barriers, so two jobs that share several nodes could wait for each other: hence the time
    # limit.
    lock = FileLock(
        Path(tempfile.gettempdir(), f"megatron_depthattn_streaming_{os.getuid()}.lock"), timeout=LOCK_TIMEOUT_SECONDS
    )
    with lock if get_local_rank() == 0 else nullcontext():
        barrier()
        if remote is not None:
            # Leftovers only matter for a cache folder; a local one just takes the next free name. Runs that
            # have started keep what they have mapped, so removing their names does not hurt them.
            clean_stale_shared_memory()
        stream = _LockedStream(remote=remote, local=cache or path, split=split)
        shards = _Shards(streams=[stream], download_timeout=DOWNLOAD_TIMEOUT_SECONDS, batch_size=1)
    hashes = shards.shards[0].hashes
    stream.validate_hash = hashes[0] if hashes else None
    return shards


class TokenDataset(Dataset[torch.Tensor]):
    """One split of a prepared corpus, read by sample number.

    Every process of a torchrun world constructs it, at the same point of the program and after
    `init_process_group`; which samples a process then reads is its own affair.

    Args:
        path: the folder written by `tools/prepare_data.py`, or a remote URL of its copy.
        split: "train" or "val".
        sequence_length: what the model will be trained with; None takes what the corpus has.
        cache: folder for downloaded shards. Needed for a URL; with a local path it holds the expanded shards,
            for a corpus in a read-only folder. Nothing is ever evicted.

    Raises:
        ValueError: no such split, a shard missing, another sequence length, or a URL without a cache.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        sequence_length: int | None = None,
        cache: str | Path | None = None,
    ) -> None:
        location, cache_dir = str(path), None if cache is None else str(cache)
        if "://" in location and cache_dir is None:
            raise ValueError(
                f"data.path {location} is remote and data.cache is not set: set data.cache to a local folder"
            )
        if "://" not in location:
            _check_local_shards(Path(location, split))
        if cache_dir is not None:
            Path(cache_dir, split).mkdir(parents=True, exist_ok=True)
        self.path = location
        self.manifest = _read_manifest(location, cache_dir)
        self._shards = _open_shards(location, split, cache_dir)
        self.samples_per_shard: npt.NDArray[np.int64] = self._shards.samples_per_shard
        self.num_samples = int(self._shards.num_samples)
        self.sequence_length = self._stored_sequence_length()
        if sequence_length is not None and sequence_length != self.sequence_length:
            raise ValueError(
                f"data.sequence_length is {sequence_length}, but {location} was prepared with "
                f"{self.sequence_length}: set data.sequence_length={self.sequence_length}, or prepare again "
                f"with --sequence-length {sequence_length}"
            )

    def _stored_sequence_length(self) -> int:
        # From the shards themselves: they are what will be read, with or without a manifest.
        first = self._shards.shards[0]
        columns = dict(zip(first.column_names, first.column_encodings, strict=True))
        kind, _, shape = columns.get(TOKEN_COLUMN, "").rpartition(":")
        if not kind.startswith("ndarray:") or not shape.isdigit():
            raise ValueError(
                f"{self.path} has the columns {columns}, not '{TOKEN_COLUMN}' of a fixed length: "
                "prepare the corpus with tools/prepare_data.py"
            )
        return int(shape) - 1

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tokens of one sample: int64 [sequence_length + 1]; expands or downloads its shard on first use."""
        return torch.from_numpy(self._shards[index][TOKEN_COLUMN].astype(np.int64))


def sample_order(
    samples_per_shard: npt.NDArray[np.int64], num_samples: int, seed: int, epoch: int, shuffle: bool
) -> npt.NDArray[np.int64]:
    """One epoch's order of sample ids: int64 [num_samples], the same in every process.

    Shuffled with streaming's py1e: samples spread over a window of shards, so that a cold cache does not
    fetch every shard at once. `num_canonical_nodes` is 1: the order does not know the number of nodes.
    Takes memory and time in proportion to `num_samples`: 8 bytes a sample, several times that in the making.
    """
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    # py1e draws from seed + epoch: unmixed, epoch 1 of seed 0 would repeat epoch 0 of seed 1.
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
    # A window smaller than a shard would leave that shard unmixed with its neighbours.
    block_size = max(1 << 18, 4 * int(samples_per_shard.max()))
    return get_shuffle("py1e", samples_per_shard, 1, mixed, epoch, block_size)


class _MicroBatches(Dataset[dict[str, torch.Tensor]]):
    """Maps an array of sample ids to a micro-batch; this is what the loader's workers run."""

    def __init__(self, samples: Dataset[torch.Tensor]) -> None:
        self.samples = samples

    def __getitem__(self, ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        rows = torch.stack([self.samples[int(i)] for i in ids])
        return {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "sample_ids": torch.from_numpy(ids.copy()),
        }


class TokenLoader(Iterator[dict[str, torch.Tensor]]):
    """Endless iterator of micro-batches; `data_seconds` sums the time spent in `next`, in seconds."""

    def __init__(self, batches: "DataLoader[dict[str, torch.Tensor]]") -> None:
        self._iterator: Iterator[dict[str, torch.Tensor]] | None = iter(batches)
        self.data_seconds = 0.0

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._iterator is None:
            raise StopIteration
        start = time.perf_counter()
        batch = next(self._iterator)
        self.data_seconds += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Stop the workers. Safe to call twice; `next` then raises StopIteration."""
        self._iterator = None  # the loader's iterator ends its workers when the last reference goes


def build_loader(
    dataset: Dataset[torch.Tensor],
    sequence: SampleSequence,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> TokenLoader:
    """Micro-batches of one data-parallel rank, from `consumed_samples` on, without end.

    A step takes `global_batch_size / (micro_batch_size * data_parallel_size)` of them. What workers have
    fetched ahead is not counted anywhere: the caller's own count of consumed samples is the state.

    Args:
        num_workers: processes that read ahead; 0 reads in the caller.

    Returns:
        An iterator of {"tokens": int64 [mbs, N], "labels": int64 [mbs, N], "sample_ids": int64 [mbs]}, where
        labels[:, t] is the token after tokens[:, t].

    Raises:
        ValueError: the sizes do not divide (now, not in a worker).
    """
    num_micro_batches(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
    )
    sampler = micro_batches(
        sequence,
        consumed_samples,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    # batch_size=None: each item of the sampler is a whole micro-batch of ids. fork: the data set holds locks
    # and shared-memory handles that do not pickle, and workers never touch an accelerator.
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        _MicroBatches(dataset),
        sampler=sampler,  # type: ignore[arg-type]  # an iterator is enough: it is taken once
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers > 0 else None,
    )
    return TokenLoader(loader)
