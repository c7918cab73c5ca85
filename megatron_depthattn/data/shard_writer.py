"""One split's stream of tokens, cut into samples and written as MDS shards.

Sample i is tokens[i*N : i*N + N + 1]: neighbours share one token. Every shard but the last holds the same number of
samples, so the bytes of the shards depend on the stream alone, not on how it arrived.
"""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from megatron_depthattn.data.shard_index import TOKEN_COLUMN
from megatron_depthattn.durable import fsync_path

SHARD_BYTES = 32 << 20  # of samples, before compression
Tokens = npt.NDArray[Any]


class SplitWriter:
    """Writes `folder`; a shard is on disk, whole, before it is counted in `shards`.

    Shards are compressed and written in a thread, one at a time, while the next one's tokens gather: memory holds two.

    Args:
        folder: of the split; its shards beyond those given are removed.
        shards: index entries of shards that are there already.
        tokens: what followed them in the stream, from their last token on.
    """

    def __init__(
        self, folder: Path, sequence_length: int, dtype: str, shards: Sequence[dict[str, Any]], tokens: Tokens
    ) -> None:
        self.shards = list(shards)
        self._folder = folder
        self._length = sequence_length
        self._dtype = np.dtype(dtype)
        self._samples_per_shard = max(1, SHARD_BYTES // (self._dtype.itemsize * (sequence_length + 1)))
        self._open, self._num_open = [tokens], len(tokens)
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[dict[str, Any]] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        known = {entry["zip_data"]["basename"] for entry in self.shards}
        for path in folder.iterdir():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, tokens: Tokens) -> None:
        """Append to the stream.

        Raises:
            OSError: a shard could not be written; perhaps one of an earlier call.
        """
        self._open.append(tokens)
        self._num_open += len(tokens)
        while self._num_open > self._samples_per_shard * self._length:
            stream = np.concatenate(self._open)
            end = self._samples_per_shard * self._length
            self._start_shard(stream[: end + 1])
            rest = stream[end:].copy()  # not a view, which would keep the whole
            self._open, self._num_open = [rest], len(rest)

    def state(self) -> tuple[list[dict[str, Any]], Tokens]:
        """`shards` and `tokens` that continue from here; waits for the shard under way."""
        self._wait()
        return list(self.shards), np.concatenate(self._open)

    def finish(self) -> tuple[int, int]:
        """Write the last shard and the index; returns the number of samples and of tokens that fill no sample."""
        rest = np.concatenate(self._open)
        end = max(len(rest) - 1, 0) // self._length * self._length
        if end:
            self._start_shard(rest[: end + 1])
        self._wait()
        index = {"version": 2, "shards": self.shards}
        (self._folder / "index.json").write_text(json.dumps(index, sort_keys=True))
        num_samples = sum(int(entry["samples"]) for entry in self.shards)
        shared = 1 if num_samples else 0
        return num_samples, max(len(rest) - end - shared, 0)

    def close(self) -> None:
        """End the thread, after the shard under way."""
        self._thread.shutdown()

    def _start_shard(self, stream: Tokens) -> None:
        self._wait()
        self._pending = self._thread.submit(self._write_shard, len(self.shards), stream)

    def _wait(self) -> None:
        if self._pending is not None:
            self.shards.append(self._pending.result())
            self._pending = None

    def _write_shard(self, number: int, stream: Tokens) -> dict[str, Any]:
        """Write a data set of one shard in a staging folder; the shard gets its number and place, and is on disk."""
        from streaming import MDSWriter  # brings transformers, scikit-learn and torchvision

        staging = self._folder / f"shard.{number:05}.part"
        shutil.rmtree(staging, ignore_errors=True)
        columns = {TOKEN_COLUMN: f"ndarray:{self._dtype}:{self._length + 1}"}
        writer = MDSWriter(columns=columns, out=str(staging), compression="zstd", hashes=["xxh64"], size_limit=None)
        for sample in sliding_window_view(stream, self._length + 1)[:: self._length]:
            writer.write({TOKEN_COLUMN: sample})
        writer.finish()
        (entry,) = json.loads((staging / "index.json").read_text())["shards"]
        for data in (entry["raw_data"], entry["zip_data"]):
            written, data["basename"] = data["basename"], data["basename"].replace("00000", f"{number:05}")
        fsync_path(staging / written)
        (staging / written).replace(self._folder / data["basename"])
        fsync_path(self._folder)
        shutil.rmtree(staging)
        result: dict[str, Any] = entry
        return result
