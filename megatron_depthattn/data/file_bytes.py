"""The bytes of a corpus file of text or JSON, expanded if it is compressed, in UTF-8."""

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from megatron_depthattn.data.documents import CorpusFile
from megatron_depthattn.data.text_bytes import MARK_BYTES, byte_order_mark, utf8_blocks

BLOCK_BYTES = 1 << 20
# Read at a time from a compressed file. It bounds what is held at once: 512 bytes of zstd can stand for 16 MiB (blocks
# of 4 bytes for 128 KiB), of gzip for 0.5 MiB. What it held before damage in it is lost.
COMPRESSED_BLOCK_BYTES = 512


class DamagedFileError(Exception):
    """The rest of a file cannot be read; says why, without the file's name."""


class UndecodableError(DamagedFileError):
    """The file is not in the encoding that its byte-order mark names."""


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
    rest, size, consumed = [], 0, 0
    damage: DamagedFileError | None = None
    while True:
        try:
            block, consumed = next(blocks, (b"", consumed))
        except DamagedFileError as error:
            block, damage = b"", error
        rest.append(block)
        size += len(block)
        if block and size < BLOCK_BYTES:
            continue
        data = b"".join(rest)
        yield from ((data[i : i + BLOCK_BYTES], consumed) for i in range(0, size, BLOCK_BYTES))
        if damage is not None:
            raise damage
        if not block:
            return
        rest, size = [], 0


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
