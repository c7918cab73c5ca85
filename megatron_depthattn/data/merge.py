"""One corpus of several, and several of one: whole shards are linked, others written again; nothing is tokenised again.

The result is made beside its name and gets it when it is complete, as `prepare.py` does it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_depthattn.data.check import SOURCES_NAME
from megatron_depthattn.data.shard_files import damage, open_plain
from megatron_depthattn.data.shard_index import INDEX_NAME
from megatron_depthattn.data.shard_writer import Samples, ShardWriter, no_samples
from megatron_depthattn.data.stored import (
    TOKENIZER_FILE,
    Documents,
    StoredCorpus,
    StoredSplit,
    measure,
    on_this_machine,
)
from megatron_depthattn.data.stream import AGAIN, MANIFEST_NAME, pack_of
from megatron_depthattn.data.unfinished import open_unfinished
from megatron_depthattn.durable import fsync_tree, publish_folder, recover_folder

SAME = ("tokenizer_sha256", "vocab_size", "eos_token_id", "sequence_length", "token_dtype", "format_version")
TOKENIZER_FILES = (TOKENIZER_FILE, *(f"tokenizer/{name}.json" for name in ("tokenizer_config", "special_tokens_map")))
"""Copied of a remote corpus, whose folders cannot be listed."""


class Piece(NamedTuple):
    """Consecutive samples of a shard."""

    split: StoredSplit
    shard: int
    begin: int
    end: int

    @property
    def is_whole(self) -> bool:
        return self.end - self.begin == self.split.index.shards[self.shard].samples


def merge_corpora(places: Sequence[str], output: Path) -> list[str]:
    """Write one corpus of several; returns what was done, in lines.

    Raises:
        ValueError: they do not fit together, or `output` is there already.
    """
    if len(places) < 2:
        raise ValueError(f"merge {' '.join(places)}: name two corpora or more")
    corpora = [_opened(place, output) for place in places]
    for other in corpora[1:]:
        _check_same(corpora[0], other)
    names = dict.fromkeys(name for corpus in corpora for name in corpus.split_names)
    splits = {name: [each.split(name) for each in corpora if name in each.split_names] for name in names}
    for name in names:
        _check_columns_and_copies(splits[name])
    first = corpora[0].manifest
    settings = {
        **_settings("merge", corpora),
        "parts": [{"corpus": each.place, "settings": each.manifest.get("settings")} for each in corpora],
    }
    with _made(output) as folder:
        lines, counts = [], {}
        for name, parts in splits.items():
            pieces = [piece for part in parts for piece in _pieces(part, 0, part.num_samples)]
            lines.append(f"{name}: {_write_split(folder / name, pieces)}, of {len(parts)} corpora")
            counts[name] = _joined_counts(parts)
        skipped: Counter[str] = sum((Counter(each.manifest.get("skipped")) for each in corpora), Counter())
        damages = [each.manifest.get("first_damaged_record") for each in corpora]
        shared = {key: first.get(key) for key in SAME} | {"skipped": dict(skipped)}
        shared |= {"first_damaged_record": next(filter(None, damages), None)}
        _finish(folder, corpora, shared, counts, settings)
    return [f"merged {output}", *(f"  {line}" for line in lines)]


def split_corpus(
    place: str, output: Path, *, parts: int | None = None, fraction: float | None = None, samples: int | None = None
) -> list[str]:
    """Write the parts of a corpus, `output`/part-0 and so on, each with consecutive samples of every split.

    Raises:
        ValueError: there are not enough samples, or `output` is there already.
    """
    corpus = _opened(place, output)
    splits = corpus.splits()
    total = next((split.num_samples for split in splits if split.name == "train"), splits[0].num_samples)
    given, least = f"--parts {parts}", (parts or 0) >= 2
    if fraction is not None:
        given, least, samples = f"--fraction {fraction}", 0 < fraction < 1, round(fraction * total)
    elif samples is not None:
        given, least = f"--samples {samples}", samples > 0
    if not least or not 0 < (parts or samples or 0) < total + bool(parts):
        raise ValueError(
            f"{given}: {place} has {total:,} samples to train on; set --parts of 2 to {total}, --fraction between 0 "
            f"and 1, or --samples of 1 to {total - 1}, so that each part has some"
        )
    lines = []
    with _made(output) as folder:
        shares = [i / parts for i in range(parts + 1)] if parts else [0, (samples or 0) / total, 1]
        bounds = {split.name: [round(share * split.num_samples) for share in shares] for split in splits}
        for part in range(len(shares) - 1):
            counts: dict[str, dict[str, Any]] = {}
            for split in splits:
                begin, end = bounds[split.name][part : part + 2]
                if begin == end:
                    lines.append(f"part-{part}/{split.name}: none, {split.num_samples} samples are too few")
                    continue
                pieces = _pieces(split, begin, end)
                done = _write_split(folder / f"part-{part}" / split.name, pieces)
                lines.append(f"part-{part}/{split.name}: {done}, samples {begin} to {end - 1} of {split.place}")
                counts[split.name] = _part_counts(split, pieces, begin, end)
            own = {name: [numbers[part], numbers[part + 1]] for name, numbers in bounds.items()}
            settings = {**_settings("split", [corpus]), "part": part, "of_parts": len(shares) - 1, "samples": own}
            settings["parts"] = [{"corpus": corpus.place, "settings": corpus.manifest.get("settings")}]
            keys = (*SAME, "skipped", "first_damaged_record")
            shared = {key: corpus.manifest[key] for key in keys if key in corpus.manifest}
            _finish(folder / f"part-{part}", [corpus], shared, counts, settings)
    return [f"split into {output}", *(f"  {line}" for line in lines)]


# ---- what fits together --------------------------------------------------------------------------------


def _opened(place: str, output: Path) -> StoredCorpus:
    corpus = StoredCorpus(place)
    if not corpus.has_manifest:
        raise ValueError(f"{place} has no {MANIFEST_NAME}: give a folder of depthattn prepare")
    if not corpus.is_remote and output.resolve().is_relative_to(Path(corpus.place).resolve()):
        raise ValueError(f"--output {output} lies inside {place}: choose a folder outside of it")
    return corpus


def _check_same(one: StoredCorpus, other: StoredCorpus) -> None:
    both = [{key: each.manifest.get(key) for key in SAME} | {"pack": pack_of(each.manifest)} for each in (one, other)]
    for key, value in both[0].items():
        if both[1][key] != value:
            raise ValueError(
                f"{one.place} has {key} {value}, and {other.place} {both[1][key]}: prepare both with the same "
                "settings, or give them to data.streams, if they have one tokenizer and sequence length"
            )


def _check_columns_and_copies(splits: Sequence[StoredSplit]) -> None:
    seen: dict[Any, StoredSplit] = {}
    for split in splits:
        index, first = split.index, splits[0].index
        if (index.dtype, index.tokens_per_sample, index.stores_documents) != (
            *(first.dtype, first.tokens_per_sample),
            first.stores_documents,
        ):
            raise ValueError(
                f"the shards of {splits[0].place} and {split.place} have different columns: prepare both again"
            )
        hashes = {frozenset(shard.raw.hashes.items()) for shard in index.shards if shard.raw.hashes}
        for content in (index.digest, *hashes):
            if content in seen:
                raise ValueError(
                    f"{seen[content].place} and {split.place} hold the same samples: name each corpus once"
                )
        seen |= dict.fromkeys((index.digest, *hashes), split)


# ---- what is written -----------------------------------------------------------------------------------


@contextmanager
def _made(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` once the block has filled it; nothing is left of it after an error."""
    output = output.absolute()
    recover_folder(output)
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output} is there already: choose another folder")
    with open_unfinished(output) as unfinished:
        if unfinished.can_continue:
            raise ValueError(f"{unfinished.folder} holds a preparation that can continue: finish it, or remove it")
        unfinished.clear()
        unfinished.corpus.mkdir()
        yield unfinished.corpus
        fsync_tree(unfinished.corpus)
        publish_folder(unfinished.corpus, output)


def _pieces(split: StoredSplit, begin: int, end: int) -> list[Piece]:
    pieces = []
    for shard in range(len(split.index.shards)):
        first, samples = split.first_sample(shard), split.index.shards[shard].samples
        own = max(begin - first, 0), min(end - first, samples)
        if own[0] < own[1]:
            pieces.append(Piece(split, shard, *own))
    return pieces


def _write_split(folder: Path, pieces: Sequence[Piece]) -> str:
    """Write the shards and the index; returns how."""
    folder.mkdir(parents=True)
    # A shard that holds tokens alone cannot lie beside one that is written now.
    again = [not piece.is_whole for piece in pieces]
    if any(again) and not pieces[0].split.index.stores_documents:
        again = [True] * len(pieces)
    entries: list[dict[str, Any]] = []
    linked = 0
    for piece, is_rewritten in zip(pieces, again, strict=True):
        if is_rewritten:
            staging = folder / "rewritten"
            samples, found = _read(piece)
            samples = samples._replace(starts=np.packbits(found.starts, axis=1))
            writer = ShardWriter(staging, [], no_samples(samples.tokens.shape[1] - 1, str(samples.tokens.dtype)))
            writer.append(samples)
            writer.finish()
            for entry in json.loads((staging / INDEX_NAME).read_text())["shards"]:
                old = entry["zip_data"]["basename"]
                entries.append(_renamed(entry, len(entries)))
                (staging / old).replace(folder / entries[-1]["zip_data"]["basename"])
            (staging / INDEX_NAME).unlink()
            staging.rmdir()
        else:
            stored, entry = piece.split.stored_file(piece.shard), dict(piece.split.entries[piece.shard])
            if stored is piece.split.index.shards[piece.shard].raw:
                entry |= {"zip_data": None, "compression": None}
            entries.append(_renamed(entry, len(entries)))
            key = "zip_data" if entry.get("zip_data") else "raw_data"
            linked += _link(piece, folder / entries[-1][key]["basename"])
    (folder / INDEX_NAME).write_text(json.dumps({"version": 2, "shards": entries}, sort_keys=True))
    copied = len(again) - sum(again) - linked
    samples_in_all = sum(piece.end - piece.begin for piece in pieces)
    how = f"{linked} linked, {copied} copied, {sum(again)} rewritten"
    return f"{samples_in_all:,} samples in {len(entries):,} shards ({how})"


def _renamed(entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """An index entry with the name of the shard with this number."""
    name, old = f"shard.{number:05}.mds", entry["raw_data"]["basename"]
    changed = dict(entry) | {"raw_data": entry["raw_data"] | {"basename": name}}
    if entry.get("zip_data"):
        ending = entry["zip_data"]["basename"].removeprefix(old)
        changed["zip_data"] = entry["zip_data"] | {"basename": name + ending}
    return changed


def _link(piece: Piece, target: Path) -> bool:
    """Put a shard's file, checked, under another name; returns whether it is a link to the same content."""
    stored = piece.split.stored_file(piece.shard)
    place = f"{piece.split.place}/{stored.name}"
    is_linked = False
    with on_this_machine(place) as file:
        if not piece.split.corpus.is_remote:
            wrong = damage(file, stored, name=place)
            if not wrong:
                try:
                    os.link(file, target)
                    is_linked = True
                except OSError:  # another file system, or one without links
                    pass
        if not is_linked:
            with open(target, "xb") as stream:
                wrong = damage(file, stored, stream, place)
    if wrong:
        raise ValueError(f"{place} {wrong}: {AGAIN}")
    return is_linked


def _read(piece: Piece) -> tuple[Samples, Documents]:
    """The samples of a piece, and where documents begin in them."""
    samples = piece.split.read(piece.shard)
    found = piece.split.documents(piece.shard, samples)
    own = slice(piece.begin, piece.end)
    return samples.part(piece.begin, piece.end), Documents(found.starts[own], found.padding[own])


def _joined_counts(splits: Sequence[StoredSplit]) -> dict[str, Any]:
    numbers: Counter[str] = Counter()
    breaks: list[int] = []
    offset = 0
    for split in splits:
        own = {key: value for key, value in split.counts.items() if type(value) is int}
        numbers = Counter({key: numbers[key] + own[key] for key in own if key in numbers or split is splits[0]})
        breaks += [offset] * (offset > 0) + [offset + int(each) for each in split.breaks]
        offset += split.num_samples
    return dict(numbers) | {"samples": offset} | ({} if splits[0].is_packed else {"breaks": breaks})


def _part_counts(split: StoredSplit, pieces: Sequence[Piece], begin: int, end: int) -> dict[str, Any]:
    """Counts of what lies in a part. Its bytes of text are its share of the samples."""
    counts = sum((measure(split, *_read(piece)) for piece in pieces), Counter())
    num, length, whole = end - begin, split.sequence_length, split.counts.get("bytes", 0)
    breaks = [int(each) - begin for each in split.breaks if begin < each < end]
    tokens = num * (length + 1) - counts["padding_tokens"] if split.is_packed else num * length + 1 + len(breaks)
    share = whole * end // split.num_samples - whole * begin // split.num_samples
    names = ("samples", "documents", "padding_tokens", "predicted_tokens", "predicted_within_documents")
    counted = {"bytes": share, "tokens": tokens, "dropped_tail_tokens": 0} | {name: counts[name] for name in names}
    return counted if split.is_packed else counted | {"breaks": breaks}


def _settings(made_by: str, corpora: Sequence[StoredCorpus]) -> dict[str, Any]:
    truncate = [each.manifest.get("settings", {}).get("truncate") for each in corpora]
    manifest = corpora[0].manifest
    return {
        "made_by": made_by,
        "format_version": manifest.get("format_version"),
        "pack": pack_of(manifest),
        "truncate": max(filter(None, truncate), default=None),
    }


def _finish(
    folder: Path,
    corpora: Sequence[StoredCorpus],
    shared: Mapping[str, Any],
    counts: Mapping[str, dict[str, Any]],
    settings: Mapping[str, Any],
) -> None:
    """Write tokenizer, list of sources and manifest."""
    _copy_tokenizer(corpora[0], folder)
    totals: Counter[str] = Counter()
    formats: dict[str, Counter[str]] = {}
    digest = hashlib.sha256()
    with (folder / SOURCES_NAME).open("wb") as target:
        for corpus in corpora:
            sources = corpus.manifest.get("sources", {})
            totals.update(files=sources.get("files", 0), bytes=sources.get("bytes", 0))
            for name, of in sources.get("formats", {}).items():
                formats.setdefault(name, Counter()).update(of)
            if sources:
                place = f"{corpus.place}/{SOURCES_NAME}"
                with on_this_machine(place) as file, open_plain(file, place) as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
                        target.write(block)
    of_sources = {**totals, "formats": {name: dict(of) for name, of in sorted(formats.items())}}
    of_sources |= {"list": SOURCES_NAME, "list_sha256": digest.hexdigest()}
    for name, own in counts.items():
        own["index_sha256"] = hashlib.sha256((folder / name / INDEX_NAME).read_bytes()).hexdigest()
    manifest = {**shared, "splits": counts, "sources": of_sources, "settings": settings}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def _copy_tokenizer(corpus: StoredCorpus, folder: Path) -> None:
    names: Sequence[str] = TOKENIZER_FILES
    if not corpus.is_remote and Path(corpus.place, "tokenizer").is_dir():
        names = [f"tokenizer/{name}" for name in sorted(os.listdir(f"{corpus.place}/tokenizer"))]
    (folder / "tokenizer").mkdir()
    for name in names:
        content = corpus.small_file(name)
        expected = corpus.manifest.get("tokenizer_sha256")
        if name == TOKENIZER_FILE and (content is None or hashlib.sha256(content).hexdigest() != expected):
            raise ValueError(f"{corpus.place}/{name} is not the tokenizer that {MANIFEST_NAME} names: {AGAIN}")
        if content is not None:
            (folder / name).write_bytes(content)
