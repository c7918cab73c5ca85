"""The MDS shards of one split: found, fetched, expanded, checked, and read by sample number.

mosaicml-streaming gives the format and the downloads from object stores. Its StreamingDataset
is not used. It deals samples out by torchrun rank, while a replica's tensor, pipeline and context ranks must read the
same rows; and it coordinates processes through named shared memory, which a killed run leaves behind, where it blocks
the next run or must be removed at the risk of a live one. Here files are all that processes share:

- A shard appears under its name by a rename, complete, so a reader never sees a part of one.
- One process at a time makes a shard, under a file lock. The kernel drops the lock of a process that dies.
- A process hashes a shard when it first reads it. What is damaged is made again where there is an intact source,
  and is an error that names the file where there is none. What is in the corpus itself is never removed.

A corpus can come from anyone, and others can write to a shared cache. So names and sizes are those that `shard_index`
let through, no more is read, expanded or kept in memory than they say, and no file is read or written through a link.
"""

import bz2
import contextlib
import errno
import gzip
import logging
import os
import stat
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import zstandard
from filelock import FileLock, Timeout

from megatron_depthattn.data.shard_index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    ShardEntry,
    StoredFile,
    new_hash,
    parse_index,
)
from megatron_depthattn.durable import remove
from megatron_depthattn.parallel.patience import announced

DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_SECONDS = 120.0
LOCK_TIMEOUT_SECONDS = 900.0
NUM_LOCKS = 16
"""Shards of a folder that processes can make at the same time."""
ATTEMPTS_TO_READ = 3
BLOCK_BYTES = 1 << 20
MISSING = "is missing"

logger = logging.getLogger(__name__)
_Source = IO[bytes] | gzip.GzipFile


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

    def attempt() -> None:
        file.unlink(missing_ok=True)
        CloudDownloader.direct_download(url, str(file), DOWNLOAD_TIMEOUT_SECONDS)

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
        with _open_plain(file, place) as stream:
            if os.fstat(stream.fileno()).st_size > MAX_INDEX_BYTES:
                raise ValueError(
                    f"{place} has more than {MAX_INDEX_BYTES:,} bytes: prepare the corpus with larger shards"
                )
            return stream.read()


def _open_plain(file: Path, name: object = None) -> IO[bytes]:
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


def _copy(source: _Source, expected: StoredFile, target: IO[bytes] | None = None) -> str | None:
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


def _damage(file: Path, expected: StoredFile) -> str | None:
    """What is wrong with a file, or None."""
    try:
        with _open_plain(file) as stream:
            return _copy(stream, expected)
    except FileNotFoundError:
        return MISSING


def _expanded(stream: IO[bytes], compression: str | None) -> _Source:
    if compression == "gz":
        return gzip.GzipFile(fileobj=stream)
    if compression == "bz2":
        return bz2.BZ2File(stream)
    return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)


class Shards:
    """One split's samples by number. Opening reads the index; a shard is fetched and checked on first use.

    Every process may open it on its own, at any time. It can be handed to forked processes.

    Args:
        path: the corpus: a local folder, or a remote URL.
        split: the folder below it that holds the index.
        cache: folder for fetched and expanded shards; None: a local corpus itself. Each corpus has a folder of its
            own in it, named by its content, so that runs on different corpora can share a cache.

    Raises:
        ValueError: there is no such split, its index does not hold what it must, or a shard of a local one is missing.
    """

    def __init__(self, path: str, split: str, cache: Path | None) -> None:
        self.origin = f"{path.rstrip('/')}/{split}"
        try:
            content = read_small_file(f"{self.origin}/{INDEX_NAME}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f"{self.origin} has no {INDEX_NAME}: give a folder written by tools/prepare_data.py"
            ) from error
        self.index = parse_index(content, f"{self.origin}/{INDEX_NAME}")
        self._is_in_place = cache is None
        self._folder = cache / f"{Path(path).name}-{split}-{self.index.digest[:12]}" if cache else Path(self.origin)
        if not is_remote(path):
            self._check_presence()
        self.samples_per_shard: npt.NDArray[np.int64] = np.array([s.samples for s in self.index.shards], np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self._checked: set[int] = set()

    @property
    def has_hashes(self) -> bool:
        """Whether the index says more about a shard than its size."""
        return all(shard.raw.hashes for shard in self.index.shards)

    def __len__(self) -> int:
        return int(self.samples_per_shard.sum())

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """Tokens of one sample, of the stored type.

        Raises:
            ValueError: its shard is damaged or missing; names the file.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.index.shards[number]
        file = self._folder / shard.raw.name
        for _ in range(ATTEMPTS_TO_READ):
            if number not in self._checked:
                self._prepare(number, shard)
                self._checked.add(number)
            try:
                return self._read(file, index - int(self._ends[number]) + shard.samples)
            except FileNotFoundError:  # someone tidied the cache under the run
                self._checked.discard(number)
        raise ValueError(
            f"{file} disappeared {ATTEMPTS_TO_READ} times while it was read: set data.cache to a folder "
            "that nothing else tidies up"
        )

    def _read(self, file: Path, sample: int) -> npt.NDArray[Any]:
        """The `sample`-th sample of a shard: a count, the offsets of all samples and of the end, a header, samples."""
        size = self.index.dtype.itemsize * self.index.tokens_per_sample
        with _open_plain(file) as stream:
            try:
                offsets = os.pread(stream.fileno(), 8, 4 * (1 + sample))
                begin, end = np.frombuffer(offsets, "<u4").tolist() if len(offsets) == 8 else (0, 0)
                data = os.pread(stream.fileno(), size, begin)
            except OSError as error:  # such as a file that a server has replaced
                raise ValueError(f"{file} cannot be read: {error.strerror}") from error
        if end - begin != size or len(data) != size:  # no hash in the index, or it changed since it was checked
            raise ValueError(f"{file} cannot be read: its sample {sample} is not {size} bytes inside the file")
        return np.frombuffer(data, self.index.dtype)

    def _check_presence(self) -> None:
        """Refuse a local split that lacks files now, rather than in the middle of the run."""
        try:
            present = set(os.listdir(self.origin))
        except OSError as error:
            raise ValueError(f"{self.origin} cannot be read: {error.strerror}") from error
        for shard in self.index.shards:
            stored = shard.packed or shard.raw
            if not {stored.name, shard.raw.name} & present:
                raise ValueError(f"{self.origin}/{stored.name} is missing: copy or prepare the corpus again")

    def _prepare(self, number: int, shard: ShardEntry) -> None:
        """See to it that an intact raw file is there."""
        file = self._folder / shard.raw.name
        if not self._is_in_place and self._folder.is_symlink():
            raise ValueError(f"{self._folder} is a link: remove it, or set data.cache to a folder of your own")
        reason = _damage(file, shard.raw)
        if reason is None:
            return
        if shard.packed is None and self._is_in_place:
            raise ValueError(f"{file} {reason}: copy or prepare the corpus again")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / f".lock.{number % NUM_LOCKS}", timeout=LOCK_TIMEOUT_SECONDS)
            with announced(str(file), lambda: f"the process that holds {lock.lock_file}", LOCK_TIMEOUT_SECONDS):
                held = lock.acquire()
            with held:
                reason = _damage(file, shard.raw)
                if reason is not None:  # no other process has made it meanwhile
                    self._make(file, shard, reason)
        except Timeout as error:
            raise ValueError(
                f"{file} could not be made: another process has held the lock {error.lock_file} for "
                f"{LOCK_TIMEOUT_SECONDS:.0f} s; end that process, or set data.cache to another folder"
            ) from error
        except OSError as error:
            raise ValueError(
                f"{file} cannot be written ({error.strerror or error}): set data.cache to a folder that is writable "
                "and has room for the expanded shards"
            ) from error

    def _make(self, file: Path, shard: ShardEntry, reason: str) -> None:
        staging = file.with_name(f".{file.name}.part")
        fetched = file.with_name(f".{file.name}.fetched")
        try:
            for leftover in (staging, fetched):  # of a killed process, or placed there by another user of the cache
                remove(leftover)
            with open(staging, "xb") as target:  # x: a new file, never through a link
                self._write_raw(target, shard, fetched)
            staging.replace(file)
        except ValueError as error:
            raise error if reason == MISSING else ValueError(f"{file} {reason}, and {error}") from error
        finally:
            for leftover in (staging, fetched):
                remove(leftover)
        if reason != MISSING:
            logger.warning("note: %s %s; it was made again from %s", file, reason, self.origin)

    def _write_raw(self, target: IO[bytes], shard: ShardEntry, fetched: Path) -> None:
        """Write the raw file's content, checked, from the corpus."""
        if shard.packed is None or not self._has(shard.packed):
            self._copy_stored(shard.raw, fetched, target)
            return
        packed = self._copy_stored(shard.packed, fetched)
        with _open_plain(packed) as stream:
            wrong = _copy(_expanded(stream, shard.compression), shard.raw, target)
        if wrong:
            place = f"{self.origin}/{shard.packed.name}"
            raise ValueError(f"{place} expands to {shard.raw.name}, which {wrong}: copy or prepare the corpus again")

    def _has(self, stored: StoredFile) -> bool:
        return is_remote(self.origin) or self._is_in_place or Path(self.origin, stored.name).is_file()

    def _copy_stored(self, stored: StoredFile, fetched: Path, target: IO[bytes] | None = None) -> Path:
        """Check a file of the corpus, and write it on; returns where it lies on this machine."""
        place = f"{self.origin}/{stored.name}"
        file = Path(place)
        if is_remote(place):
            fetched.mkdir(mode=0o700)
            file = fetched / stored.name
            download(place, file)
        try:
            with _open_plain(file, place) as stream:
                wrong = _copy(stream, stored, target)
        except FileNotFoundError as error:
            raise ValueError(f"{place} cannot be read: {error.strerror}") from error
        if wrong:
            raise ValueError(f"{place} {wrong}: copy or prepare the corpus again")
        return file
