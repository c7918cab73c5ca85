"""From files to units: what is handed to an encoding process at a time, in the order of the corpus.

One process reads everything but small text files, which the encoding processes open themselves (on a network file
system, opening is what costs). Compressed files are expanded as a stream; of a columnar file one column is read.
Reading can start at the end of any unit.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_depthattn.data.columns import column_rows
from megatron_depthattn.data.documents import CorpusFile, Format, digest_is_validation, pieces
from megatron_depthattn.data.encode import Content, Documents, JsonLines, Piece, Recipe, TextFiles, json_text
from megatron_depthattn.data.file_bytes import DamagedFileError, file_blocks

UNIT_BYTES = 2 << 20  # about: a unit ends with the document that passes it
UNIT_FILES = 4096
SNIFFED_BYTES = 16 << 20  # a .json file whose first line is longer is a text
NOT_READ = (Format.ARCHIVE, Format.DATASET_METADATA, Format.SPECIAL)
NO_DOCUMENTS = Documents([])


class Position(NamedTuple):
    """Where a unit starts: in file number `file`, after `offset` expanded bytes, or rows of a columnar file."""

    file: int = 0
    offset: int = 0
    lines: int = 0
    """Lines before it in the file; for messages."""


START = Position()


class Outcome(NamedTuple):
    """What became of a file that was not simply read."""

    file: int
    kind: str
    """binary, archive, dataset metadata, special, damaged, or json as text."""
    message: str = ""


class Unit(NamedTuple):
    content: Content
    end: Position
    consumed_bytes: int
    """Bytes on disk of all files up to here; for the progress."""
    outcome: Outcome | None = None
    """Of the file that ends here."""


class _Read(NamedTuple):
    content: Content
    offset: int
    lines: int = 0
    consumed_bytes: int = 0


def read_units(files: Sequence[CorpusFile], recipe: Recipe, start: Position = START) -> Iterator[Unit]:
    """The units of the corpus from `start` on.

    A file that is damaged, binary or of no known format ends with a unit that says so.

    Raises:
        OSError: a file cannot be read at all.
    """
    before = sum(file.size for file in files[: start.file])
    small: list[tuple[int, Path]] = []
    small_bytes = 0
    for index, file in enumerate(files[start.file :], start=start.file):
        is_small = file.format is Format.TEXT and not file.compression and file.size <= UNIT_BYTES
        if small and (not is_small or small_bytes >= UNIT_BYTES or len(small) >= UNIT_FILES):
            yield Unit(TextFiles(small), Position(index), before)
            small, small_bytes = [], 0
        if is_small:
            small.append((index, file.path))
            small_bytes += file.size
        else:
            yield from _units_of_file(index, file, before, recipe, start if index == start.file else Position(index))
        before += file.size
    if small:
        yield Unit(TextFiles(small), Position(len(files)), before)


def _units_of_file(index: int, file: CorpusFile, before: int, recipe: Recipe, start: Position) -> Iterator[Unit]:
    outcome: Outcome | None = None
    if file.format in NOT_READ:
        outcome = Outcome(index, file.format.value)
    else:
        try:
            is_lines = file.format is Format.JSON_LINES or (
                file.format is Format.JSON and _starts_with_record(file, recipe)
            )
            if file.format in (Format.PARQUET, Format.ARROW):
                read = _column(file, recipe.text_field, start.offset)
            elif is_lines:
                read = _lines(file, start.offset, start.lines)
            else:
                read = _text(file, recipe, start.offset)
                outcome = Outcome(index, "json as text") if file.format is Format.JSON else None
            for content, offset, lines, consumed in read:
                yield Unit(content, Position(index, offset, lines), before + consumed)
        except _BinaryFileError:
            outcome = Outcome(index, "binary")
        except DamagedFileError as error:
            outcome = Outcome(index, "damaged", str(error))
    yield Unit(NO_DOCUMENTS, Position(index + 1), before + file.size, outcome)


# ---- JSON lines ------------------------------------------------------------------------------------------


def _starts_with_record(file: CorpusFile, recipe: Recipe) -> bool:
    with file.path.open("rb") as stream:
        return json_text(stream.readline(SNIFFED_BYTES), recipe.text_field)[0] is not None


def _lines(file: CorpusFile, offset: int, lines: int) -> Iterator[_Read]:
    """Whole lines, `UNIT_BYTES` or more at a time but for the last; those before a damaged place, then the error."""
    rest: list[bytes] = []
    size = consumed = 0
    damage: DamagedFileError | None = None
    blocks = file_blocks(file, offset)
    while True:
        try:
            block, consumed = next(blocks, (b"", consumed))
        except DamagedFileError as error:
            block, damage = b"", error
        rest.append(block)
        size += len(block)
        if block and (size < UNIT_BYTES or b"\n" not in block):
            continue
        data = b"".join(rest)
        whole = len(data) if not block and damage is None else data.rfind(b"\n") + 1
        if whole:
            first, offset, lines = lines + 1, offset + whole, lines + data.count(b"\n", 0, whole)
            yield _Read(JsonLines(data[:whole], file.path, first), offset, lines, consumed)
        if damage is not None:
            raise damage
        if not block:
            return
        rest, size = [data[whole:]], len(data) - whole


# ---- text ------------------------------------------------------------------------------------------------


class _BinaryFileError(Exception):
    """The file holds a NUL byte."""


def _text(file: CorpusFile, recipe: Recipe, offset: int) -> Iterator[_Read]:
    """The file's one document: whole if it is short, else looked through first and then read in pieces."""
    head = b""
    for block, _ in file_blocks(file):
        head += block
        if b"\0" in block:
            raise _BinaryFileError
        if len(head) > UNIT_BYTES:
            break
    else:
        if offset == 0:
            yield _Read(Documents([head]), len(head), 0, file.size)
        return
    split, is_blank, is_utf8, size = _look_through(lambda: (block for block, _ in file_blocks(file)), recipe)
    if is_blank:
        yield _Read(Documents([b""]), size, 0, file.size)
        return
    position = offset
    for data in pieces(block for block, _ in file_blocks(file, offset)):
        piece = Piece(
            data,
            split,
            is_first=position == 0,
            is_last=position + len(data) == size,
            is_repaired=not is_utf8,
        )
        position += len(data)
        yield _Read(piece, position, 0, file.size * position // size)


def _look_through(blocks: Callable[[], Iterator[bytes]], recipe: Recipe) -> tuple[str, bool, bool, int]:
    """(split, whether it is blank, whether it is UTF-8, size in bytes) of a long document."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    is_blank, is_utf8, size = True, True, 0
    for block in blocks():
        if b"\0" in block:
            raise _BinaryFileError
        digest.update(block)
        size += len(block)
        is_blank = is_blank and not block.strip()
        try:
            if is_utf8:
                decoder.decode(block)
        except UnicodeDecodeError:
            is_utf8 = False
    is_utf8 = is_utf8 and not decoder.getstate()[0]  # no half of a character at the end
    split = "val" if digest_is_validation(digest.digest(), recipe.validation_fraction) else "train"
    return split, is_blank, is_utf8, size


# ---- columns ---------------------------------------------------------------------------------------------


def _column(file: CorpusFile, name: str, start: int) -> Iterator[_Read]:
    """The rows of a parquet or Arrow file from row `start` on; a null is an empty document."""
    documents: list[bytes] = []
    size, row = 0, start
    damage: DamagedFileError | None = None
    try:
        for rows, consumed in column_rows(file, name, start):
            for document in rows:
                documents.append(document or b"")
                size += len(documents[-1])
                row += 1
                if size >= UNIT_BYTES:
                    yield _Read(Documents(documents), row, 0, consumed)
                    documents, size = [], 0
    except DamagedFileError as error:
        damage = DamagedFileError(f"after row {row}, {error}")
    if documents:
        yield _Read(Documents(documents), row, 0, file.size)
    if damage is not None:
        raise damage
