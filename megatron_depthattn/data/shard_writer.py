"""Samples of one split, written as MDS shards.

Every shard but the last holds the same number of samples, so the bytes of the shards depend on the samples alone, not
on how they arrived.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_depthattn.data.shard_index import columns_of, starts_bytes
from megatron_depthattn.durable import fsync_path, remove

SHARD_BYTES = 32 << 20  # of tokens, before compression
Tokens = npt.NDArray[Any]


class Samples(NamedTuple):
    """Samples as a shard stores them, [number of samples, ...]; see `shard_index.columns_of`."""

    padding: npt.NDArray[np.uint32]
    """[number of samples]"""
    starts: npt.NDArray[np.uint8]
    """Packed bits, [number of samples, (N + 1) / 8, rounded up]."""
    tokens: Tokens
    """[number of samples, N + 1]"""

    def part(self, begin: int, end: int | None = None) -> "Samples":
        return Samples(self.padding[begin:end], self.starts[begin:end], self.tokens[begin:end])


def no_samples(sequence_length: int, dtype: str) -> Samples:
    """What there is before the first sample."""
    length = sequence_length + 1
    starts, tokens = np.zeros((0, starts_bytes(length)), np.uint8), np.zeros((0, length), dtype)
    return Samples(np.zeros(0, np.uint32), starts, tokens)


class ShardWriter:
    """Writes `folder`. A shard is on disk, whole, before it is counted.

    Args:
        folder: of the split; its shards beyond those given are removed.
        shards: index entries of shards that are there already.
        samples: what followed them; `no_samples` at the start.
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], samples: Samples) -> None:
        self._folder, tokens = folder, samples.tokens
        self._columns = columns_of(tokens.dtype, tokens.shape[1])
        # Of the tokens alone: a corpus whose shards store nothing else has the same samples in each.
        self._samples_per_shard = max(1, SHARD_BYTES // (tokens.itemsize * tokens.shape[1]))
        self._state = [*shards], [samples]  # replaced in one step, so that an interrupt leaves a whole one
        folder.mkdir(parents=True, exist_ok=True)
        known = {entry["zip_data"]["basename"] for entry in shards}
        for path in folder.iterdir():
            if path.name not in known:
                remove(path)

    def append(self, samples: Samples) -> None:
        """Add samples; nothing is written before `flush`."""
        self._state[1].append(samples)

    def flush(self) -> None:
        """Write the shards that are full.

        Raises:
            OSError: a shard could not be written; `state` still holds its samples.
        """
        while sum(len(samples.padding) for samples in self._state[1]) >= self._samples_per_shard:
            self._write_shard()

    def state(self) -> tuple[list[dict[str, Any]], Samples]:
        """Index entries and samples that another writer continues from."""
        return self._state[0], Samples(*map(np.concatenate, zip(*self._state[1], strict=True)))

    def finish(self) -> int:
        """Write the last shard and the index; returns the number of samples."""
        self.flush()
        if len(self.state()[1].padding):
            self._write_shard()
        shards, _ = self.state()
        (self._folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
        return sum(int(entry["samples"]) for entry in shards)

    def _write_shard(self) -> None:
        """Write what fills a shard: as a data set of one shard in a staging folder, renamed once it is on disk."""
        from streaming import MDSWriter  # brings transformers, scikit-learn and torchvision

        shards, samples = self.state()
        staging = self._folder / "staging"
        remove(staging)
        out = {"out": str(staging), "compression": "zstd", "hashes": ["xxh64"], "size_limit": None}
        writer = MDSWriter(columns=self._columns, **out)
        for sample in zip(*samples.part(0, self._samples_per_shard), strict=True):
            writer.write(dict(zip(self._columns, sample, strict=True)))
        writer.finish()
        (entry,) = json.loads((staging / "index.json").read_text())["shards"]
        for data in (entry["raw_data"], entry["zip_data"]):
            written, data["basename"] = data["basename"], data["basename"].replace("00000", f"{len(shards):05}")
        fsync_path(staging / written)
        (staging / written).replace(self._folder / data["basename"])
        fsync_path(self._folder)
        shutil.rmtree(staging)
        padding, starts, tokens = samples.part(self._samples_per_shard)
        self._state = [*shards, entry], [Samples(padding.copy(), starts.copy(), tokens.copy())]  # views would keep all
