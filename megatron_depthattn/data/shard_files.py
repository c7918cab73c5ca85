"""Files of MDS shards, here and in object stores: fetched, expanded and checked.

No more is read or expanded than `shard_index` let through, and no file is read through a link.
"""

import bz2
import contextlib
import errno
import gzip
import os
import stat
import tempfile
import threading
import zlib
from pathlib import Path
from typing import IO

import zstandard

from megatron_depthattn.data.shard_index import INDEX_NAME, MAX_INDEX_BYTES, StoredFile, new_hash

DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_SECONDS = 120.0
BLOCK_BYTES = 1 << 20
MISSING = "is missing"
_clients = threading.local()
"""Of stores, by process and kind: to make one can take longer than a download."""
Source = IO[bytes] | gzip.GzipFile


def is_remote(path: str) -> bool:
    return "://" in path


def download(url: str, file: Path) -> None:
    """Put a remote file's content into a local one.

    Raises:
        ValueError: it could not be had.
    """

    # streaming brings transformers, scikit-learn and torchvision: seconds that a local corpus need not cost
    from streaming.base.storage import CloudDownloader
    from streaming.base.util import retry

    clients = _clients.__dict__
    kind = f"{os.getpid()} {url.partition('://')[0]}"

    def attempt() -> None:
        file.unlink(missing_ok=True)
        client = clients.pop(kind, None) or CloudDownloader.get(url)
        client.download(url, str(file), DOWNLOAD_TIMEOUT_SECONDS)
        clients[kind] = client  # one that failed is not used again

    try:
        CloudDownloader.get(url)  # a kind of store that there is not is no matter for a second attempt
        retry(num_attempts=DOWNLOAD_ATTEMPTS)(attempt)()
    except Exception as error:  # every store has errors of its own
        raise ValueError(f"{url} could not be downloaded: {' '.join(str(error).split())}") from error


def read_small_file(place: str) -> bytes:
    """The content of an index or a manifest of a corpus: a path or a URL.

    Raises:
        ValueError: it cannot be read, or is too large to be one.
    """
    with tempfile.TemporaryDirectory() if is_remote(place) else contextlib.nullcontext() as folder:
        file = Path(place)
        if folder is not None:
            file = Path(folder, "content")
            download(place, file)
        with open_plain(file, place) as stream:
            if os.fstat(stream.fileno()).st_size > MAX_INDEX_BYTES:
                raise ValueError(f"{place} has more than {MAX_INDEX_BYTES:,} bytes: prepare it with larger shards")
            return stream.read()


def open_plain(file: Path, name: object = None) -> IO[bytes]:
    """Open a file for reading, unless it is a link, which can lead anywhere, or a device or pipe, which may not end.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be opened; says it of `name`.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ELOOP:
            reason = "it is a link, and files of a corpus must be plain ones: copy it with its links resolved (cp -rL)"
        raise ValueError(f"{name or file} cannot be read: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{name or file} cannot be read: it is no plain file")
    return open(descriptor, "rb")


def copy(source: Source, expected: StoredFile, target: IO[bytes] | None = None) -> str | None:
    """Read a stream that should hold a file's content, and write it on; returns what is wrong with it, or None."""
    # The others cost ten times as much.
    algorithm = min(expected.hashes, key=lambda name: not name.startswith("xx"), default="")
    digest = new_hash(algorithm) if algorithm else None
    size = 0
    while True:
        try:
            block = source.read(min(BLOCK_BYTES, expected.bytes + 1 - size))
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            return f"cannot be read: {error}"
        size += len(block)
        if size > expected.bytes:
            return f"has more than the {expected.bytes} bytes that {INDEX_NAME} says"
        if not block:
            break
        if digest:
            digest.update(block)
        if target:
            target.write(block)
    if size != expected.bytes:
        return f"has {size} bytes, not the {expected.bytes} that {INDEX_NAME} says"
    if digest and digest.hexdigest() != expected.hashes[algorithm]:
        return f"differs from its {algorithm} hash in {INDEX_NAME}"
    return None


def damage(file: Path, expected: StoredFile, target: IO[bytes] | None = None, name: object = None) -> str | None:
    """What is wrong with a file, or None; see `open_plain` and `copy`."""
    try:
        with open_plain(file, name) as stream:
            return copy(stream, expected, target)
    except FileNotFoundError:
        return MISSING


def expanded(stream: IO[bytes], name: str) -> Source:
    """The content of the compressed file of this name."""
    if name.endswith(".zstd"):
        return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
    return gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else bz2.BZ2File(stream)
