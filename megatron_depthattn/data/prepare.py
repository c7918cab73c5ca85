"""From files of text to MDS shards of token sequences, a tokenizer and a manifest.

    OUTPUT/manifest.json   settings, counts, tokenizer digest, totals of the source files
    OUTPUT/sources.jsonl   every source file: name, size, format, and what became of it
    OUTPUT/tokenizer/      loads with transformers.AutoTokenizer
    OUTPUT/train/          MDS shards of samples: `tokens`, uint16 (or uint32) [sequence_length + 1], where documents
                           start, and how much is padding (see `shard_index.columns_of`)
    OUTPUT/val/

A split's documents, each followed by EOS, form one stream of tokens. Sample i is tokens[i*N : i*N + N + 1]:
neighbours share one token, so every token but the first is predicted exactly once, and what remains after the
last whole sample is dropped and counted.

One process reads (`readers.py`, `hub.py`), many encode (`encode.py`, `encode_pool.py`), the first merges in the order
of the corpus and writes (`pack.py`, `shard_writer.py`). The output depends on the documents and their order alone: not
on the number of processes, not on interruptions (`unfinished.py`). Memory holds a few units of 2 MB a process, and a
longer document only where it is a single record of a JSON or columnar file.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_depthattn.data.documents import BUILTIN_STDLIB, CorpusFile, corpus_files
from megatron_depthattn.data.encode import SPLITS, Encoded, Recipe, encode, parts
from megatron_depthattn.data.encode_pool import EncodePool
from megatron_depthattn.data.hub import HUB, HubChoice, hub_files, hub_name
from megatron_depthattn.data.pack import Packing, SplitWriter
from megatron_depthattn.data.readers import Outcome, Position, Unit, read_units
from megatron_depthattn.data.shard_index import INDEX_NAME
from megatron_depthattn.data.stream import MANIFEST_NAME, PACKS
from megatron_depthattn.data.tokenizer import Encoder, bpe_vocab, file_sha256, load_tokenizer, train_bpe
from megatron_depthattn.data.unfinished import Merged, Unfinished, changed_settings, open_unfinished, unfinished_folder
from megatron_depthattn.durable import fsync_tree, publish_folder, recover_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 4
TOKENS_ALONE_VERSION = 3
"""Of corpora with the same samples, whose shards do not say where documents begin."""
SAVE_SECONDS = 60.0  # between savings of the progress: what an interruption can cost
RECORDED = (*Packing._fields, "validation_fraction", "text_field", "max_bytes", "max_tokens")
SOURCES_NAME = "sources.jsonl"
SPLIT_COUNTS = (
    *("documents", "documents_with_replaced_utf8", "bytes", "documents_below_min_tokens", "tokens_below_min_tokens"),
    *("truncated_documents", "truncated_tokens", "tokens", "samples", "cut_documents", "padding_tokens"),
    *("predicted_tokens", "predicted_within_documents", "dropped_tail_tokens"),
)
"""In the manifest, of each split. `bytes` are those of all documents, also of those that --min-tokens leaves out.
`tokens` are what is left of them; the dropped ones, after the last whole sample, are among them. Predicted are those
that follow others in a sample."""
SKIPPED = {kind: f"{kind}_files_skipped" for kind in ("binary", "archive", "undecodable", "special")} | {
    "dataset metadata": "dataset_metadata_files_skipped",
    "link out of the folder": "links_out_of_the_folder_skipped",
    "damaged": "damaged_files",
    "json as text": "json_files_read_as_text",
}
"""Kinds of outcome, and what they are counted as in the manifest."""


@dataclass(kw_only=True, frozen=True)
class PrepareSettings:
    """What `depthattn prepare` was asked for."""

    inputs: tuple[str, ...]
    """Files, folders, `hf:NAME[:CONFIG]` (see `hub.py`), or `builtin:python-stdlib`."""
    tokenizer: str
    """A Hugging Face tokenizer folder, a tokenizer.json, or `train-bpe:VOCAB`."""
    sequence_length: int
    """Tokens a model sees at a time; a sample stores one more."""
    output: Path
    """The folder to write."""
    validation_fraction: float = 0.01
    """Share of the documents that goes to val; 0 writes no val split."""
    text_field: str = "text"
    """Field of a JSON line, column of a parquet or Arrow file or of a data set."""
    split: str | None = None
    """Of the data sets among `inputs`; None: train."""
    revision: str | None = None
    """Commit, branch or tag of the data sets on the Hub; None: the newest commit of the main branch."""
    on_corrupt: str = "error"
    """error, or skip: keep what comes before the damage and count it."""
    workers: int | None = None
    """Encoding processes; None: the cores that this process may use. The output does not depend on it."""
    max_bytes: int | None = None
    """Stop after this many bytes of documents; the last one is cut."""
    max_tokens: int | None = None
    """Stop once the train split has this many tokens to predict: without padding `max_tokens // sequence_length`
    samples. With best-fit the first token of a document is none."""
    pack: str = "concat"
    """How documents become samples, concat or best-fit: see `pack.py`."""
    truncate: int | None = None
    """Keep so many tokens of a longer document, from its beginning; None: all."""
    min_tokens: int | None = None
    """Leave out documents of fewer tokens, EOS counted."""
    overwrite: bool = False
    """Prepare again even if `output` holds a corpus, or unfinished work with other settings."""


@dataclass(kw_only=True, frozen=True)
class PrepareProgress:
    """Handed to the progress callback when a phase starts and after every unit."""

    phase: str
    total_bytes: int
    """Of the source files, or of documents where `max_bytes` is less; estimated where `max_tokens` is set."""
    done_bytes: int = 0
    tokens: int = 0
    message: str = ""
    """Worth a line of its own."""


@dataclass(kw_only=True, frozen=True)
class Prepared:
    manifest: dict[str, Any]
    already_prepared: bool
    seconds: float = 0.0
    """Of this process."""
    new_tokens: int = 0
    """Encoded by this process."""


ProgressCallback = Callable[[PrepareProgress], None]


def prepare_corpus(settings: PrepareSettings, on_progress: ProgressCallback = lambda progress: None) -> Prepared:
    """Prepare a corpus, continue an interrupted preparation, or find that the corpus is there already.

    Everything is written beside `settings.output` and renamed at the end: the output is complete or not there.

    Raises:
        ValueError: the settings, the inputs or an existing output do not allow it.
        OSError: a file cannot be read or written.
        WorkerDiedError: an encoding process was killed.

    Encoding processes are spawned: a script that calls this needs ``if __name__ == "__main__":``.
    """
    start = time.perf_counter()
    check_settings(settings)
    choice = HubChoice(settings.split or "train", settings.text_field, settings.revision)
    hub = {given: hub_files(given, choice) for given in settings.inputs if given.startswith(HUB)}
    files = corpus_files(settings.inputs, hub)
    given = bpe_vocab(settings.tokenizer) or load_tokenizer(settings.tokenizer)
    record = settings_record(settings, files, "" if isinstance(given, int) else Encoder(given).sha256)
    output = settings.output.absolute()
    recover_folder(output)
    manifest = existing_manifest(settings, record)
    if manifest is not None:
        check_skipped_damage(settings, manifest["skipped"], str(output))
        left = unfinished_folder(output)
        if left.is_dir() and not (left / "corpus").exists():  # of a process that was killed when all was done
            shutil.rmtree(left, ignore_errors=True)
        return Prepared(manifest=manifest, already_prepared=True)
    try:
        import streaming  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter: its torchvision beside another build of torch
        wanted = "install it, with the torchvision that belongs to this torch"
        raise ValueError(f"mosaicml-streaming, which writes the shards, does not import ({error}): {wanted}") from error
    with open_unfinished(output) as unfinished:
        preparation = _Preparation(settings, files, record, unfinished, on_progress)
        manifest = preparation.run(given)
        publish_folder(unfinished.corpus, output)
        unfinished.clear()
    seconds = time.perf_counter() - start
    return Prepared(manifest=manifest, already_prepared=False, seconds=seconds, new_tokens=preparation.new_tokens)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


# ---- settings ------------------------------------------------------------------------------------------


def check_settings(settings: PrepareSettings) -> None:
    fraction, workers = settings.validation_fraction, settings.workers
    max_bytes, max_tokens, length = settings.max_bytes, settings.max_tokens, settings.sequence_length
    hub = [given for given in settings.inputs if given.startswith(HUB)]
    remote = [given for given in hub if not Path(hub_name(given)[0]).is_dir()]
    for is_valid, given, advice in (
        (settings.inputs, "input is missing", f"name files, folders, hf:NAME, or {BUILTIN_STDLIB}"),
        (length >= 1, f"sequence-length {length}", "set at least 1"),
        (0 <= fraction < 1, f"validation-fraction {fraction}", "set a number in [0, 1)"),
        (max_bytes is None or max_bytes >= 1, f"max-bytes {max_bytes}", "set at least 1, or leave it out"),
        (max_tokens is None or max_tokens >= length, f"max-tokens {max_tokens}", f"set at least one sample, {length}"),
        (settings.pack in PACKS, f"pack {settings.pack}", f"set {' or '.join(PACKS)}"),
        (settings.truncate is None or settings.truncate >= 2, f"truncate {settings.truncate}", "set at least 2"),
        (
            not settings.min_tokens or settings.min_tokens <= (settings.truncate or sys.maxsize),
            f"min-tokens {settings.min_tokens}",
            f"set no more than --truncate, {settings.truncate}, keeps",
        ),
        (
            settings.min_tokens is None or settings.min_tokens >= 1,
            f"min-tokens {settings.min_tokens}",
            "set at least 1",
        ),
        (hub or not settings.split, f"split {settings.split}", "it is of data sets: set --input hf:NAME"),
        (remote or not settings.revision, f"revision {settings.revision}", "local inputs have none: leave it out"),
        (workers is None or workers >= 1, f"workers {workers}", "set at least 1, or leave it out"),
        (settings.on_corrupt in ("error", "skip"), f"on-corrupt {settings.on_corrupt}", "set error or skip"),
    ):
        if not is_valid:
            raise ValueError(f"--{given}: {advice}")
    output = settings.output.resolve()
    for given in settings.inputs:
        folder = Path(hub_name(given)[0] if given in hub else given)
        if folder.is_dir() and output.is_relative_to(folder.resolve()):
            raise ValueError(f"--output {settings.output} lies inside --input {given}: choose a folder outside of it")


def settings_record(settings: PrepareSettings, files: Sequence[CorpusFile], tokenizer_sha256: str) -> dict[str, Any]:
    """What decides the result, as stored in the manifest.

    `tokenizer_sha256` is that of the loaded tokenizer, or "" for one that is to be trained. A list of files that
    decide it would be that of some kinds of tokenizer only.

    The corpus counts by file names and sizes: reading every byte to find that nothing changed would cost as
    much as preparing. An edit that keeps a file's size needs --overwrite.
    """
    names_and_sizes = repr([(file.name, file.size) for file in files])
    commits = sorted({file.hub.commit for file in files if file.hub and file.hub.commit})
    tokenizer = settings.tokenizer + (f" (sha256 {tokenizer_sha256})" if tokenizer_sha256 else "")
    return {
        "format_version": FORMAT_VERSION,
        "input": list(settings.inputs),
        "split": (settings.split or "train") if any(file.hub for file in files) else None,
        "revision": commits or None,
        "corpus_files_sha256": hashlib.sha256(names_and_sizes.encode()).hexdigest(),
        "tokenizer": tokenizer,
        **{key: getattr(settings, key) for key in RECORDED},
    }


def existing_manifest(settings: PrepareSettings, record: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a corpus already prepared with these settings; None if the output is to be written."""
    output = settings.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    file = output / MANIFEST_NAME
    if not file.is_file():
        # Never removed, --overwrite or not: it is not ours.
        raise ValueError(f"--output {output} exists and is not a prepared corpus: choose another folder")
    if settings.overwrite:
        return None
    manifest: dict[str, Any] = json.loads(file.read_text())
    stored = manifest.get("settings", {})
    if stored.get("made_by"):
        raise ValueError(
            f"--output {output} was made by depthattn prepare {stored['made_by']}: choose another folder or pass "
            "--overwrite"
        )
    if stored.get("format_version") == TOKENS_ALONE_VERSION:
        stored = stored | {
            "format_version": FORMAT_VERSION,
            "pack": "concat",
        }  # it trains as it did: nobody need prepare it again
    if changed := changed_settings(stored, record):
        by = "by another version of this tool, " if stored.get("format_version") != FORMAT_VERSION else ""
        raise ValueError(
            f"--output {output} was prepared {by}with {changed}: use it, choose another folder or pass --overwrite"
        )
    return manifest


def check_skipped_damage(settings: PrepareSettings, skipped: Mapping[str, int], where: str) -> None:
    if settings.on_corrupt == "error" and (skipped["damaged_files"] or skipped["damaged_records"]):
        raise ValueError(
            f"{where} leaves out {skipped['damaged_files']} damaged files and {skipped['damaged_records']} damaged "
            "records: pass --on-corrupt skip to accept that, or repair them and pass --overwrite"
        )


# ---- the work --------------------------------------------------------------------------------------------


@dataclass
class _Preparation:
    """One process's share of a preparation."""

    settings: PrepareSettings
    files: Sequence[CorpusFile]
    record: dict[str, Any]
    unfinished: Unfinished
    on_progress: ProgressCallback
    merged: Merged = field(default_factory=Merged)
    writers: dict[str, SplitWriter] = field(default_factory=dict)
    new_tokens: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self.recipe = Recipe(settings.text_field, settings.validation_fraction, settings.max_bytes)
        total = sum(file.size for file in self.files)
        self.total_bytes = min(total, settings.max_bytes or total)
        # An edited file must not be continued in the middle; its times need not match once the corpus is finished.
        times = hashlib.sha256(repr([file.modified_ns for file in self.files]).encode()).hexdigest()
        self.record_to_continue = self.record | {"modification_times_sha256": times}

    def run(self, tokenizer: "PreTrainedTokenizerFast | int") -> dict[str, Any]:
        """Write the corpus below the unfinished folder, or what is missing of it; returns the manifest.

        Stopped by an exception, it saves the progress first.

        Args:
            tokenizer: the tokenizer, or the size of the vocabulary to train.
        """
        found = self.unfinished.load(self.record_to_continue, overwrite=self.settings.overwrite)
        if found:
            self.merged = found[0]
            check_skipped_damage(self.settings, self.merged.skipped, str(self.unfinished.folder))
        encoder = Encoder(self._prepare_tokenizer(tokenizer, is_new=not found))
        for split in SPLITS if self.settings.validation_fraction > 0 else SPLITS[:1]:
            state = found[1][split] if found else ()
            folder = self.unfinished.corpus / split
            packing = Packing(*(getattr(self.settings, name) for name in Packing._fields))
            most = self.settings.max_tokens if split == "train" else None
            self.writers[split] = SplitWriter(folder, packing, encoder.end, most, *state)
        self._save()
        self._encode_and_merge(encoder)
        return self._finish(encoder)

    def _prepare_tokenizer(
        self, tokenizer: "PreTrainedTokenizerFast | int", *, is_new: bool
    ) -> "PreTrainedTokenizerFast":
        folder = self.unfinished.corpus / "tokenizer"
        if isinstance(tokenizer, int):
            if is_new:
                self.on_progress(PrepareProgress(phase="training the tokenizer", total_bytes=self.total_bytes))
                train_bpe(self._training_documents(), tokenizer).save_pretrained(folder)
            tokenizer = load_tokenizer(str(folder))  # the same way whether it was trained now or before a break
        elif is_new:
            tokenizer.save_pretrained(folder)
        fsync_tree(self.unfinished.corpus)
        return tokenizer

    def _training_documents(self) -> Iterator[bytes]:
        """The train split, long documents in pieces; read in this process, for the first 32 MiB are enough."""
        left = self.settings.max_bytes or sys.maxsize
        for unit in read_units(self.files, self.recipe):
            encoded = Encoded()
            for part in parts(unit.content, self.recipe, encoded):
                if part.split == "train":
                    yield part.data[:left]
                left -= len(part.data)
                if left <= 0:
                    return
            self._check_damage(unit, encoded)

    def _encode_and_merge(self, encoder: Encoder) -> None:
        merged, limit = self.merged, self.settings.max_bytes or sys.maxsize
        train = self.writers["train"]
        if merged.bytes >= limit or train.is_full:  # interrupted after that
            return
        if merged.position != Position():
            self._report(self._where())
        is_whole, saved = True, time.monotonic()
        try:
            units = read_units(self.files, self.recipe, merged.position)
            with EncodePool(self.settings.workers or available_cores(), encoder, self.recipe) as pool:
                # A unit can be one long record. A character more: one that is cut is seen to reach the limit.
                for unit, encoded in pool.encode_in_order(units, limit + 4):
                    needed = train.documents_needed(encoded.lengths["train"], begins=encoded.begins)
                    if merged.bytes + encoded.bytes >= limit or needed:
                        encoded = encode(unit.content, encoder, self.recipe, limit - merged.bytes, needed)
                    self._check_damage(unit, encoded)
                    is_whole = False
                    self._merge(unit, encoded)
                    is_whole = True
                    for writer in self.writers.values():
                        writer.flush()
                    self._report()
                    if merged.bytes >= limit or train.is_full:
                        return
                    if time.monotonic() - saved >= SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
        except BaseException:
            # Interrupted between a split's tokens and the position, memory holds nothing whole: the last save stands.
            if is_whole:
                with suppress(OSError):  # a full disk may be why we are here
                    self._save()
            raise

    def _check_damage(self, unit: Unit, encoded: Encoded) -> None:
        damage = encoded.first_damage
        if not damage and unit.outcome is not None and unit.outcome.kind == "damaged":
            damage = f"{self.files[unit.outcome.file].path}: {unit.outcome.message}"
        if damage and self.settings.on_corrupt == "error":
            raise ValueError(f"{damage}; repair it, or pass --on-corrupt skip to continue without it and count it")

    def _merge(self, unit: Unit, encoded: Encoded) -> None:
        merged = self.merged
        for split, writer in self.writers.items():
            tokens, lengths = encoded.tokens[split], encoded.lengths[split]
            merged.counts[split].update(writer.append(tokens, lengths, begins=encoded.begins, ends=encoded.ends))
            merged.counts[split].update(encoded.counts[split])
            self.new_tokens += len(tokens)
        for outcome in [*(Outcome(*entry) for entry in encoded.left_out), *([unit.outcome] if unit.outcome else [])]:
            merged.outcomes.append(outcome)
            merged.skipped[SKIPPED[outcome.kind]] += 1
        merged.skipped.update(encoded.skipped)
        merged.first_damage = merged.first_damage or encoded.first_damage
        merged.position, merged.consumed_bytes = unit.end, unit.consumed_bytes

    def _save(self) -> None:
        states = {split: writer.state() for split, writer in self.writers.items()}
        self.unfinished.save(self.record_to_continue, self.merged, states)

    def _report(self, message: str = "") -> None:
        merged, total, max_tokens = self.merged, self.total_bytes, self.settings.max_tokens
        if max_tokens and merged.counts["train"]["tokens"]:
            total = max(merged.bytes * max_tokens // merged.counts["train"]["tokens"], merged.bytes)  # about
        in_documents = self.settings.max_bytes or max_tokens
        done = min(merged.bytes if in_documents else merged.consumed_bytes, total)
        progress = {"total_bytes": total, "done_bytes": done, "tokens": merged.tokens}
        self.on_progress(PrepareProgress(phase="tokenising", message=message, **progress))

    def _where(self) -> str:
        merged, files = self.merged, self.files
        number = min(merged.position.file, len(files) - 1)
        return (
            f"continuing at file {number + 1:,} of {len(files):,} ({files[number].name}), "
            f"after {merged.bytes / 1e6:,.1f} MB of documents and {merged.tokens:,} tokens"
        )

    def _finish(self, encoder: Encoder) -> dict[str, Any]:
        """Write what comes after the last document, and have everything on disk."""
        merged, folder = self.merged, self.unfinished.corpus
        for split, writer in self.writers.items():
            merged.counts[split].update(writer.finish())
        if fault := self._emptiness():
            self.unfinished.clear()  # no other settings can continue it
            raise ValueError(fault)
        manifest = {
            "format_version": FORMAT_VERSION,
            "sequence_length": self.settings.sequence_length,
            "vocab_size": encoder.vocab_size,
            "eos_token_id": int(encoder.end[0]),
            "token_dtype": encoder.dtype,
            "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
            "skipped": {key: merged.skipped[key] for key in (*SKIPPED.values(), "damaged_records", "empty_documents")},
            "first_damaged_record": merged.first_damage or None,
            "splits": {
                split: {name: merged.counts[split][name] for name in SPLIT_COUNTS}
                | {"index_sha256": file_sha256(folder / split / INDEX_NAME)}
                for split in self.writers
            },
            "sources": self._write_sources(folder / SOURCES_NAME),
            "settings": self.record,
        }
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        fsync_tree(folder)
        return manifest

    def _emptiness(self) -> str:
        """What is wrong if a split has no sample; empty if each has one."""
        counts = self.merged.counts
        if not any(counts[split]["documents"] for split in self.writers):
            reasons = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in self.merged.skipped.items() if n)
            return (
                f"--input {' '.join(self.settings.inputs)} holds no text ({reasons or 'no files'}): give files of "
                "text, JSON lines, parquet or Arrow"
            )
        for split in self.writers:
            if not counts[split]["samples"]:
                fraction = ", set a larger --validation-fraction, or 0 for no val split" if split == "val" else ""
                return (
                    f"the {split} split got {counts[split]['documents']} documents and {counts[split]['tokens']} "
                    f"tokens, and one sample needs {self.settings.sequence_length + 1}: give more text or set a "
                    f"smaller --sequence-length{fraction}"
                )
        return ""

    def _write_sources(self, path: Path) -> dict[str, Any]:
        """Write a line for each file, also of those that `max_bytes` left out; returns the totals for the manifest."""
        outcomes = {outcome.file: outcome for outcome in self.merged.outcomes}
        totals: dict[str, Counter[str]] = {}
        with path.open("w", encoding="utf-8") as stream:
            for index, file in enumerate(self.files):
                reached = Outcome(index, "read" if Position(index) < self.merged.position else "not reached")
                outcome = outcomes.get(index, reached)
                entry = {"name": file.name, "bytes": file.size, "format": file.format}
                stream.write(json.dumps(entry | {"outcome": outcome.kind, "message": outcome.message}) + "\n")
                totals.setdefault(file.format, Counter()).update(files=1, bytes=file.size)
        return {
            "files": len(self.files),
            "bytes": sum(file.size for file in self.files),
            "formats": {name: dict(of) for name, of in sorted(totals.items())},
            "list": SOURCES_NAME,
            "list_sha256": file_sha256(path),
        }
