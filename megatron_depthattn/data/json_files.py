"""What a .json file holds: records, one a line or all in one array, or a document of its own, such as settings."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_depthattn.data.documents import CorpusFile
from megatron_depthattn.data.encode import JSON
from megatron_depthattn.data.file_bytes import DamagedFileError, file_blocks

# Of a JSON line, or a .json file that is one value: they are held in memory, several times over.
MAX_RECORD_BYTES = 256 << 20
_SPACE = " \t\r\n"  # JSON has no other


class JsonContent(NamedTuple):
    records: list[Any] | None = None
    """Of an array or a single object; None: they are lines, or there are none."""
    why_text: str = ""
    """Why it is read as a text."""


def json_content(file: CorpusFile, text_field: str) -> JsonContent:
    """Look at a .json file, which is read once more where it holds lines or a text.

    A text is an object or array without the field (settings, tables), or what is no JSON and does not name the field.

    Raises:
        DamagedFileError: it begins as records do, and cannot be read as such.
    """
    first, second = _first_lines(file)
    values = [_decode(line) for line in (first, second)]
    if not first:  # an empty file
        return JsonContent()
    if isinstance(values[0], dict) and (second or text_field in values[0]):
        return JsonContent()
    if isinstance(values[1], dict) and not first.startswith(b"["):  # the first line is damaged
        return JsonContent()
    if not first.startswith((b"{", b"[")):
        return JsonContent(why_text="it is no JSON object or array")
    text = _whole(file)
    try:
        value, end = JSON.raw_decode(text)
    except (ValueError, RecursionError) as error:
        if first.startswith(b"[") and json.dumps(text_field) in text:
            raise DamagedFileError(f"it begins as a JSON array and is not one ({error})") from error
        return JsonContent(why_text=f"it is no JSON ({error})")
    if text[end:].strip(_SPACE):
        raise DamagedFileError("it holds several JSON values, and not one a line: write each record in a line")
    if isinstance(value, dict):
        return JsonContent([value]) if text_field in value else JsonContent(why_text=f'it has no field "{text_field}"')
    if value and not any(isinstance(record, dict) and text_field in record for record in value):
        return JsonContent(why_text=f'it is an array without a field "{text_field}"')
    return JsonContent(value)


def _first_lines(file: CorpusFile) -> tuple[bytes, bytes]:
    """The first two lines that are not blank, stripped; b"" where there is none."""
    lines = filter(None, (line.strip(_SPACE.encode()) for line in _lines(file)))
    return next(lines, b""), next(lines, b"")


def _lines(file: CorpusFile) -> Iterator[bytes]:
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
