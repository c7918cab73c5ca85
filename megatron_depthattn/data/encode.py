"""What an encoding process does: documents of one unit of the corpus in, tokens of the two splits out.

Imports little: a process costs tens of megabytes, not the gigabyte of torch and transformers.
"""

import io
import json
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_depthattn.data.documents import CorpusFile, character_start, is_validation, pieces
from megatron_depthattn.data.file_bytes import NoTextError, text_blocks
from megatron_depthattn.data.tokenizer import Encoder

JSON = json.JSONDecoder(parse_int=float)  # Python rejects integers of more than 4,300 digits, which JSON allows
SPLITS = ("train", "val")


class TextFiles(NamedTuple):
    """Whole small files, a document each: (index in the corpus, file)."""

    files: list[tuple[int, CorpusFile]]


class Rows(NamedTuple):
    """Consecutive rows of one columnar file, a document each; b"" for a null."""

    rows: list[bytes]
    path: Path
    first_row: int
    """Counts from 1."""


class JsonLines(NamedTuple):
    """Whole lines of one file, a JSON object each."""

    lines: bytes
    path: Path
    first_line: int
    """Counts from 1."""
    unit: str = "line"
    """What a line is in the file: a line, or a record of a JSON array."""


class Piece(NamedTuple):
    """A part of a document that is too long for one request; the whole was looked through before."""

    data: bytes
    split: str
    is_first: bool
    is_last: bool
    is_repaired: bool
    """The document is not valid UTF-8."""


Content = TextFiles | Rows | JsonLines | Piece


class Recipe(NamedTuple):
    text_field: str
    validation_fraction: float
    max_bytes: int | None = None


@dataclass
class Counts:
    """What is counted of documents."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    """Per split: documents, documents_with_replaced_utf8, bytes; of what is merged also the writer's counts."""
    skipped: Counter[str] = field(default_factory=Counter)
    """By the manifest's names."""
    first_damage: str = ""

    @property
    def bytes(self) -> int:
        return sum(counts["bytes"] for counts in self.counts.values())


@dataclass
class Encoded(Counts):
    """What became of a `Content`."""

    tokens: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Per split: the tokens of its documents, each followed by EOS, [number of tokens]."""
    lengths: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """Per split: tokens of each document, its EOS included, [number of documents]."""
    begins: bool = True
    """Whether the first document begins here: with False it is the only one, and its beginning came before."""
    ends: bool = True
    """Whether the last document ends here: with False it is the only one, and more of it follows."""
    left_out: list[tuple[Any, ...]] = field(default_factory=list)
    """(index in the corpus, binary or undecodable, perhaps a message) of the files that are no text."""

    def damage(self, message: str) -> None:
        self.skipped["damaged_records"] += 1
        self.first_damage = self.first_damage or message


# ---- documents -------------------------------------------------------------------------------------------


def parts(content: Content, recipe: Recipe, encoded: Encoded) -> Iterator[Piece]:
    """The documents of `content`, as pieces that mostly are whole documents. Adds what is passed over to `encoded`."""
    if isinstance(content, Piece):
        yield content
        return
    for data, is_repaired in _documents(content, recipe, encoded):
        if not data.strip():
            encoded.skipped["empty_documents"] += 1
            continue
        split = "val" if is_validation(data, recipe.validation_fraction) else "train"
        yield Piece(data, split, is_first=True, is_last=True, is_repaired=is_repaired or not _is_utf8(data))


def _documents(content: Content, recipe: Recipe, encoded: Encoded) -> Iterator[tuple[bytes, bool]]:
    """(document, whether it was repaired already)"""
    if isinstance(content, Rows):
        yield from _row_documents(content, encoded)
    elif isinstance(content, JsonLines):
        yield from _json_documents(content, recipe.text_field, encoded)
    elif isinstance(content, TextFiles):
        for index, file in content.files:
            try:
                yield b"".join(text_blocks(file)), False
            except NoTextError as error:
                encoded.left_out.append((index, *error.args))


def _row_documents(content: Rows, encoded: Encoded) -> Iterator[tuple[bytes, bool]]:
    for number, row in enumerate(content.rows, start=content.first_row):
        if not _is_utf8(row) and _is_mostly_replaced(row.decode(errors="replace")):
            encoded.damage(f"{content.path}: row {number} is mostly invalid UTF-8")
        else:
            yield row, False


def _json_documents(content: JsonLines, text_field: str, encoded: Encoded) -> Iterator[tuple[bytes, bool]]:
    for number, line in enumerate(io.BytesIO(content.lines), start=content.first_line):
        if not line.strip():
            continue
        where, is_repaired = f"{content.path}, {content.unit} {number}", not _is_utf8(line)
        try:  # without a mark: files with one are joined
            text = JSON.decode(line.removeprefix(BOM_UTF8).decode(errors="replace"))[text_field]
        except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, no such field, no object, nested too deep
            text = 0
        text = "" if text is None else text
        if not isinstance(text, str):
            encoded.damage(f'{where} is not a JSON object with a string field "{text_field}" (--text-field)')
        elif is_repaired and _is_mostly_replaced(text):
            encoded.damage(f"{where} is mostly invalid UTF-8")
        else:
            try:
                yield text.encode(), is_repaired
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
                yield text.encode(errors="replace"), True


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_mostly_replaced(text: str) -> bool:
    """Whether a text that was repaired is mostly repair."""
    return text.count("\ufffd") * 4 > len(text)


# ---- tokens ----------------------------------------------------------------------------------------------


def encode(
    content: Content,
    encoder: Encoder,
    recipe: Recipe,
    max_bytes: int | None = None,
    max_train_documents: int | None = None,
) -> Encoded:
    """Tokens and counts; stops after `max_bytes` of documents, the last one cut at a character and ended.

    Stops after `max_train_documents` of the train split too.

    The split of a cut document is that of the whole.
    """
    encoded = Encoded()
    tokens: dict[str, list[npt.NDArray[Any]]] = {split: [encoder.end[:0]] for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    left = sys.maxsize if max_bytes is None else max_bytes
    for part in parts(content, recipe, encoded):
        if len(part.data) >= left:
            data = part.data if len(part.data) == left else part.data[: character_start(part.data, left)]
            part = part._replace(data=data, is_last=True)
            left = 0
        else:
            left -= len(part.data)
        if part.data or not part.is_first:
            new = _tokens(part, encoder)
            tokens[part.split] += new
            lengths[part.split].append(sum(map(len, new)))
            encoded.begins, encoded.ends = part.is_first, part.is_last
            counts = encoded.counts[part.split]
            counts["documents"] += part.is_first
            counts["documents_with_replaced_utf8"] += part.is_first and part.is_repaired
            counts["bytes"] += len(part.data)
        if left <= 0 or len(lengths["train"]) == max_train_documents:
            break
    encoded.tokens = {split: np.concatenate(arrays) for split, arrays in tokens.items()}
    encoded.lengths = {split: np.array(of, np.int64) for split, of in lengths.items()}
    return encoded


def _tokens(part: Piece, encoder: Encoder) -> list[npt.NDArray[Any]]:
    blocks = (part.data[i : i + (1 << 20)] for i in range(0, len(part.data), 1 << 20))
    # One text at a time: the library's own record of a text takes some 40 times its bytes.
    tokens = [encoder.tokens(piece.decode(errors="replace")) for piece in pieces(blocks)]
    return [*tokens, encoder.end] if part.is_last else tokens
