"""Finding and reading documents: which files make up the corpus, their text as bytes, their split.

Documents are read one at a time. A document goes to train or val by a hash of its bytes, whatever the order
of the files; copies of a document therefore land on the same side.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BUILTIN_STDLIB = "builtin:python-stdlib"
ARCHIVES = frozenset(
    [".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".parquet", ".arrow", ".feather"]
)
BATCH_BYTES = 4 << 20  # text handed to the tokenizer's threads at a time
FIRST_BLOCK_BYTES = 1 << 16  # a large binary file mostly shows itself here, and is then not read whole


class CorpusFile(NamedTuple):
    path: Path
    name: str
    size: int


@dataclass
class CorpusCounts:
    """What was passed over while reading."""

    binary_files_skipped: int = 0
    empty_documents: int = 0


def corpus_files(inputs: Sequence[str]) -> list[CorpusFile]:
    """Every file of the inputs, in a fixed order; `name` is relative to its input.

    Raises:
        ValueError: an input does not exist, is an archive, or is an unknown builtin.
    """
    files: list[CorpusFile] = []
    for given in inputs:
        path = Path(given)
        if given == BUILTIN_STDLIB:
            skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
            files += [f for f in _walk(Path(sysconfig.get_paths()["stdlib"]), skip) if f.path.suffix == ".py"]
        elif given.startswith("builtin:"):
            raise ValueError(f"--input {given} is not known: the builtin corpus is {BUILTIN_STDLIB}")
        elif path.is_dir():
            files += _walk(path, set())
        elif not path.is_file():
            raise ValueError(f"--input {given} does not exist: give text files, folders, or {BUILTIN_STDLIB}")
        elif path.suffix.lower() in ARCHIVES:
            raise ValueError(
                f"--input {given} is compressed or columnar, which is not read: expand it to text or .jsonl"
            )
        else:
            files.append(CorpusFile(path, path.name, path.stat().st_size))
    return files


def _walk(root: Path, skip_folders: set[str]) -> Iterator[CorpusFile]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skip_folders)
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():  # not a socket, a pipe or a broken link
                yield CorpusFile(path, path.relative_to(root).as_posix(), path.stat().st_size)


def read_documents(files: Sequence[CorpusFile], max_bytes: int | None, counts: CorpusCounts) -> Iterator[bytes]:
    """Documents as bytes: one per file, or one per line's "text" field of a .jsonl file. Adds to `counts`.

    A binary file (with a NUL byte) is skipped; so is an empty document. The document that passes `max_bytes`
    is cut at a character and ends the corpus.
    """
    left = sys.maxsize if max_bytes is None else max_bytes
    for file in files:
        is_lines = file.path.suffix == ".jsonl"
        for data in _json_lines(file.path) if is_lines else _whole_file(file.path, counts):
            if not data.strip():
                counts.empty_documents += 1
                continue
            if len(data) > left:
                while left and data[left] & 0xC0 == 0x80:  # inside a UTF-8 character
                    left -= 1
                data = data[:left]
            left -= len(data)
            if data:
                yield data
            if left <= 0:
                return


def _whole_file(path: Path, counts: CorpusCounts) -> Iterator[bytes]:
    with path.open("rb") as file:
        data = file.read(FIRST_BLOCK_BYTES)
        if b"\0" not in data:
            data += file.read()
    if b"\0" in data:
        counts.binary_files_skipped += 1
    else:
        yield data


def _json_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):  # not JSON, no such field, not an object
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number} is not a JSON object with a string field "text"')
            yield text.encode("utf-8", errors="replace")  # JSON can spell half of a surrogate pair


def batches(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Consecutive documents in lists that end once they hold `BATCH_BYTES`; the last one may be smaller."""
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def is_validation(document: bytes, fraction: float) -> bool:
    """Whether a document belongs to val: its SHA-256, read as a number in [0, 1), is below `fraction`."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") < fraction * 2.0**64
