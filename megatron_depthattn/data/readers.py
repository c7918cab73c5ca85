"""From files to units: what is handed to an encoding process at a time, in the order of the corpus.

One process reads everything but small text files, which the encoding processes open themselves (on a network file
system, opening is what costs). Compressed files are expanded as a stream; of a columnar file one column is read.
Reading can start at the end of any unit.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from megatron_depthattn.data.columns import column_rows
from megatron_depthattn.data.documents import CorpusFile, digest_is_validation, pieces
from megatron_depthattn.data.encode import JSON, Content, JsonLines, Piece, Recipe, Rows, TextFiles
from megatron_depthattn.data.file_bytes import DamagedFileError, NoTextError, TextCheck, file_blocks, text_blocks

UNIT_BYTES = 2 << 20  # about: a unit ends with the document that passes it
UNIT_FILES = 4096
NOT_READ = ("archive", "dataset metadata", "special", "link out of the folder")
# Of a JSON line, or a .json file that is one value: they are held in memory, several times over.
MAX_RECORD_BYTES = 256 << 20
_SPACE = b" \t\r\n"  # JSON has no other


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


_Reads = Iterator[tuple[Content, int, int, int]]
"""(content, the file's offset and lines where it ends, bytes on disk up to there)"""


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
        is_small = file.format == "text" and not file.compression and file.size <= UNIT_BYTES
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
        outcome = Outcome(index, file.format)
    else:
        try:
            if file.format in ("parquet", "arrow", "hub"):
                read = _column(file, recipe.text_field, start.offset)
            elif file.format == "json lines":
                read = _lines(file, start.offset, start.lines)
            elif file.format == "json":
                read, reason = _json(file, recipe, start)
                outcome = Outcome(index, "json as text", reason) if reason else None
            else:
                read = _text(file, recipe, start.offset)
            for content, offset, lines, consumed in read:
                yield Unit(content, Position(index, offset, lines), before + consumed)
        except NoTextError as error:
            outcome = Outcome(index, *error.args)
        except DamagedFileError as error:
            outcome = Outcome(index, "damaged", str(error))
    yield Unit(TextFiles([]), Position(index + 1), before + file.size, outcome)


# ---- JSON lines ------------------------------------------------------------------------------------------


def _lines(file: CorpusFile, offset: int, lines: int) -> Iterator[tuple[JsonLines, int, int, int]]:
    """Whole lines, `UNIT_BYTES` or more at a time but for the last; those before a damaged place, then the error."""
    rest, consumed = bytearray(), 0
    damage: DamagedFileError | None = None
    try:
        for block, consumed in file_blocks(file, offset):
            rest += block
            has_end = b"\n" in block
            if len(rest) > MAX_RECORD_BYTES and not has_end:
                number = lines + 1 + rest.count(b"\n")
                raise DamagedFileError(f"line {number} is longer than {MAX_RECORD_BYTES:,} bytes")
            if len(rest) >= UNIT_BYTES and has_end:
                whole = rest.rfind(b"\n") + 1
                content = JsonLines(bytes(memoryview(rest)[:whole]), file.path, lines + 1)  # one copy
                del rest[:whole]
                offset, lines = offset + whole, lines + content.lines.count(b"\n")
                yield content, offset, lines, consumed
    except DamagedFileError as error:
        damage = error
        del rest[rest.rfind(b"\n") + 1 :]
    if rest:
        content = JsonLines(bytes(rest), file.path, lines + 1)
        yield content, offset + len(rest), lines + rest.count(b"\n"), consumed
    if damage:
        raise damage


def _json(file: CorpusFile, recipe: Recipe, start: Position) -> tuple[_Reads, str]:
    """What to read of a .json file, and why it is a text, if it is.

    A text is an object or array without the field (settings, tables), or what is no JSON and does not name the field.

    Raises:
        DamagedFileError: it begins as records do, and cannot be read as such.
    """
    field = recipe.text_field
    lines = (line.strip(_SPACE) for content in _lines(file, 0, 0) for line in content[0].lines.split(b"\n"))
    first, second = islice(chain(filter(None, lines), (b"", b"")), 2)
    value = _decode(first)
    is_record = isinstance(value, dict) and (second or field in value)
    is_damaged_record = not first.startswith(b"[") and isinstance(_decode(second), dict)
    if not first or is_record or is_damaged_record:
        return _lines(file, start.offset, start.lines), ""
    is_json = first.startswith((b"{", b"["))
    records, why_text = _json_value(file, field) if is_json else ([], "it is no JSON object or array")
    return (_text(file, recipe, start.offset) if why_text else _records(records, file, field, start.offset)), why_text


def _decode(line: bytes) -> Any:
    try:
        return JSON.decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _json_value(file: CorpusFile, field: str) -> tuple[list[Any], str]:
    """The records of a file that is one array or one object, or why it is a text."""
    data = bytearray()
    for block, _ in file_blocks(file):
        data += block
        if len(data) > MAX_RECORD_BYTES:
            raise DamagedFileError(f"it is one JSON value of over {MAX_RECORD_BYTES:,} bytes: write it as lines")
    # Invalid bytes become halves of surrogate pairs, which are replaced and counted where records are encoded.
    text = data.strip(_SPACE).decode(errors="surrogateescape")
    try:
        value, end = JSON.raw_decode(text)
    except (ValueError, RecursionError) as error:
        if text.startswith("[") and json.dumps(field) in text:
            raise DamagedFileError(f"it begins as a JSON array and is not one ({error})") from error
        return [], f"it is no JSON ({error})"
    if end < len(text):
        raise DamagedFileError("it holds several JSON values, and not one a line: write each record in a line")
    records: list[Any] = value if isinstance(value, list) else [value]
    if records and not any(isinstance(record, dict) and field in record for record in records):
        return [], f'it has no field "{field}"'
    return records, ""


def _records(records: list[Any], file: CorpusFile, text_field: str, start: int) -> _Reads:
    """The records of an array from number `start` on, as lines of nothing but the field."""
    lines: list[bytes] = []
    size, first = 0, start
    for number, record in enumerate(records[start:], start=start + 1):
        text = record.get(text_field, 0) if isinstance(record, dict) else 0
        lines.append(json.dumps({text_field: text if text is None or isinstance(text, str) else 0}).encode() + b"\n")
        size += len(lines[-1])
        if size >= UNIT_BYTES or number == len(records):
            content = JsonLines(b"".join(lines), file.path, first + 1, "record")
            yield content, number, 0, file.size * number // len(records)
            lines, size, first = [], 0, number


# ---- text ------------------------------------------------------------------------------------------------


def _text(file: CorpusFile, recipe: Recipe, offset: int) -> _Reads:
    """The file's one document: looked through first, then read in pieces.

    Of one that is longer than all that is wanted only so much, and a block, is looked at: it is cut there at the
    latest, and what it expands to has no bounds.
    """
    digest, check = hashlib.sha256(), TextCheck()
    is_blank, size, kept = True, 0, b""
    for block in text_blocks(file, check):
        digest.update(block)
        size += len(block)
        kept = kept + block if size <= UNIT_BYTES else b""  # short: not read again
        is_blank = is_blank and not block.strip()
        if recipe.max_bytes is not None and size > max(recipe.max_bytes, UNIT_BYTES):
            is_blank = False
            if not check.finish(is_whole=False):
                raise NoTextError("undecodable")
            break
    if is_blank and not offset:
        yield Rows([b""], file.path, 1), size, 0, file.size
        return
    split = "val" if digest_is_validation(digest.digest(), recipe.validation_fraction) else "train"
    for data in pieces([kept[offset:]] if kept else (block for block, _ in file_blocks(file, offset))):
        is_first, offset = offset == 0, offset + len(data)
        piece = Piece(data, split, is_first=is_first, is_last=offset == size, is_repaired=check.replaced > 0)
        yield piece, offset, 0, min(file.size * offset // size, file.size)


# ---- columns ---------------------------------------------------------------------------------------------


def _column(file: CorpusFile, name: str, start: int) -> _Reads:
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
                    yield Rows(documents, file.path, row - len(documents) + 1), row, 0, consumed
                    documents, size = [], 0
    except DamagedFileError as error:
        damage = DamagedFileError(f"after row {row}, {error}")
    if documents:
        yield Rows(documents, file.path, row - len(documents) + 1), row, 0, file.size
    if damage:
        raise damage
