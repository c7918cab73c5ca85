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
    """The file holds a NUL byte ("binary"), or is no text ("undecodable"): its `args`, perhaps with a message."""


def file_blocks(file: CorpusFile, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """(bytes of the expanded text from `start` on, bytes on disk so far), at most `BLOCK_BYTES` a block.

    The text is that without its byte-order mark, in UTF-8 if the mark says UTF-16 or UTF-32.
    """
    if not file.compression:
        with file.path.open("rb") as stream:
            size, encoding = byte_order_mark(stream.read(MARK_BYTES))
            if encoding == "utf-8":
                stream.seek(size + start)
                yield from _read(stream)
                return
    blocks = _joined(_expanded(file)) if file.compression else _read(file.path.open("rb"))
    decoder: codecs.IncrementalDecoder | None = None
    skip = start
    try:
        for number, (block, consumed) in enumerate(blocks):
            size, encoding = byte_order_mark(block) if number == 0 else (0, "utf-8")
            if encoding != "utf-8":
                decoder = codecs.getincrementaldecoder(encoding)()
            data = decoder.decode(block[size:]).encode() if decoder else block[size:]
            if skip < len(data):
                yield data[skip:], consumed
            skip = max(skip - len(data), 0)
        if decoder:
            decoder.decode(b"", final=True)
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
    try:
        for block, consumed in blocks:
            rest += block
            while len(rest) >= BLOCK_BYTES:
                yield bytes(rest[:BLOCK_BYTES]), consumed
                del rest[:BLOCK_BYTES]
    except DamagedFileError as error:
        damage = error
    if rest:
        yield bytes(rest), consumed
    if damage:
        raise damage


def _expanded(file: CorpusFile) -> Iterator[tuple[bytes, int]]:
    """A gzip or zstd file's members or frames, one after the other."""
    decompressor: Any = None
    consumed = 0
    with file.path.open("rb") as stream:
        while data := stream.read(COMPRESSED_BLOCK_BYTES):
            while data:
                if decompressor is None and consumed and file.compression == "gzip":
                    data = data.lstrip(b"\0")  # padding after a member, which gzip itself passes over
                    if not data:
                        break
                decompressor = decompressor or _decompressor(file.compression)
                try:
                    expanded = decompressor.decompress(data)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise DamagedFileError(
                        f"the {file.compression} data is damaged between byte {consumed} and {stream.tell()} ({error})"
                    ) from error
                data = decompressor.unused_data
                consumed = stream.tell() - len(data)
                if expanded:
                    yield expanded, consumed
                if decompressor.eof:
                    decompressor = None
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


class TextCheck:
    """Learns from the blocks of a text whether it is UTF-8, and whether it is text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tail = b""
        self._characters = self._odd = self._ascii = self._spaces = 0
        self.replaced = 0
        """Bytes that are no UTF-8; final once `finish` was called."""

    def add(self, block: bytes, *, is_last: bool = False) -> None:
        self._odd += len(block) - len(block.translate(None, _CONTROLS))
        self._ascii += len(block.translate(None, _HIGH))
        self._spaces += block.count(b" ") + block.count(b"\n")
        text, spelt_out = self._decoder.decode(block, is_last), self._tail + block
        self._tail = spelt_out[-2:]
        self._characters += len(text)
        self._odd += text.count("\ufffd")
        self.replaced += text.count("\ufffd") - spelt_out.count("\ufffd".encode())

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
        return self._odd * 4 <= self._characters and (not self.replaced or has_spaces)


def text_blocks(file: CorpusFile, check: TextCheck | None = None) -> Iterator[bytes]:
    """The blocks of a text file, which `check` has seen.

    Raises:
        NoTextError: it is no text; after the last block at the latest.
    """
    check = check or TextCheck()
    try:
        for block, _ in file_blocks(file):
            if b"\0" in block:
                raise NoTextError("binary")
            check.add(block)
            yield block
    except UndecodableError as error:
        raise NoTextError("undecodable", str(error)) from error
    if not check.finish():
        raise NoTextError("undecodable")
