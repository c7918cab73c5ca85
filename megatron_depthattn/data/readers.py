"""From files to units: what is handed to an encoding process at a time, in the order of the corpus.

One process reads everything but small text files, which the encoding processes open themselves (on a network file
system, opening is what costs). Compressed files are expanded as a stream; of a columnar file one column is read.
Reading can start at the end of any unit.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_depthattn.data.columns import column_rows
from megatron_depthattn.data.documents import CorpusFile, Format, digest_is_validation, pieces
from megatron_depthattn.data.encode import JSON, Content, Documents, JsonLines, Piece, Recipe, Rows, TextFiles
from megatron_depthattn.data.file_bytes import (
    DamagedFileError,
    NoTextError,
    TextCheck,
    UndecodableError,
    file_blocks,
    short_text,
)

UNIT_BYTES = 2 << 20  # about: a unit ends with the document that passes it
UNIT_FILES = 4096
NOT_READ = (Format.ARCHIVE, Format.DATASET_METADATA, Format.SPECIAL, Format.LINK)
NO_DOCUMENTS = Documents([])
# Of a JSON line, or a .json file that is one value: they are held in memory, several times over.
MAX_RECORD_BYTES = 256 << 20
_SPACE = " \t\r\n"  # JSON has no other


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
    """binary, undecodable, archive, dataset metadata, special, link out of the folder, damaged, or json as text."""
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
    small: list[tuple[int, CorpusFile]] = []
    small_bytes = 0
    for index, file in enumerate(files[start.file :], start=start.file):
        is_small = file.format is Format.TEXT and not file.compression and file.size <= UNIT_BYTES
        if small and (not is_small or small_bytes >= UNIT_BYTES or len(small) >= UNIT_FILES):
            yield Unit(TextFiles(small), Position(index), before)
            small, small_bytes = [], 0
        if is_small:
            small.append((index, file))
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
            if file.format in (Format.PARQUET, Format.ARROW):
                read = _column(file, recipe.text_field, start.offset)
            elif file.format is Format.JSON_LINES:
                read = _lines(file, start.offset, start.lines)
            elif file.format is Format.JSON:
                read, reason = _json(file, recipe, start)
                outcome = Outcome(index, "json as text", reason) if reason else None
            else:
                read = _text(file, recipe, start.offset)
            for content, offset, lines, consumed in read:
                yield Unit(content, Position(index, offset, lines), before + consumed)
        except NoTextError as error:
            outcome = Outcome(index, error.kind, str(error))
        except UndecodableError as error:
            is_text = file.format is Format.TEXT or outcome is not None
            outcome = Outcome(index, "undecodable" if is_text else "damaged", str(error))
        except DamagedFileError as error:
            outcome = Outcome(index, "damaged", str(error))
    yield Unit(NO_DOCUMENTS, Position(index + 1), before + file.size, outcome)


# ---- JSON lines ------------------------------------------------------------------------------------------


def _lines(file: CorpusFile, offset: int, lines: int) -> Iterator[_Read]:
    """Whole lines, `UNIT_BYTES` or more at a time but for the last; those before a damaged place, then the error."""
    rest: list[bytes] = []
    size = consumed = 0
    error: DamagedFileError | None = None
    blocks = file_blocks(file, offset)
    is_end = False
    while not is_end:
        try:
            block, consumed = next(blocks, (b"", consumed))
        except DamagedFileError as damage:
            block, error = b"", damage
        rest.append(block)
        size += len(block)
        if block and size > MAX_RECORD_BYTES and b"\n" not in block:
            number = lines + 1 + sum(part.count(b"\n") for part in rest)
            error = DamagedFileError(f"line {number} is longer than {MAX_RECORD_BYTES:,} bytes")
        is_end = not block or error is not None
        if not is_end and (size < UNIT_BYTES or b"\n" not in block):
            continue
        data = b"".join(rest)
        whole = len(data) if is_end and error is None else data.rfind(b"\n") + 1
        if whole:
            first, offset, lines = lines + 1, offset + whole, lines + data.count(b"\n", 0, whole)
            yield _Read(JsonLines(data[:whole], file.path, first), offset, lines, consumed)
        rest, size = [data[whole:]], len(data) - whole
    if error is not None:
        raise error


def _json(file: CorpusFile, recipe: Recipe, start: Position) -> tuple[Iterator[_Read], str]:
    """What to read of a .json file, and why it is a text, if it is."""
    records, why_text = _json_content(file, recipe.text_field)
    if why_text:
        return _text(file, recipe, start.offset), why_text
    if records is None:
        return _lines(file, start.offset, start.lines), ""
    return _records(records, file, recipe.text_field, start.offset), ""


def _records(records: list[Any], file: CorpusFile, text_field: str, start: int) -> Iterator[_Read]:
    """The records of an array from number `start` on, as lines of nothing but the field."""
    lines: list[bytes] = []
    size, first = 0, start
    for number, record in enumerate(records[start:], start=start + 1):
        text = record.get(text_field, 0) if isinstance(record, dict) else 0
        lines.append(json.dumps({text_field: text if text is None or isinstance(text, str) else 0}).encode() + b"\n")
        size += len(lines[-1])
        if size >= UNIT_BYTES or number == len(records):
            content = JsonLines(b"".join(lines), file.path, first + 1, "record")
            yield _Read(content, number, 0, file.size * number // len(records))
            lines, size, first = [], 0, number


# ---- what a .json file holds -----------------------------------------------------------------------------


class _JsonContent(NamedTuple):
    records: list[Any] | None = None
    """Of an array or a single object; None: they are lines, or there are none."""
    why_text: str = ""
    """Why it is read as a text."""


def _json_content(file: CorpusFile, text_field: str) -> _JsonContent:
    """Look at a .json file, which is read once more where it holds lines or a text.

    A text is an object or array without the field (settings, tables), or what is no JSON and does not name the field.

    Raises:
        DamagedFileError: it begins as records do, and cannot be read as such.
    """
    first, second = _first_lines(file)
    values = [_decode(line) for line in (first, second)]
    if not first:  # an empty file
        return _JsonContent()
    if isinstance(values[0], dict) and (second or text_field in values[0]):
        return _JsonContent()
    if isinstance(values[1], dict) and not first.startswith(b"["):  # the first line is damaged
        return _JsonContent()
    if not first.startswith((b"{", b"[")):
        return _JsonContent(why_text="it is no JSON object or array")
    text = _whole(file)
    try:
        value, end = JSON.raw_decode(text)
    except (ValueError, RecursionError) as error:
        if first.startswith(b"[") and json.dumps(text_field) in text:
            raise DamagedFileError(f"it begins as a JSON array and is not one ({error})") from error
        return _JsonContent(why_text=f"it is no JSON ({error})")
    if text[end:].strip(_SPACE):
        raise DamagedFileError("it holds several JSON values, and not one a line: write each record in a line")
    if isinstance(value, dict):
        return (
            _JsonContent([value]) if text_field in value else _JsonContent(why_text=f'it has no field "{text_field}"')
        )
    if value and not any(isinstance(record, dict) and text_field in record for record in value):
        return _JsonContent(why_text=f'it is an array without a field "{text_field}"')
    return _JsonContent(value)


def _first_lines(file: CorpusFile) -> tuple[bytes, bytes]:
    """The first two lines that are not blank, stripped; b"" where there is none."""
    lines = filter(None, (line.strip(_SPACE.encode()) for line in _all_lines(file)))
    return next(lines, b""), next(lines, b"")


def _all_lines(file: CorpusFile) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block, _ in file_blocks(file):
        first, *others = block.split(b"\n")
        rest.append(first)
        for other in others:
            yield b"".join(rest)
            rest = [other]
        if sum(map(len, rest)) > MAX_RECORD_BYTES:
            raise DamagedFileError(f"it has a line of over {MAX_RECORD_BYTES:,} bytes")
    yield b"".join(rest)


def _decode(line: bytes) -> Any:
    try:
        return JSON.decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _whole(file: CorpusFile) -> str:
    blocks, size = [], 0
    for block, _ in file_blocks(file):
        blocks.append(block)
        size += len(block)
        if size > MAX_RECORD_BYTES:
            raise DamagedFileError(
                f"it is one JSON value of over {MAX_RECORD_BYTES:,} bytes: write its records as lines"
            )
    # Invalid bytes become halves of surrogate pairs, which are replaced and counted where records are encoded.
    return b"".join(blocks).decode(errors="surrogateescape").strip(_SPACE)


# ---- text ------------------------------------------------------------------------------------------------


def _text(file: CorpusFile, recipe: Recipe, offset: int) -> Iterator[_Read]:
    """The file's one document: whole if it is short, else looked through first and then read in pieces."""
    text = short_text(file, UNIT_BYTES)
    if text is not None:
        if offset == 0:
            yield _Read(Documents([text]), len(text), 0, file.size)
        return
    split, is_blank, is_utf8, size = _look_through(file, recipe)
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
        yield _Read(piece, position, 0, min(file.size * position // size, file.size))


def _look_through(file: CorpusFile, recipe: Recipe) -> tuple[str, bool, bool, int]:
    """(split, whether it is blank, whether it is UTF-8, size in bytes) of a long document.

    Of one that is longer than all that is wanted only so much, and a block, is looked at: it is cut there at the
    latest, and what it expands to has no bounds.
    """
    digest, check = hashlib.sha256(), TextCheck()
    is_blank, is_whole, size = True, True, 0
    for block, _ in file_blocks(file):
        if b"\0" in block:
            raise NoTextError("binary")
        digest.update(block)
        check.add(block)
        size += len(block)
        is_blank = is_blank and not block.strip()
        if recipe.max_bytes is not None and size > recipe.max_bytes:
            is_blank = is_whole = False
            break
    if not check.finish(is_whole=is_whole):
        raise NoTextError("undecodable")
    split = "val" if digest_is_validation(digest.digest(), recipe.validation_fraction) else "train"
    return split, is_blank, check.is_utf8, size


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
                    yield _Read(Rows(documents, file.path, row - len(documents) + 1), row, 0, consumed)
                    documents, size = [], 0
    except DamagedFileError as error:
        damage = DamagedFileError(f"after row {row}, {error}")
    if documents:
        yield _Read(Rows(documents, file.path, row - len(documents) + 1), row, 0, file.size)
    if damage is not None:
        raise damage
