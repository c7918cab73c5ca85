"""What a run reads: one prepared corpus, or several in proportions, as one numbered set of samples."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache as memoized
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_depthattn.data.order import (
    SLOTS_PER_BLOCK,
    Ids,
    MixedSequence,
    SampleIds,
    SampleSequence,
    StagedMixture,
    slots_of,
    window_of,
)
from megatron_depthattn.data.stream import MANIFEST_NAME, Sample, TokenDataset


class Corpus(Dataset[torch.Tensor]):
    """One split of all streams of a run. Sample ids count through the streams, in the order of the config.

    Args:
        paths: prepared corpora; local folders or remote URLs.
        proportions: the share of each in what is read, of any sum.
        split: "train" or "val".
        later: other proportions, each from a position of the order on.
        sequence_length: what the model will be trained with; None takes what the corpora have.
        cache, cache_limit: see `TokenDataset`.

    Raises:
        ValueError: a corpus cannot be opened, or two do not fit together.
    """

    def __init__(
        self,
        paths: Sequence[str],
        proportions: Sequence[float],
        split: str,
        *,
        later: Sequence[tuple[int, Sequence[float]]] = (),
        sequence_length: int | None = None,
        cache: str | Path | None = None,
        cache_limit: int | None = None,
    ) -> None:
        self.stages = [(first, slots_of(shares)) for first, shares in ((0, proportions), *later)]
        self._mixture = memoized(partial(StagedMixture, self.stages))
        self.streams: list[TokenDataset] = []
        for path in paths:
            stream = TokenDataset(path, split, sequence_length=sequence_length, cache=cache, cache_limit=cache_limit)
            self.streams.append(stream)
            sequence_length = self.streams[0].sequence_length
        self.sequence_length = self.streams[0].sequence_length
        for stream in self.streams:
            if len(paths) > 1 and stream.tokenizer is None:
                raise ValueError(
                    f"{stream.path} has no {MANIFEST_NAME} that names its tokenizer, so it cannot be mixed with other "
                    "streams: prepare it with depthattn prepare"
                )
            check_same_tokenizer(stream, self.streams[0])
        self.offsets = (0, *accumulate(stream.num_samples for stream in self.streams))

    @property
    def digest(self) -> str:
        """A digest of what the ids stand for: every shard's hash, stream after stream. Paths do not count."""
        return hashlib.sha256("".join(stream.digest for stream in self.streams).encode()).hexdigest()

    @property
    def pads(self) -> bool:
        """Whether samples can end in padding."""
        return any(stream.pads for stream in self.streams)

    def __len__(self) -> int:
        return self.offsets[-1]

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tokens of one sample: int64 [sequence_length + 1]. See `TokenDataset`."""
        stream, own = self._place(index)
        return stream[own]

    def sample(self, index: int) -> Sample:
        """One sample with the borders of its documents. See `TokenDataset`."""
        stream, own = self._place(index)
        return stream.sample(own)

    def _place(self, index: int) -> tuple[TokenDataset, int]:
        stream = bisect_right(self.offsets, index) - 1
        return self.streams[stream], index - self.offsets[stream]

    def shards_of(self, ids: Ids) -> list[tuple[int, int]]:
        """Stream and number of the shards that hold samples, in the order of the samples, each once."""
        streams = np.searchsorted(self.offsets, ids, side="right") - 1
        shards = np.empty_like(streams)
        for number, stream in enumerate(self.streams):
            here = streams == number
            shards[here] = stream.shards_of(ids[here] - self.offsets[number])
        return [*dict.fromkeys(zip(streams.tolist(), shards.tolist(), strict=True))]

    def sequence(self, *, seed: int, shuffle: bool) -> SampleIds:
        """The endless sequence of sample ids."""
        own = [
            SampleSequence(stream.samples_per_shard, seed=seed, shuffle=shuffle, stream=number)
            for number, stream in enumerate(self.streams)
        ]
        return own[0] if len(own) == 1 else MixedSequence(self._mixture(seed), own, self.offsets)

    def consumed(self, samples: int, *, seed: int) -> Ids:
        """How many of the first samples of the order are of each stream: int64 [number of streams]."""
        return self._mixture(seed).consumed(samples)

    @property
    def shuffled_bytes(self) -> int:
        """About how many bytes of shards a shuffled run reads from at the same time."""
        return sum(
            sum(stream.bytes_of(shard)[0] for shard in range(len(stream.samples_per_shard)))
            * min(stream.num_samples, window_of(stream.samples_per_shard) + int(stream.samples_per_shard.max()))
            // stream.num_samples
            for stream in self.streams
        )

    def epochs(self, consumed_samples: int, *, seed: int) -> list[float]:
        """How many times each stream has been read after so many samples."""
        consumed = self.consumed(consumed_samples, seed=seed)
        return [int(count) / stream.num_samples for count, stream in zip(consumed, self.streams, strict=True)]

    def describe(self, consumed_samples: int, last_sample: int, *, seed: int) -> list[str]:
        """One line a stream, for people: its samples, its share, and the epochs read so far and at the end."""
        now, end = self.epochs(consumed_samples, seed=seed), self.epochs(last_sample, seed=seed)
        lines = []
        for number, (stream, offset) in enumerate(zip(self.streams, self.offsets, strict=False)):
            shares = ", then ".join(f"{100 * slots[number] / SLOTS_PER_BLOCK:g} %" for _, slots in self.stages)
            lines.append(
                f"stream {number}: {stream.path}: {stream.num_samples:,} samples (ids from {offset}), {shares} of what "
                f"is read; epochs read {now[number]:.2f}, at the end {end[number]:.2f}"
            )
        return lines


def check_same_tokenizer(stream: TokenDataset, other: TokenDataset) -> None:
    """Raise ValueError if the manifests of two corpora name two tokenizers."""
    if None not in (stream.tokenizer, other.tokenizer) and stream.tokenizer != other.tokenizer:
        raise ValueError(
            f"{stream.path} was tokenised with another tokenizer (sha256 {str(stream.tokenizer)[:12]}) than "
            f"{other.path} ({str(other.tokenizer)[:12]}): prepare all with one --tokenizer"
        )
