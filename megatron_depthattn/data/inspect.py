"""What a prepared corpus holds: counts, lengths of documents, one sample with the borders of its documents, hashes."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_depthattn.data.check import SOURCES_NAME
from megatron_depthattn.data.shard_files import open_plain
from megatron_depthattn.data.stored import TOKENIZER_FILE, StoredCorpus, StoredSplit, on_this_machine
from megatron_depthattn.data.stream import AGAIN, pack_of

MAX_SHARDS = 64
"""Read of a split unless more is asked for: 2 GiB of tokens."""
Numbers = npt.NDArray[Any]


def inspect_corpus(
    place: str,
    *,
    split: str | None = None,
    sample: int | None = None,
    shards: int = MAX_SHARDS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """All that can be said of a corpus, as JSON holds it; writes nothing.

    Args:
        place: a local folder or a URL.
        split: describe only this one.
        sample: the number of the sample to show, of `split` or the first split.
        shards: count documents in at most so many shards of a split, spread evenly; 0: in all.
        on_progress: gets the shards read and those to be read.

    Raises:
        ValueError: there is no such corpus, split or sample, or what is read of it is damaged.
    """
    corpus = StoredCorpus(place)
    chosen = [corpus.split(split)] if split else corpus.splits()
    number = sample or 0
    if not 0 <= number < chosen[0].num_samples:
        raise ValueError(f"--sample {number}: {chosen[0].place} has the samples 0 to {chosen[0].num_samples - 1}")
    manifest, content = corpus.manifest, corpus.small_file(TOKENIZER_FILE)
    digest = hashlib.sha256(content).hexdigest() if content else None
    keys = ("format_version", "sequence_length", "vocab_size", "eos_token_id", "token_dtype", "tokenizer_sha256")
    reads = {each.name: _evenly(len(each.index.shards), shards) for each in chosen}
    total, done = sum(map(len, reads.values())), 0
    described = {}
    for each in chosen:
        described[each.name] = _describe(each, reads[each.name], partial(_report, on_progress, done, total))
        done += len(reads[each.name])
    return {
        "corpus": corpus.place,
        **{key: manifest.get(key) for key in keys},
        "sequence_length": chosen[0].sequence_length,
        "token_dtype": chosen[0].index.dtype.name,
        "pack": pack_of(manifest),
        "tokenizer_is_that_of_the_manifest": digest and digest == manifest.get("tokenizer_sha256"),
        "splits": described,
        "settings": manifest.get("settings"),
        "skipped": manifest.get("skipped"),
        "first_damaged_record": manifest.get("first_damaged_record"),
        "sources": manifest.get("sources"),
        "outcomes": _outcomes(corpus),
        "sample": _show(chosen[0], number, content),
    }


def _report(on_progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def _evenly(there: int, wanted: int) -> list[int]:
    """Numbers of shards, spread evenly."""
    return sorted({i * there // wanted for i in range(wanted)}) if 0 < wanted < there else [*range(there)]


def _outcomes(corpus: StoredCorpus) -> dict[str, Any] | None:
    """What became of the source files: how many by outcome, and the first messages."""
    outcomes: Counter[str] = Counter()
    messages: list[str] = []
    digest = hashlib.sha256()
    file = f"{corpus.place}/{SOURCES_NAME}"
    try:
        with on_this_machine(file) as path, open_plain(path, file) as stream:
            for line in stream:
                digest.update(line)
                entry = json.loads(line)
                outcomes[str(entry["outcome"])] += 1
                if entry["outcome"] not in ("read", "not reached") and len(messages) < 10:
                    messages.append(f"{entry['name']}: {entry['outcome']} {entry.get('message') or ''}".rstrip())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if corpus.is_remote:
            return None
        raise ValueError(f"{file} cannot be read: {error}") from error
    return {"count": dict(outcomes), "first": messages, "sha256": digest.hexdigest()}


def _describe(split: StoredSplit, numbers: list[int], on_progress: Callable[[int], None]) -> dict[str, Any]:
    shards, counts = split.index.shards, split.counts
    has_borders = split.index.stores_documents or "eos_token_id" in split.corpus.manifest
    lengths = DocumentLengths(split)
    for done, number in enumerate(numbers if has_borders else []):
        lengths.add(number)
        on_progress(done + 1)
    return {
        "samples": split.num_samples,
        **{key: value for key, value in counts.items() if key not in ("breaks", "samples")},
        "shards": len(shards),
        "bytes_raw": sum(shard.raw.bytes for shard in shards),
        "bytes_stored": sum(split.stored_file(number).bytes for number in range(len(shards))),
        "index_sha256": split.index.digest,
        "stores_documents": split.index.stores_documents,
        "shards_read": len(numbers) if has_borders else 0,
        "documents_read": lengths.figures() if has_borders else None,
    }


class DocumentLengths:
    """Collects the documents of shards, as they are stored: with best-fit each piece of one that was cut."""

    def __init__(self, split: StoredSplit) -> None:
        self._split, self._lengths = split, [np.zeros(0, np.int64)]
        self._cut = self._read = self._padding = 0
        self._next_shard, self._left, self._is_open_cut = 0, 0, False
        """Tokens of the document that has not ended; whether it goes beyond a sample."""

    def add(self, number: int) -> None:
        """Read a shard; the numbers ascend."""
        split, samples = self._split, self._split.read(number)
        found, first = split.documents(number, samples), split.first_sample(number)
        if number != self._next_shard:
            self._left = -1  # where the first one begins is not known
        own = found.is_text  # the token that two samples share counts as the first of the later one
        if not split.is_packed:
            ends = np.array([*split.breaks, split.num_samples]) - first - 1
            own[:, -1] = np.isin(np.arange(len(own)), ends)
        begins = np.flatnonzero(found.starts[own])
        all_begins, ends = np.array([-max(self._left, 0), *begins]), np.array([*begins, int(own.sum())])
        inner = np.cumsum(own.sum(1)) - own.sum(1)  # where samples begin
        # A document of which a sample holds all but EOS, which the next begins with, is whole in that sample.
        is_cut = np.searchsorted(inner, ends - 1) > np.searchsorted(inner, all_begins, side="right")
        is_cut[0] |= self._is_open_cut
        lengths = ends - all_begins
        is_known = (np.arange(len(lengths)) > 0) | (self._left >= 0)
        is_last = number == len(split.index.shards) - 1
        done = is_known & (lengths > 0) & ((np.arange(len(lengths)) < len(lengths) - 1) | is_last | split.is_packed)
        self._lengths.append(lengths[done])
        self._cut += int(is_cut[done].sum())
        self._left = int(lengths[-1]) * (not split.is_packed) if is_known[-1] else -1
        self._is_open_cut = bool(is_cut[-1]) and not split.is_packed
        self._next_shard, self._read = number + 1, self._read + len(own)
        self._padding += int(found.padding.sum())

    def figures(self) -> dict[str, Any]:
        """The figures of all that was added."""
        lengths, per_sample = np.concatenate(self._lengths), self._split.sequence_length + 1
        number, counts = max(len(lengths), 1), self._split.counts
        cut = self._cut / number
        if self._split.is_packed:  # pieces do not say to which document they belong
            cut = counts.get("cut_documents", 0) / max(counts.get("documents", 1), 1)
        figures = {"count": len(lengths), "share_cut": cut, "share_padding": self._padding / (self._read * per_sample)}
        if len(lengths):
            values = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf").tolist()
            figures |= dict(zip(("min", "median", "p90", "p99", "max"), map(int, values), strict=True))
            figures |= {"mean": float(lengths.mean())}
            figures |= {"share_longer_than_a_sample": int((lengths > per_sample).sum()) / number}
        return figures


def _show(split: StoredSplit, number: int, tokenizer: bytes | None) -> dict[str, Any]:
    """A sample, document after document; each as text where there is a tokenizer."""
    from tokenizers import Tokenizer

    shard = int(np.searchsorted(split.ends, number, side="right"))
    samples, row = split.read(shard), number - split.first_sample(shard)
    tokens = samples.tokens[row]
    try:
        found = split.documents(shard, samples)
        starts, padding = found.starts[row], int(found.padding[row])
    except ValueError:  # nothing says where documents end
        starts, padding = np.zeros(len(tokens), bool), 0
    try:
        decoder = Tokenizer.from_str(tokenizer.decode()) if tokenizer else None
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{split.corpus.place}/{TOKENIZER_FILE} does not load: {error}; {AGAIN}") from error
    borders = sorted({0, *np.flatnonzero(starts).tolist()})
    documents = []
    for begin, end in zip(borders, [*borders[1:], len(tokens)], strict=True):
        ids = tokens[begin:end].tolist()
        documents.append(
            {
                "begin": begin,
                "begins_here": bool(starts[begin]),
                "ends_here": ids[-1] == split.corpus.manifest.get("eos_token_id"),
                "is_padding": begin >= len(tokens) - padding,
                "tokens": ids,
                "text": decoder.decode(ids, skip_special_tokens=False) if decoder else None,
            }
        )
    return {"split": split.name, "number": number, "shard": split.stored_file(shard).name, "documents": documents}
