"""Documents to samples, against the rules written out: any documents, arriving in any parts, stopped at any moment."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_depthattn.data import pack, shard_writer
from megatron_depthattn.data.pack import Packing, SplitWriter, best_fit
from tests.prepared import Stored, read_samples

END = np.zeros(1, np.uint16)
Chunk = tuple[list[int], list[int], bool, bool]
"""Tokens, lengths of documents, and whether the first begins and the last ends here."""


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW_TOKENS", 200)
        patch.setattr(pack, "WINDOW_SAMPLES", 4)
        patch.setattr(shard_writer, "SHARD_BYTES", 1000)
        yield


@st.composite
def corpora(draw):
    """Documents, the packing, a limit of tokens, and the seed of how they arrive."""
    length = draw(st.integers(2, 20))
    number, seed = draw(st.integers(1, 90)), draw(st.integers(0, 10**6))
    longest = draw(st.sampled_from([3, 12, 50]))
    rng = np.random.default_rng(seed)
    documents = [[*rng.integers(1, 999, rng.integers(1, longest)).tolist(), 0] for _ in range(number)]
    least = draw(st.none() | st.integers(1, 9))
    most = draw(st.none() | st.integers(max(2, least or 2), 30))
    packing = Packing(length, draw(st.sampled_from(["concat", "best-fit"])), most, least)
    return documents, packing, draw(st.none() | st.integers(length, 400)), seed


def chunks(documents: Sequence[list[int]], rng: np.random.Generator) -> list[Chunk]:
    """Whole documents together, or one in parts."""
    found: list[Chunk] = []
    left = list(documents)
    while left:
        if rng.random() < 0.4:
            document = left.pop(0)
            cuts = sorted({0, len(document), *rng.integers(0, len(document) + 1, 2).tolist()})
            for a, b in pairwise(cuts):
                found.append((document[a:b], [b - a], a == 0, b == len(document)))
        else:
            some, left = left[: (number := rng.integers(1, 20))], left[number:]
            found.append(([*chain(*some)], [len(document) for document in some], True, True))
    return found


def packed(
    given: Sequence[Chunk], packing: Packing, limit: int | None, stops: np.random.Generator | None = None
) -> tuple[Counter[str], Stored | None, dict[str, bytes]]:
    """Counts, samples and files; ``stops``: when another writer continues from what one has saved."""
    with TemporaryDirectory() as folder:
        split, counts = Path(folder, "split"), Counter[str]()
        writer = SplitWriter(split, packing, END, limit)
        for tokens, lengths, begins, ends in given:
            if (needed := writer.documents_needed(np.array(lengths), begins=begins)) is not None:
                lengths = lengths[:needed]
            arrays = np.array(tokens[: sum(lengths)], np.uint16), np.array(lengths, np.int64)
            counts.update(writer.append(*arrays, begins=begins, ends=ends))
            writer.flush()
            if stops is not None and stops.random() < 0.3:
                shards, state = writer.state()
                saved = {name: np.array(array) for name, array in state.items()}
                writer = SplitWriter(split, packing, END, limit, shards, saved)
            if writer.is_full:
                break
        counts.update(writer.finish())
        files = {file.name: file.read_bytes() for file in split.iterdir()}
        return counts, read_samples(split) if counts["samples"] else None, files


def kept(documents: Sequence[list[int]], packing: Packing, limit: int | None) -> list[list[int]]:
    """What --min-tokens, --truncate and --max-tokens leave of them."""
    found = [document[: packing.truncate] for document in documents if len(document) >= (packing.min_tokens or 0)]
    left, free = (limit or 10**9) + (packing.pack == "concat"), packing.pack == "best-fit"
    for number, document in enumerate(found):
        if left <= 0:
            return found[:number]
        found[number] = document[: left + free]
        left -= len(document) - free
    return found


def pieces(document: list[int], length: int) -> list[tuple[int, ...]]:
    """N + 1 tokens each, of which neighbours share one."""
    last = max(0, len(document) - 2) // length
    return [tuple(document[i * length : i * length + length + 1]) for i in range(last + 1)]


@settings(max_examples=60, deadline=None)
@given(corpora())
def test_every_token_is_where_the_rules_say_however_documents_arrive(corpus):
    documents, packing, limit, seed = corpus
    rng, length = np.random.default_rng(seed), packing.sequence_length
    counts, samples, files = packed(chunks(documents, rng), packing, limit)
    assert packed(chunks(documents, rng), packing, limit, stops=rng)[2] == files
    found = kept(documents, packing, limit)
    assert counts["tokens"] == sum(map(len, found))
    if limit is None:
        short = [len(document) for document in documents if len(document) < (packing.min_tokens or 0)]
        assert (counts["documents_below_min_tokens"], counts["tokens_below_min_tokens"]) == (len(short), sum(short))
        whole = sum(map(len, documents)) - sum(short)
        assert counts["truncated_tokens"] == whole - counts["tokens"]
    if samples is None:
        return
    is_text = np.arange(length + 1) < length + 1 - samples.padding[:, None]
    assert not samples.tokens[~is_text].any() and counts["padding_tokens"] == (~is_text).sum()
    assert counts["predicted_tokens"] == is_text[:, 1:].sum()
    assert counts["predicted_within_documents"] == (is_text & ~samples.starts)[:, 1:].sum()
    if packing.pack == "concat":
        stream = [*chain(*found)]
        ends = np.cumsum([len(document) for document in found])
        is_start = np.isin(np.arange(len(stream)), [0, *ends])
        begins = range(0, len(samples.tokens) * length, length)
        assert samples.tokens.tolist() == [stream[i : i + length + 1] for i in begins]
        assert samples.starts.tolist() == [is_start[i : i + length + 1].tolist() for i in begins]
        assert counts["dropped_tail_tokens"] == len(stream) - len(begins) * length - 1 < length
        spans = [(end - len(document), end) for document, end in zip(found, ends, strict=True)]
        holding = [any(i <= a and b <= i + length + 1 for i in range(0, b, length)) for a, b in spans]
        assert counts["cut_documents"] == holding.count(False)
    else:
        stored = []
        for tokens, starts, text in zip(samples.tokens, samples.starts, is_text, strict=True):
            assert starts[0]
            stored += [tuple(part.tolist()) for part in np.split(tokens[text], np.flatnonzero(starts & text)[1:])]
        assert sorted(stored) == sorted(piece for document in found for piece in pieces(document, length))
        assert counts["cut_documents"] == sum(len(document) > length + 1 for document in found)
        assert limit is None or counts["predicted_within_documents"] <= limit


@given(st.lists(st.integers(1, 30), max_size=60))
def test_each_piece_lies_in_the_fullest_sample_that_holds_it(sizes):
    """By trying all samples; of two as full, in the one that was filled last."""
    slow: list[list[int]] = []  # the sample that was filled last is the last one
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        room = {n: 30 - sum(sizes[j] for j in pieces) for n, pieces in enumerate(slow)}
        fits = [n for n in room if room[n] >= sizes[i]]
        slow.append([*(slow.pop(min(fits, key=lambda n: (room[n], -n))) if fits else []), i])
    assert sorted(best_fit(sizes, 30)) == sorted(map(sorted, slow))


def test_windows_pad_little_and_no_window_pads_more():
    """The control: with as many tokens a window as a sample has, documents find no others to lie with."""
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 999, size).tolist(), 0] for size in rng.integers(2, 70, 2000)]
    given, packing = chunks(documents, rng), Packing(64, "best-fit")

    def share(window: int) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack, "WINDOW_TOKENS", window)
            patch.setattr(pack, "WINDOW_SAMPLES", 1)
            patch.setattr(shard_writer, "SHARD_BYTES", 1 << 20)
            counts = packed(given, packing, None)[0]
        return counts["padding_tokens"] / counts["samples"] / 65

    assert share(20_000) < 0.02 < 0.1 < share(65)
