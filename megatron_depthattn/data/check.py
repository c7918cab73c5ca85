"""Whether a prepared corpus is whole: every file against its size and hash, every sample against the manifest."""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_depthattn.data.shard_files import BLOCK_BYTES, MISSING, damage, is_remote, open_plain
from megatron_depthattn.data.shard_index import INDEX_NAME, StoredFile
from megatron_depthattn.data.stored import TOKENIZER_FILE, StoredCorpus, StoredSplit, measure, on_this_machine
from megatron_depthattn.data.stream import AGAIN, MANIFEST_NAME

SOURCES_NAME = "sources.jsonl"
_OURS = re.compile(r"\.lock\.\d+")
"""What reading in place leaves beside the shards."""


@dataclass
class Checked:
    """What was found."""

    faults: list[str] = field(default_factory=list)
    """A line each: the file, what is wrong with it, what to do."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked."""
    files: int = 0
    bytes: int = 0
    samples: int = 0
    documents: int = 0
    """Of the samples and their documents, those in shards without a fault."""


def check_corpus(
    place: str, *, workers: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Checked:
    """Read all of a corpus; writes nothing, and removes what it downloads.

    Args:
        place: a local folder or a URL.
        workers: threads, each of which holds a shard.
        on_progress: gets the bytes read and those there are, after every shard.

    Raises:
        ValueError: there is no corpus.
    """
    checked = Checked()
    try:
        corpus = StoredCorpus(place)
    except ValueError as error:
        if is_remote(place) or not Path(place, MANIFEST_NAME).exists():
            raise
        checked.faults.append(str(error))
        return checked
    splits = []
    for name in corpus.split_names:
        if corpus.manifest and name not in corpus.manifest.get("splits", {}):
            checked.faults.append(f"{place}/{name}: {MANIFEST_NAME} names no such split: remove the folder, or {AGAIN}")
            continue
        try:
            splits.append(StoredSplit(corpus, name))
        except ValueError as error:
            checked.faults.append(str(error))
    _check_beside(corpus, checked)
    shards = [(split, number) for split in splits for number in range(len(split.index.shards))]
    total, done = sum(split.stored_file(number).bytes for split, number in shards), 0
    on_progress(0, total)
    found: dict[str, list[Counter[str] | None]] = {split.name: [] for split in splits}
    with ThreadPoolExecutor(workers) as pool:
        for (split, number), result in zip(shards, pool.map(_check_shard, shards), strict=True):
            stored = split.stored_file(number)
            done += stored.bytes
            checked.files, checked.bytes = checked.files + 1, checked.bytes + stored.bytes
            checked.faults += [result] if isinstance(result, str) else []
            found[split.name].append(None if isinstance(result, str) else result)
            on_progress(done, total)
    for split in splits:
        whole = [shard for shard in found[split.name] if shard]
        checked.samples += sum(shard["samples"] for shard in whole)
        checked.documents += sum(shard["documents"] for shard in whole)
        checked.faults += _check_files(split)
        if len(whole) == len(split.index.shards):
            held = Counter[str]()
            for counts in whole:
                held.update(counts)  # + would drop what is 0
            checked.faults += _check_counts(split, held)
    return checked


def _check_beside(corpus: StoredCorpus, checked: Checked) -> None:
    """The tokenizer and the list of sources, by their digests in the manifest."""
    manifest = corpus.manifest
    if not corpus.has_manifest:
        own = [name for name in (SOURCES_NAME, "tokenizer") if os.path.lexists(f"{corpus.place}/{name}")]
        message = f"{corpus.place}/{MANIFEST_NAME} {MISSING}"
        if own:
            checked.faults.append(f"{message}, and {own[0]} is there: {AGAIN}")
        else:
            checked.notes.append(f"{message}: vocabulary, tokenizer, documents and counts are not checked")
        return
    digests = {TOKENIZER_FILE: manifest.get("tokenizer_sha256")}
    digests[SOURCES_NAME] = manifest.get("sources", {}).get("list_sha256")
    digests |= {f"{name}/{INDEX_NAME}": of.get("index_sha256") for name, of in manifest.get("splits", {}).items()}
    for name, expected in digests.items():
        if expected is None:
            continue
        file = f"{corpus.place}/{name}"
        try:
            with on_this_machine(file) as path, open_plain(path, file) as stream:
                digest = hashlib.sha256()
                while block := stream.read(BLOCK_BYTES):
                    digest.update(block)
            is_same = digest.hexdigest() == expected
            if not is_same:
                checked.faults.append(f"{file} differs from its sha256 in {MANIFEST_NAME}: {AGAIN}")
        except FileNotFoundError:
            if not name.endswith(INDEX_NAME):  # that one is reported already
                checked.faults.append(f"{file} {MISSING}: {AGAIN}")
        except ValueError as error:
            checked.faults.append(str(error))
        checked.files += 1


def _check_shard(shard: tuple[StoredSplit, int]) -> Counter[str] | str:
    split, number = shard
    file = f"{split.place}/{split.stored_file(number).name}"
    try:
        samples = split.read(number)
        found = split.documents(number, samples) if split.index.stores_documents else None
    except (ValueError, OSError) as error:
        return str(error)
    tokens, manifest = samples.tokens, split.corpus.manifest
    is_end = tokens == manifest.get("eos_token_id", -1)
    conditions = [(tokens >= manifest.get("vocab_size", math.inf), "has tokens outside the vocabulary")]
    if split.corpus.has_manifest and not split.is_packed:
        differs = tokens[1:, 0] != tokens[:-1, -1]
        breaks = split.breaks - split.first_sample(number) - 1
        differs[breaks[(breaks >= 0) & (breaks < len(differs))]] = False
        differs = np.concatenate([[False], differs])
        conditions.append((differs, "does not begin with the last token of the one before"))
    if found and "eos_token_id" in manifest:
        conditions.append((~found.is_text & ~is_end, "has padding that is not EOS"))
        lacks = found.starts[:, 1:] & found.is_text[:, 1:] & ~is_end[:, :-1]
        is_cut = split.is_packed or bool(manifest.get("settings", {}).get("truncate"))
        conditions.append((lacks & (not is_cut), "has a document that begins where none ends"))
    for is_wrong, fault in conditions:
        if is_wrong.any():
            return f"{file}: its sample {int(np.argwhere(is_wrong)[0][0])} {fault}: {AGAIN}"
    counts = measure(split, samples, found)
    counts.update(documents=0 if found else int(is_end[:, :-1].sum()))
    return counts


def _check_files(split: StoredSplit) -> Iterator[str]:
    """Files beside the shards: those that no index names, and expanded shards that are damaged."""
    if split.corpus.is_remote:
        return
    known: dict[str, StoredFile] = {}
    for shard in split.index.shards:
        known |= {file.name: file for file in (shard.raw, shard.packed) if file}
    for name in sorted(os.listdir(split.place)):
        file = f"{split.place}/{name}"
        if name not in known and name != INDEX_NAME and not _OURS.fullmatch(name):
            yield f"{file} is no part of the corpus, {INDEX_NAME} does not name it: remove it"
    for shard in split.index.shards:
        if shard.packed and os.path.lexists(f"{split.place}/{shard.packed.name}"):
            wrong = damage(Path(split.place, shard.raw.name), shard.raw)
            if wrong not in (None, MISSING):
                yield f"{split.place}/{shard.raw.name} {wrong}: remove it, it is made again from {shard.packed.name}"


def _check_counts(split: StoredSplit, held: Counter[str]) -> Iterator[str]:
    """What the manifest counts against what the shards hold."""
    manifest, counts, file = split.corpus.manifest, split.counts, f"{split.corpus.place}/{MANIFEST_NAME}"
    dropped, num_breaks = counts.get("dropped_tail_tokens", 0), len(split.breaks)
    documents = counts.get("documents", 0)
    if not split.is_packed:
        held["tokens"] = split.num_samples * split.sequence_length + 1 + num_breaks + dropped
        # Documents also begin in what was dropped.
        held["documents"] = min(max(documents, held["documents"]), held["documents"] + dropped + 1 + num_breaks)
    else:
        held["documents"] = min(documents, held["documents"])  # a document that was cut begins several times
    if not split.index.stores_documents:
        del held["documents"]
    for key, value in held.items():
        if counts.get(key, value) != value:
            yield f"{file} counts {counts[key]} {key} in {split.name}, and its shards hold {value}: {AGAIN}"
    own = {"sequence_length": split.sequence_length, "token_dtype": split.index.dtype.name}
    for key, expected in own.items():
        if manifest.get(key, expected) != expected:
            yield f"{file} says {key} {manifest[key]}, and {split.name} has {expected}: {AGAIN}"
