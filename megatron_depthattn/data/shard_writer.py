"""One split's stream of tokens, cut into samples and written as MDS shards.

Sample i is tokens[i*N : i*N + N + 1]: neighbours share one token. Every shard but the last holds the same number of
samples, so the bytes of the shards depend on the stream alone, not on how it arrived.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from megatron_depthattn.data.shard_index import TOKEN_COLUMN
from megatron_depthattn.durable import fsync_path, remove

SHARD_BYTES = 32 << 20  # of samples, before compression
Tokens = npt.NDArray[Any]


class SplitWriter:
    """Writes `folder`. A shard is on disk, whole, before it is counted.

    Args:
        folder: of the split; its shards beyond those given are removed.
        shards: index entries of shards that are there already.
        tokens: what followed them in the stream, from their last token on.
    """

    def __init__(
        self, folder: Path, sequence_length: int, dtype: str, shards: Sequence[dict[str, Any]], tokens: Tokens
    ) -> None:
        self._folder, self._length, self._dtype = folder, sequence_length, np.dtype(dtype)
        self._tokens_per_shard = max(1, SHARD_BYTES // (self._dtype.itemsize * (sequence_length + 1))) * sequence_length
        self._state = [*shards], [tokens]  # replaced in one step, so that an interrupt leaves a whole one
        folder.mkdir(parents=True, exist_ok=True)
        known = {entry["zip_data"]["basename"] for entry in shards}
        for path in folder.iterdir():
            if path.name not in known:
                remove(path)

    def append(self, tokens: Tokens) -> None:
        """Add to the stream; nothing is written before `flush`."""
        self._state[1].append(tokens)

    def flush(self) -> None:
        """Write the shards that are full.

        Raises:
            OSError: a shard could not be written; `state` still holds its tokens.
        """
        while sum(map(len, self._state[1])) > self._tokens_per_shard:
            self._write_shard(self._tokens_per_shard)

    def state(self) -> tuple[list[dict[str, Any]], Tokens]:
        """Index entries and tokens that another writer continues from."""
        return self._state[0], np.concatenate(self._state[1])

    def finish(self) -> tuple[int, int]:
        """Write the last shard and the index; returns the number of samples and of tokens that fill no sample."""
        self.flush()
        end = max(len(self.state()[1]) - 1, 0) // self._length * self._length
        if end:
            self._write_shard(end)
        shards, rest = self.state()
        (self._folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
        num_samples = sum(int(entry["samples"]) for entry in shards)
        return num_samples, max(len(rest) - (1 if num_samples else 0), 0)

    def _write_shard(self, end: int) -> None:
        """Write tokens 0 to `end`: as a data set of one shard in a staging folder, renamed once it is on disk."""
        from streaming import MDSWriter  # brings transformers, scikit-learn and torchvision

        shards, stream = self.state()
        staging = self._folder / "staging"
        remove(staging)
        columns = {TOKEN_COLUMN: f"ndarray:{self._dtype}:{self._length + 1}"}
        writer = MDSWriter(columns=columns, out=str(staging), compression="zstd", hashes=["xxh64"], size_limit=None)
        for sample in sliding_window_view(stream[: end + 1], self._length + 1)[:: self._length]:
            writer.write({TOKEN_COLUMN: sample})
        writer.finish()
        (entry,) = json.loads((staging / "index.json").read_text())["shards"]
        for data in (entry["raw_data"], entry["zip_data"]):
            written, data["basename"] = data["basename"], data["basename"].replace("00000", f"{len(shards):05}")
        fsync_path(staging / written)
        (staging / written).replace(self._folder / data["basename"])
        fsync_path(self._folder)
        shutil.rmtree(staging)
        self._state = [*shards, entry], [stream[end:].copy()]  # not a view, which would keep the whole
