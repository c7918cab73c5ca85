"""From the documents of a split to its samples, and to its shards. Documents count with their EOS.

concat: sample i is tokens[i*N : i*N + N + 1] of the documents' tokens, one after the other: neighbours share one token,
so every token but the first is predicted exactly once.

best-fit: a sample holds whole documents, and padding where they leave room. A longer document is cut into pieces of
N + 1 tokens that share one, so that every token but its first is predicted exactly once; its last piece is packed as
documents are. Documents wait in a window of a fixed number of tokens. When it is full they are taken by length, the
longest first, each into the sample with the least room that holds it. The emptiest samples are undone, and their
documents begin the next window; the others are stored in the order of the first document of each.
(Best-fit-decreasing bin packing; https://arxiv.org/abs/2404.10830.)
"""

import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from megatron_depthattn.data.shard_writer import Samples, ShardWriter, Tokens, no_samples

WINDOW_TOKENS = 1 << 22
WINDOW_SAMPLES = 16
"""A window of best-fit is full with that many tokens, or tokens for that many samples if those are more."""
FULL = 0.99
"""A sample of best-fit that is less full is undone, unless the samples undone before it hold half a window."""
Ints = npt.NDArray[np.int64]
State = Mapping[str, npt.NDArray[Any]]
"""Arrays that a `SplitWriter` continues from."""


class Packing(NamedTuple):
    """What decides which tokens of the documents are where in which sample."""

    sequence_length: int
    """N; a sample holds N + 1 tokens."""
    pack: str = "concat"
    """concat or best-fit."""
    truncate: int | None = None
    """Tokens that are kept of a document, from its beginning; EOS only where it is among them. None: all."""
    min_tokens: int | None = None
    """Documents of fewer tokens are left out."""


class SplitWriter:
    """Writes the shards of one split from its documents, as they arrive.

    Args:
        folder: of the split.
        packing: how.
        end: EOS, in the type of the tokens, [1].
        max_tokens: how many tokens to predict there may be; the last document is cut there. With concat these are all
            that follow the first, with best-fit all but the first of each document.
        shards: index entries of shards that are there already.
        state: what followed them; empty at the start.
    """

    def __init__(
        self,
        folder: Path,
        packing: Packing,
        end: Tokens,
        max_tokens: int | None = None,
        shards: Sequence[dict[str, Any]] = (),
        state: State | None = None,
    ) -> None:
        state = state or {}
        self._least, self._most = packing.min_tokens or 0, packing.truncate or sys.maxsize
        self._is_concat = packing.pack == "concat"
        self._packer = (_Concat if self._is_concat else _BestFit)(packing.sequence_length, end, state)
        nothing = no_samples(packing.sequence_length, str(end.dtype))
        self._shards = ShardWriter(
            folder, shards, Samples(**{n: state.get(n, a) for n, a in nothing._asdict().items()})
        )
        self._left = int(state.get("left", sys.maxsize if max_tokens is None else max_tokens + self._is_concat))
        """Tokens of `max_tokens` that are still to come."""
        self._seen = int(state.get("seen", 0))
        """Tokens that there were of the document that has not ended."""
        self._held: Tokens = state.get("held", end[:0])
        """All of them, while they are fewer than `min_tokens`."""

    @property
    def is_full(self) -> bool:
        """Whether the tokens of `max_tokens` are there."""
        return self._left <= 0

    def documents_needed(self, lengths: Ints, *, begins: bool = True) -> int | None:
        """How many of these documents make it full; None: all of them do not. Arguments as for `append`."""
        costs = np.cumsum(self._costs(*self._kept(lengths, begins)))
        return None if not len(costs) or costs[-1] < self._left else int(np.argmax(costs >= self._left)) + 1

    def append(self, tokens: Tokens, lengths: Ints, *, begins: bool = True, ends: bool = True) -> Counter[str]:
        """Add documents; nothing is written before `flush`. The last one may make it full, none before.

        Args:
            tokens: of the documents, one after the other.
            lengths: of each document, its EOS included.
            begins: whether the first document begins here; otherwise it is the only one.
            ends: whether the last one ends here; otherwise it is the only one.

        Returns:
            What to add to the split's counts.
        """
        if not len(lengths):
            return Counter()
        kept, is_new = self._kept(lengths, begins)
        cost = int(self._costs(kept, is_new).sum())
        kept[-1] -= max(0, cost - self._left)
        self._left = max(0, self._left - cost)
        seen, held = (0, self._held[:0]) if begins else (self._seen, self._held)
        totals, available = lengths.copy(), lengths.copy()
        totals[0] += seen  # of each document, with what came before
        available[0] += len(held)
        tokens = np.concatenate([held, tokens])
        is_kept, begin = np.ones(len(tokens), bool), np.cumsum(available) - available
        for i in np.flatnonzero(kept < available).tolist():
            is_kept[begin[i] + kept[i] : begin[i] + available[i]] = False
        is_held = not ends and totals[-1] < self._least
        self._seen, self._held = (0, held[:0]) if ends else (int(totals[-1]), tokens if is_held else held[:0])
        ended = totals if ends else totals[:0]
        short, long = ended[ended < self._least], ended[(ended >= self._least) & (ended > self._most)]
        counts = Counter(tokens=int(is_kept.sum()), documents=-len(short))
        counts.update(documents_below_min_tokens=len(short), tokens_below_min_tokens=int(short.sum()))
        counts.update(truncated_documents=len(long), truncated_tokens=int((long - self._most).sum()))
        chosen = kept > 0
        if not chosen.any():
            if is_new[0] or not ends:
                return counts
            chosen[0] = True  # the end of a document, all of whose tokens came before
        flags = {"begins": bool(is_new[chosen][0]), "ends": ends or self.is_full}
        samples, more = self._packer.append(tokens[is_kept], kept[chosen], **flags)
        counts.update(self._store(samples))
        counts.update(more)
        return counts

    def _kept(self, lengths: Ints, begins: bool) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """How many tokens of each document are to be packed now, and whether they are its first."""
        before = np.zeros_like(lengths)
        before[:1] = 0 if begins else self._seen
        earlier, now = (
            np.where(total >= self._least, np.minimum(total, self._most), 0) for total in (before, before + lengths)
        )
        return now - earlier, earlier == 0

    def _costs(self, kept: Ints, is_new: npt.NDArray[np.bool_]) -> Ints:
        """Of `max_tokens`."""
        return kept if self._is_concat else kept - (is_new & (kept > 0))

    def _store(self, samples: Samples) -> Counter[str]:
        length, padding = samples.tokens.shape[1] - 1, samples.padding.astype(np.int64)
        self._shards.append(samples)
        starts = np.unpackbits(samples.starts, axis=1)[:, 1:].sum() - (padding > 0).sum()
        predicted = int((length - np.minimum(padding, length)).sum())
        return Counter(
            predicted_tokens=predicted,
            predicted_within_documents=predicted - int(starts),
            padding_tokens=int(padding.sum()),
        )

    def flush(self) -> None:
        """Write the shards that are full. See `ShardWriter.flush`."""
        self._shards.flush()

    def state(self) -> tuple[list[dict[str, Any]], State]:
        """Index entries and arrays that another writer continues from."""
        shards, samples = self._shards.state()
        own = {"left": np.array(self._left), "seen": np.array(self._seen), "held": self._held}
        return shards, {**samples._asdict(), **own, **self._packer.state()}

    def finish(self) -> Counter[str]:
        """Write the last shard and the index; returns what to add to the split's counts."""
        samples, more = self._packer.finish()
        counts = self._store(samples)
        counts.update(more)
        counts.update(samples=self._shards.finish())
        return counts


class _Concat:
    """Cuts the documents, one after the other, into samples."""

    def __init__(self, length: int, end: Tokens, state: State) -> None:
        self._length, self._none = length, no_samples(length, str(end.dtype))
        self._tokens: Tokens = state.get("stream", end[:0])
        """Those that no sample holds yet, from the last one of the last sample on."""
        self._starts: npt.NDArray[np.bool_] = state.get("stream_starts", np.zeros(0, bool))
        self._position, self._begin = int(state.get("position", 0)), int(state.get("begin", 0))
        """Tokens before the next one; before the document that has not ended."""

    def state(self) -> State:
        position = {"position": np.array(self._position), "begin": np.array(self._begin)}
        return {"stream": self._tokens, "stream_starts": self._starts} | position

    def append(self, tokens: Tokens, lengths: Ints, *, begins: bool, ends: bool) -> tuple[Samples, Counter[str]]:
        last = np.cumsum(lengths)
        starts = np.zeros(len(tokens), bool)
        starts[(last - lengths)[0 if begins else 1 :]] = True
        first, last = self._position + last - lengths, self._position + last
        first[0] = first[0] if begins else self._begin
        self._position, self._begin = int(last[-1]), int(first[-1])
        is_cut = last - 1 > first // self._length * self._length + self._length
        cut = Counter(cut_documents=int(is_cut.sum()) if ends else 0)
        self._tokens, self._starts = np.concatenate([self._tokens, tokens]), np.concatenate([self._starts, starts])
        end = (len(self._tokens) - 1) // self._length * self._length
        if end <= 0:
            return self._none, cut
        tokens, starts = (
            sliding_window_view(array[: end + 1], self._length + 1)[:: self._length]
            for array in (self._tokens, self._starts)
        )
        self._tokens, self._starts = self._tokens[end:].copy(), self._starts[end:].copy()
        return Samples(np.zeros(len(tokens), np.uint32), np.packbits(starts, axis=1), tokens), cut

    def finish(self) -> tuple[Samples, Counter[str]]:
        tail = len(self._tokens) - (1 if self._position > self._length else 0)
        return self._none, Counter(dropped_tail_tokens=max(tail, 0))


class _BestFit:
    """Puts whole documents, and pieces of those that are too long, together in samples."""

    def __init__(self, length: int, end: Tokens, state: State) -> None:
        self._room, self._end = length + 1, end
        self._window = max(WINDOW_TOKENS, WINDOW_SAMPLES * self._room)
        self._tokens: Tokens = state.get("stream", end[:0])
        """Of the pieces that wait, one after the other."""
        self._sizes: Ints = state.get("sizes", np.zeros(0, np.int64))
        """Of the pieces that wait."""
        self._open: Tokens = state.get("open", end[:0])
        """Of the document that has not ended, what no piece holds yet, from the last token of its last piece on."""
        self._pieces = int(state.get("pieces", 0))
        """Of that document."""

    def state(self) -> State:
        return {"stream": self._tokens, "sizes": self._sizes, "open": self._open, "pieces": np.array(self._pieces)}

    def append(self, tokens: Tokens, lengths: Ints, *, begins: bool, ends: bool) -> tuple[Samples, Counter[str]]:
        tokens, lengths = np.concatenate([self._open, tokens]), lengths.copy()
        lengths[0] += len(self._open)
        sizes: list[int] = []
        again: list[int] = []  # tokens that two pieces share
        left, begin, num_cut, of_document = 0, 0, 0, 0 if begins else self._pieces
        for number, length in enumerate(lengths.tolist()):
            full = max(length - 1, 0) // (self._room - 1)
            left = length - full * (self._room - 1)
            sizes += [self._room] * full
            again += [begin + i * (self._room - 1) for i in range(1, full + 1)]
            of_document += full
            begin += length
            if number < len(lengths) - 1 or ends:
                if left > 1 or not of_document:
                    sizes.append(left)
                    of_document += 1
                elif full:
                    again.pop()  # nothing follows
                num_cut += of_document > 1
                left = of_document = 0
        self._pieces = of_document
        if again:
            tokens = np.insert(tokens, np.array(again) + 1, tokens[again])
        end = sum(sizes)
        self._open = tokens[len(tokens) - left :].copy()
        self._tokens = np.concatenate([self._tokens, tokens[:end]])
        self._sizes = np.concatenate([self._sizes, np.array(sizes, np.int64)])
        packed = list(self._full_windows())
        return Samples(*map(np.concatenate, zip(*packed, strict=True))), Counter(cut_documents=num_cut)

    def finish(self) -> tuple[Samples, Counter[str]]:
        """As if a document that has not ended ended here."""
        cut: Counter[str] = Counter()
        rest = [no_samples(self._room - 1, str(self._end.dtype))]
        if len(self._open):
            samples, cut = self.append(self._end[:0], np.zeros(1, np.int64), begins=False, ends=True)
            rest.append(samples)
        if len(self._sizes):
            rest.append(self._pack(len(self._sizes), is_last=True))
        return Samples(*map(np.concatenate, zip(*rest, strict=True))), cut

    def _full_windows(self) -> Iterator[Samples]:
        yield no_samples(self._room - 1, str(self._end.dtype))
        while len(full := np.flatnonzero(np.cumsum(self._sizes) >= self._window)):
            yield self._pack(int(full[0]) + 1, is_last=False)

    def _pack(self, count: int, *, is_last: bool) -> Samples:
        """Pack the first `count` pieces; what is undone stays before the others."""
        sizes, begins = self._sizes[:count].tolist(), (np.cumsum(self._sizes) - self._sizes).tolist()
        packed = best_fit(sizes, self._room)
        undone: list[list[int]] = []
        if not is_last:
            left = self._window // 2
            for pieces in sorted(packed, key=lambda pieces: (sum(sizes[i] for i in pieces), pieces)):
                size = sum(sizes[i] for i in pieces)
                if size >= FULL * self._room or size > left:
                    break
                left -= size
                undone.append(pieces)
        waiting = {i for pieces in undone for i in pieces}
        packed = sorted(pieces for pieces in packed if pieces[0] not in waiting)
        tokens = np.full((len(packed), self._room), self._end, self._end.dtype)
        starts, padding = np.zeros(tokens.shape, bool), np.zeros(len(packed), np.uint32)
        for row, pieces in enumerate(packed):
            at = 0
            for i in pieces:
                tokens[row, at : at + sizes[i]] = self._tokens[begins[i] : begins[i] + sizes[i]]
                starts[row, at] = True
                at += sizes[i]
            padding[row] = self._room - at
            starts[row, at : at + 1] = True
        rest = sum(sizes)
        kept = [self._tokens[begins[i] : begins[i] + sizes[i]] for i in sorted(waiting)]
        self._tokens = np.concatenate([*kept, self._tokens[rest:]])
        self._sizes = np.concatenate([np.array([sizes[i] for i in sorted(waiting)], np.int64), self._sizes[count:]])
        return Samples(padding, np.packbits(starts, axis=1), tokens)


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit-decreasing: the numbers of the pieces that lie together, ascending, none of more than `room` in all."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # ascending, those that some bin has left
    with_room: dict[int, list[int]] = {}
    for i in np.argsort(-np.array(sizes, np.int64), kind="stable").tolist():
        at = bisect_left(rooms, sizes[i])
        if at == len(rooms):
            number, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            number = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
        bins[number].append(i)
        left -= sizes[i]
        if left:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(number)
    return [sorted(pieces) for pieces in bins]
