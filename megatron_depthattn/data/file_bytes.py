"""The bytes of a corpus file, expanded if it is compressed."""

import zlib
from collections.abc import Iterator
from typing import Any

import zstandard

from megatron_depthattn.data.documents import CorpusFile

BLOCK_BYTES = 1 << 20
# Read at a time from a compressed file; what a damaged block held before the damage is lost.
COMPRESSED_BLOCK_BYTES = 1 << 16


class DamagedFileError(Exception):
    """The rest of a file cannot be read; says why, without the file's name."""


def file_blocks(file: CorpusFile, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """(bytes of the expanded file from `start` on, bytes on disk so far)"""
    if file.compression:
        skip = start
        for data, consumed in _expanded(file):
            if skip < len(data):
                yield data[skip:], consumed
            skip = max(skip - len(data), 0)
        return
    with file.path.open("rb") as stream:
        stream.seek(start)
        while data := stream.read(BLOCK_BYTES):
            yield data, stream.tell()


def _expanded(file: CorpusFile) -> Iterator[tuple[bytes, int]]:
    """A gzip or zstd file's members or frames, one after the other."""
    decompressor: Any = None
    consumed = 0
    with file.path.open("rb") as stream:
        while data := stream.read(COMPRESSED_BLOCK_BYTES):
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
                    if not data.strip(b"\0"):  # padding, which gzip itself passes over
                        data = b""
    if decompressor is not None or consumed == 0:
        raise DamagedFileError(f"the {file.compression} data is truncated: it ends at byte {consumed}, too early")


def _decompressor(compression: str) -> Any:
    if compression == "gzip":
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # whatever --long made it
