"""From text files to MDS shards of token sequences, a tokenizer and a manifest.

    OUTPUT/manifest.json   settings, counts, tokenizer digest
    OUTPUT/tokenizer/      loads with transformers.AutoTokenizer
    OUTPUT/train/          MDS shards with one column, `tokens`: uint16 (or uint32) [sequence_length + 1]
    OUTPUT/val/

A split's documents, each followed by EOS, form one stream of tokens. Sample i is tokens[i*N : i*N + N + 1]:
neighbours share one token, so every token but the first is predicted exactly once, and what remains after the
last whole sample is dropped and counted.

Documents are read one at a time, twice when a tokenizer is trained; memory holds one document and one batch.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from streaming import MDSWriter

from megatron_depthattn.data.documents import (
    BUILTIN_STDLIB,
    CorpusCounts,
    CorpusFile,
    batches,
    corpus_files,
    is_validation,
    read_documents,
)
from megatron_depthattn.data.stream import MANIFEST_NAME, TOKEN_COLUMN
from megatron_depthattn.data.tokenizer import (
    Encoder,
    bpe_vocab,
    file_sha256,
    load_tokenizer,
    tokenizer_identity,
    train_bpe,
)

FORMAT_VERSION = 1
SHARD_BYTES = 32 << 20


@dataclass(kw_only=True, frozen=True)
class PrepareSettings:
    """What `tools/prepare_data.py` was asked for."""

    inputs: tuple[str, ...]
    """Text files, folders, or `builtin:python-stdlib`."""
    tokenizer: str
    """A Hugging Face tokenizer folder, a tokenizer.json, or `train-bpe:VOCAB`."""
    sequence_length: int
    """Tokens a model sees at a time; a sample stores one more."""
    output: Path
    """The folder to write."""
    validation_fraction: float = 0.01
    """Share of the documents that goes to val; 0 writes no val split."""
    max_bytes: int | None = None
    """Stop after this many bytes of documents; the last one is cut."""
    overwrite: bool = False
    """Prepare again even if `output` holds a corpus."""


@dataclass
class SplitCounts:
    """`dropped_tail_tokens` come after the last whole sample; they are part of `tokens`."""

    documents: int = 0
    documents_with_replaced_utf8: int = 0
    bytes: int = 0
    tokens: int = 0
    samples: int = 0
    dropped_tail_tokens: int = 0


@dataclass(kw_only=True, frozen=True)
class Progress:
    """Handed to the progress callback when a phase starts and after every batch."""

    phase: str
    total_bytes: int
    done_bytes: int = 0
    tokens: int = 0


@dataclass(kw_only=True, frozen=True)
class Prepared:
    manifest: dict[str, Any]
    already_prepared: bool
    seconds: float = 0.0


ProgressCallback = Callable[[Progress], None]


# ---- samples ---------------------------------------------------------------------------------------------


class SplitWriter:
    """Tokenises one split's documents, cuts the stream into samples and writes them as MDS shards."""

    def __init__(self, folder: Path, sequence_length: int, encoder: Encoder) -> None:
        self.counts = SplitCounts()
        self._length = sequence_length
        self._encoder = encoder
        # The rest starts with the last token of the previous sample: the first token of the next one.
        self._rest: npt.NDArray[Any] = np.empty(0, encoder.dtype)
        self._writer = MDSWriter(
            columns={TOKEN_COLUMN: f"ndarray:{encoder.dtype}:{sequence_length + 1}"},
            out=str(folder),
            compression="zstd",
            hashes=["xxh64"],
            size_limit=SHARD_BYTES,
        )

    def write(self, documents: Sequence[bytes]) -> None:
        encoded = self._encoder.encode([self._text(document) for document in documents])
        stream = np.concatenate([self._rest, *encoded])
        end = max(len(stream) - 1, 0) // self._length * self._length
        for start in range(0, end, self._length):
            self._writer.write({TOKEN_COLUMN: stream[start : start + self._length + 1]})
        self._rest = stream[end:].copy()  # not a view, which would keep the whole batch
        self.counts.documents += len(documents)
        self.counts.bytes += sum(map(len, documents))
        self.counts.tokens += sum(map(len, encoded))
        self.counts.samples += end // self._length

    def _text(self, document: bytes) -> str:
        try:
            return document.decode("utf-8")
        except UnicodeDecodeError:
            self.counts.documents_with_replaced_utf8 += 1
            return document.decode("utf-8", errors="replace")

    def finish(self) -> SplitCounts:
        shared = 1 if self.counts.samples else 0
        self.counts.dropped_tail_tokens = max(len(self._rest) - shared, 0)
        self._writer.finish()
        return self.counts


# ---- the whole -------------------------------------------------------------------------------------------


def prepare_corpus(settings: PrepareSettings, on_progress: ProgressCallback = lambda progress: None) -> Prepared:
    """Prepare a corpus, or find that it is there already.

    Everything is written beside `settings.output` and renamed at the end: an interrupted preparation leaves
    no half-written corpus.

    Raises:
        ValueError: the settings, the inputs or an existing output do not allow it.
    """
    start = time.perf_counter()
    _check(settings)
    files = corpus_files(settings.inputs)
    record = _settings_record(settings, files)
    manifest = _existing_manifest(settings, record)
    if manifest is not None:
        return Prepared(manifest=manifest, already_prepared=True)
    output = settings.output.absolute()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        manifest = _write_corpus(settings, files, partial, on_progress) | {"settings": record}
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        _replace_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Prepared(manifest=manifest, already_prepared=False, seconds=time.perf_counter() - start)


def _check(settings: PrepareSettings) -> None:
    if not settings.inputs:
        raise ValueError(f"no --input given: name text files, folders, or {BUILTIN_STDLIB}")
    if settings.sequence_length < 1:
        raise ValueError(f"--sequence-length {settings.sequence_length}: set at least 1")
    if not 0 <= settings.validation_fraction < 1:
        raise ValueError(f"--validation-fraction {settings.validation_fraction}: set a number in [0, 1)")
    if settings.max_bytes is not None and settings.max_bytes < 1:
        raise ValueError(f"--max-bytes {settings.max_bytes}: set at least 1, or leave it out")
    output = settings.output.resolve()
    for given in settings.inputs:
        if Path(given).is_dir() and output.is_relative_to(Path(given).resolve()):
            raise ValueError(f"--output {settings.output} lies inside --input {given}: choose a folder outside of it")


def _settings_record(settings: PrepareSettings, files: Sequence[CorpusFile]) -> dict[str, Any]:
    """What decides the result, as stored in the manifest.

    The corpus counts by file names and sizes: reading every byte to find that nothing changed would cost as
    much as preparing. An edit that keeps a file's size needs --overwrite.
    """
    names_and_sizes = repr([(file.name, file.size) for file in files])
    return {
        "format_version": FORMAT_VERSION,
        "input": list(settings.inputs),
        "corpus_files_sha256": hashlib.sha256(names_and_sizes.encode()).hexdigest(),
        "tokenizer": tokenizer_identity(settings.tokenizer),
        "sequence_length": settings.sequence_length,
        "validation_fraction": settings.validation_fraction,
        "max_bytes": settings.max_bytes,
    }


def _existing_manifest(settings: PrepareSettings, record: dict[str, Any]) -> dict[str, Any] | None:
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
    changed = [f"{key} {stored.get(key)!r}, not {new!r}" for key, new in record.items() if stored.get(key) != new]
    if changed:
        raise ValueError(
            f"--output {output} was prepared with {'; '.join(changed)}: choose another folder or pass --overwrite"
        )
    return manifest


def _write_corpus(
    settings: PrepareSettings, files: Sequence[CorpusFile], folder: Path, on_progress: ProgressCallback
) -> dict[str, Any]:
    """Write the tokenizer and the shards below `folder`; returns the manifest but for its settings."""
    total = sum(file.size for file in files)
    total = min(total, settings.max_bytes or total)
    vocab = bpe_vocab(settings.tokenizer)
    if vocab is None:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        on_progress(Progress(phase="training the tokenizer", total_bytes=total))
        documents = read_documents(files, settings.max_bytes, CorpusCounts())
        fraction = settings.validation_fraction
        tokenizer = train_bpe((d for d in documents if not is_validation(d, fraction)), vocab)
    tokenizer.save_pretrained(folder / "tokenizer")

    encoder = Encoder(tokenizer)
    splits = ["train", "val"] if settings.validation_fraction > 0 else ["train"]
    writers = {split: SplitWriter(folder / split, settings.sequence_length, encoder) for split in splits}
    skipped = CorpusCounts()
    for batch in batches(read_documents(files, settings.max_bytes, skipped)):
        by_split: dict[str, list[bytes]] = {split: [] for split in splits}
        for document in batch:
            side = "val" if is_validation(document, settings.validation_fraction) else "train"
            by_split[side].append(document)
        for split, writer in writers.items():
            writer.write(by_split[split])
        done = sum(writer.counts.bytes for writer in writers.values())
        tokens = sum(writer.counts.tokens for writer in writers.values())
        on_progress(Progress(phase="tokenising", total_bytes=total, done_bytes=done, tokens=tokens))
    counts = {split: writer.finish() for split, writer in writers.items()}
    _refuse_empty(counts, skipped, settings)
    return {
        "format_version": FORMAT_VERSION,
        "sequence_length": settings.sequence_length,
        "vocab_size": encoder.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "token_dtype": encoder.dtype,
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
        "skipped": asdict(skipped),
        "splits": {split: asdict(count) for split, count in counts.items()},
    }


def _refuse_empty(counts: dict[str, SplitCounts], skipped: CorpusCounts, settings: PrepareSettings) -> None:
    if not sum(count.documents for count in counts.values()):
        raise ValueError(
            f"--input {' '.join(settings.inputs)} holds no text ({skipped.binary_files_skipped} binary files "
            f"and {skipped.empty_documents} empty documents were skipped): give text files or .jsonl"
        )
    for split, count in counts.items():
        if not count.samples:
            advice = "give more text or set a smaller --sequence-length"
            if split == "val":
                advice += ", set a larger --validation-fraction, or 0 for no val split"
            raise ValueError(
                f"the {split} split got {count.documents} documents and {count.tokens} tokens, and one "
                f"sample needs {settings.sequence_length + 1}: {advice}"
            )


def _replace_folder(partial: Path, output: Path) -> None:
    """Put the finished folder in place; an old corpus goes only once the new one is complete."""
    old = partial.with_name(partial.name + ".old")
    if (output / MANIFEST_NAME).is_file():
        os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)
