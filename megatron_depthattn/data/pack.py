"""From the documents of a split to its samples, and to its shards.

Sample i is tokens[i*N : i*N + N + 1] of the documents' tokens, one after the other: neighbours share one token, so
every token but the first is predicted exactly once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from megatron_depthattn.data.shard_writer import Samples, ShardWriter, Tokens, no_samples

State = Mapping[str, npt.NDArray[Any]]
"""Arrays that a `SplitWriter` continues from."""


class SplitWriter:
    """Writes the shards of one split from its documents, as they arrive.

    Args:
        folder: of the split.
        sequence_length: N; a sample holds N + 1 tokens.
        dtype: of the tokens.
        shards: index entries of shards that are there already.
        state: what followed them; empty at the start.
    """

    def __init__(
        self,
        folder: Path,
        sequence_length: int,
        dtype: str,
        shards: Sequence[dict[str, Any]] = (),
        state: State | None = None,
    ) -> None:
        self._length, state = sequence_length, state or {}
        samples = Samples(*(state[name] for name in Samples._fields)) if state else no_samples(sequence_length, dtype)
        self._shards = ShardWriter(folder, shards, samples)
        self._tokens: Tokens = state.get("stream", np.zeros(0, dtype))
        """Of the documents, those that no sample holds yet, from the last one of the last sample on."""
        self._starts: npt.NDArray[np.bool_] = state.get("stream_starts", np.zeros(0, bool))
        """Whether each of them begins a document."""
        self._seen = int(state.get("seen", 0))
        """Tokens of the document that has not ended."""

    def append(self, tokens: Tokens, lengths: npt.NDArray[np.int64], *, begins: bool = True, ends: bool = True) -> None:
        """Add documents; nothing is written before `flush`.

        Args:
            tokens: of the documents, one after the other.
            lengths: of each document, its EOS included.
            begins: whether the first document begins here.
            ends: whether the last one ends here.
        """
        if not len(lengths):
            return
        starts = np.zeros(len(tokens), bool)
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        starts[:1] &= begins or self._seen == 0
        self._seen = 0 if ends else int(lengths[-1]) + (0 if begins else self._seen)  # one that does not end is alone
        self._tokens, self._starts = np.concatenate([self._tokens, tokens]), np.concatenate([self._starts, starts])
        if end := (len(self._tokens) - 1) // self._length * self._length:
            tokens, starts = (
                sliding_window_view(array[: end + 1], self._length + 1)[:: self._length]
                for array in (self._tokens, self._starts)
            )
            self._shards.append(Samples(np.zeros(len(tokens), np.uint32), np.packbits(starts, axis=1), tokens))
            self._tokens, self._starts = self._tokens[end:].copy(), self._starts[end:].copy()

    def flush(self) -> None:
        """Write the shards that are full. See `ShardWriter.flush`."""
        self._shards.flush()

    def state(self) -> tuple[list[dict[str, Any]], State]:
        """Index entries and arrays that another writer continues from."""
        shards, samples = self._shards.state()
        own = {"stream": self._tokens, "stream_starts": self._starts, "seen": np.array(self._seen)}
        return shards, samples._asdict() | own

    def finish(self) -> dict[str, int]:
        """Write the last shard and the index; returns counts."""
        samples = self._shards.finish()
        tail = max(len(self._tokens) - (1 if samples else 0), 0)
        return {"samples": samples, "dropped_tail_tokens": tail}
