"""The bytes of a corpus file of text or JSON, expanded if it is compressed, in UTF-8; and whether they are text."""

import codecs
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from megatron_depthattn.data.documents import CorpusFile

BLOCK_BYTES = 1 << 20
# Read at a time from a compressed file. It bounds what is held at once: 512 bytes of zstd can stand for 16 MiB (blocks
# of 4 bytes for 128 KiB), of gzip for 0.5 MiB. What it held before damage in it is lost.
COMPRESSED_BLOCK_BYTES = 512

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MARK_BYTES = 4  # that the longest mark takes
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\v\f\r"})
_HIGH = bytes(range(128, 256))
_JUDGED_ASCII = 32  # fewer ASCII characters than this may well stand without a space


class DamagedFileError(Exception):
    """The rest of a file cannot be read; says why, without the file's name."""


class UndecodableError(DamagedFileError):
    """The file is not in the encoding that its byte-order mark names."""


class NoTextError(Exception):
    """The file holds a NUL byte ("binary"), or other things that are no text ("undecodable")."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def file_blocks(file: CorpusFile, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """(bytes of the expanded text from `start` on, bytes on disk so far), at most `BLOCK_BYTES` a block.

    The text is that without its byte-order mark, in UTF-8 if the mark says UTF-16 or UTF-32.
    """
    if file.compression:
        blocks = _joined(_expanded(file))
    else:
        with file.path.open("rb") as stream:
            size, encoding = byte_order_mark(stream.read(MARK_BYTES))
            if encoding == "utf-8":
                stream.seek(size + start)
                yield from _read(stream)
                return
        blocks = _read(file.path.open("rb"))
    skip = start
    try:
        for data, consumed in utf8_blocks(blocks):
            if skip < len(data):
                yield data[skip:], consumed
            skip = max(skip - len(data), 0)
    except UnicodeDecodeError as error:
        raise UndecodableError(f"its byte-order mark says {error.encoding}, and it is not ({error.reason})") from error


def _read(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    with stream:
        while data := stream.read(BLOCK_BYTES):
            yield data, stream.tell()


def _joined(blocks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same bytes in blocks of `BLOCK_BYTES`; before damage, those that precede it."""
    rest, consumed = bytearray(), 0
    damage: DamagedFileError | None = None
    while damage is None:
        try:
            block, consumed = next(blocks, (b"", consumed))
        except DamagedFileError as error:
            block, damage = b"", error
        rest += block
        if not block or len(rest) >= BLOCK_BYTES:
            yield from ((bytes(rest[i : i + BLOCK_BYTES]), consumed) for i in range(0, len(rest), BLOCK_BYTES))
            rest.clear()
        if not block and damage is None:
            return
    raise damage


def _expanded(file: CorpusFile) -> Iterator[tuple[bytes, int]]:
    """A gzip or zstd file's members or frames, one after the other."""
    decompressor: Any = None
    consumed = 0
    with file.path.open("rb") as stream:
        while data := stream.read(COMPRESSED_BLOCK_BYTES):
            if file.compression == "gzip" and consumed and decompressor is None:
                data = data.lstrip(b"\0")  # padding after a member, which gzip itself passes over
            while data:
                decompressor = decompressor or _decompressor(file.compression)
                try:
                    expanded = decompressor.decompress(data)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise DamagedFileError(
                        f"the {file.compression} data is damaged between byte {consumed} and {stream.tell()} ({error})"
                    ) from error
                consumed = stream.tell() - len(decompressor.unused_data)
                if expanded:
                    yield expanded, consumed
                data = decompressor.unused_data
                if decompressor.eof:
                    decompressor = None
                    data = data.lstrip(b"\0") if file.compression == "gzip" else data
    if decompressor is not None or consumed == 0:
        raise DamagedFileError(f"the {file.compression} data is truncated: it ends at byte {consumed}, too early")


def _decompressor(compression: str) -> Any:
    if compression == "gzip":
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    # Whatever --long made it: large public corpora use windows of 2 GiB, the most that zstd has. A window takes memory
    # as it fills, once, in the process that reads.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def byte_order_mark(head: bytes) -> tuple[int, str]:
    """(bytes of the mark that a file begins with, its encoding); `head` are its first `MARK_BYTES` bytes or more."""
    return next(((len(mark), encoding) for mark, encoding in _MARKS if head.startswith(mark)), (0, "utf-8"))


def utf8_blocks(blocks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """A file's blocks in UTF-8 and without the byte-order mark, all of which the first one holds."""
    decoder: codecs.IncrementalDecoder | None = None
    for number, (data, tag) in enumerate(blocks):
        block = data
        if number == 0:
            size, encoding = byte_order_mark(data)
            block = data[size:]
            decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
        yield (block if decoder is None else decoder.decode(block).encode()), tag
    if decoder is not None:
        decoder.decode(b"", final=True)


class TextCheck:
    """Learns from the blocks of a text whether it is UTF-8, and whether it is text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tail = b""
        self._characters = self._odd = self._replaced = self._ascii = self._spaces = 0

    @property
    def is_utf8(self) -> bool:
        """Whether no byte had to be replaced; final once `finish` was called."""
        return self._replaced == 0

    def add(self, block: bytes, *, is_last: bool = False) -> None:
        self._odd += len(block) - len(block.translate(None, _CONTROLS))
        self._ascii += len(block.translate(None, _HIGH))
        self._spaces += block.count(b" ") + block.count(b"\n")
        text, spelt_out = self._decoder.decode(block, is_last), self._tail + block
        self._tail = spelt_out[-2:]
        self._characters += len(text)
        self._odd += text.count("\ufffd")
        self._replaced += text.count("\ufffd") - spelt_out.count("\ufffd".encode())

    def finish(self, *, is_whole: bool = True) -> bool:
        """Whether it is text in UTF-8, or in ASCII with other bytes here and there that are replaced, such as Latin-1.

        It is not if over a quarter of its characters are invalid UTF-8 or control characters (other code pages, most
        compressed data), or if it is invalid UTF-8 with hardly a space or line end among its ASCII characters: UTF-16
        of Japanese without a mark looks like that. As text these would be no language.

        Args:
            is_whole: False if more blocks would follow, so that half a character at the end is none of its faults.
        """
        self.add(b"", is_last=is_whole)
        has_spaces = self._ascii < _JUDGED_ASCII or self._spaces * 100 >= self._ascii
        return self._odd * 4 <= self._characters and (self.is_utf8 or has_spaces)


def short_text(file: CorpusFile, max_bytes: int) -> bytes | None:
    """The text of a file; None if it is longer than `max_bytes`.

    Raises:
        NoTextError: it is no text.
    """
    text = b""
    try:
        for block, _ in file_blocks(file):
            text += block
            if b"\0" in block:
                raise NoTextError("binary")
            if len(text) > max_bytes:
                return None
    except UndecodableError as error:
        raise NoTextError("undecodable", str(error)) from error
    check = TextCheck()
    check.add(text)
    if not check.finish():
        raise NoTextError("undecodable")
    return text
