"""The MDS shards of one split: found, fetched, expanded, checked, and read by sample number.

mosaicml-streaming gives the format: readers, hashes, compression, downloads from object stores. Its StreamingDataset
is not used. It deals samples out by torchrun rank, while a replica's tensor, pipeline and context ranks must read the
same rows; and it coordinates processes through named shared memory, which a killed run leaves behind, where it blocks
the next run or must be removed at the risk of a live one. Here files are all that processes share:

- A shard appears under its name by a rename, complete, so a reader never sees a part of one.
- One process at a time makes a shard, under a file lock. The kernel drops the lock of a process that dies.
- A process hashes a shard when it first reads it. What is damaged is made again where there is an intact source,
  and is an error that names the file where there is none. What is in the corpus itself is never removed.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader, reader_from_json
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry

INDEX_NAME = "index.json"
DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_SECONDS = 120.0
LOCK_TIMEOUT_SECONDS = 900.0
NUM_LOCKS = 16
"""Shards of a folder that processes can make at the same time."""
ATTEMPTS_TO_READ = 3
MISSING = "is missing"

logger = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    return "://" in path


def download(url: str, folder: Path) -> bytes:
    """The content of a remote file; `folder` holds it meanwhile.

    Raises:
        ValueError: it could not be had.
    """

    file = folder / url.rpartition("/")[2]

    def attempt() -> bytes:
        file.unlink(missing_ok=True)
        CloudDownloader.direct_download(url, str(file), DOWNLOAD_TIMEOUT_SECONDS)
        return file.read_bytes()

    try:
        CloudDownloader.get(url)  # a kind of store that there is not is no matter for a second attempt
        content: bytes = retry(num_attempts=DOWNLOAD_ATTEMPTS)(attempt)()
    except Exception as error:  # every store has errors of its own
        raise ValueError(f"{url} could not be downloaded: {' '.join(str(error).split())}") from error
    return content


def damage(content: bytes, info: FileInfo) -> str | None:
    """What is wrong with a file's content, or None."""
    if len(content) != info.bytes:
        return f"has {len(content)} bytes, not the {info.bytes} that {INDEX_NAME} says"
    if info.hashes:
        algorithm = min(info.hashes, key=lambda name: not name.startswith("xx"))  # the others cost ten times as much
        if get_hash(algorithm, content) != info.hashes[algorithm]:
            return f"differs from its {algorithm} hash in {INDEX_NAME}"
    return None


def _file_damage(file: Path, info: FileInfo) -> str | None:
    try:
        return damage(file.read_bytes(), info)
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


class _Shard(NamedTuple):
    reader: Reader
    raw: FileInfo
    packed: FileInfo | None


class Shards:
    """One split's samples by number. Opening reads the index; a shard is fetched and checked on first use.

    Every process may open it on its own, at any time. It can be handed to forked processes.

    Args:
        path: the corpus: a local folder, or a remote URL.
        split: the folder below it that holds the index.
        cache: folder for fetched and expanded shards; None: a local corpus itself. Each corpus has a folder of its
            own in it, named by its content, so that runs on different corpora can share a cache.

    Raises:
        ValueError: there is no such split, or a shard of a local one is missing.
    """

    def __init__(self, path: str, split: str, cache: Path | None) -> None:
        self.origin = f"{path.rstrip('/')}/{split}"
        index = self._read_index()
        self.digest = hashlib.sha256(index).hexdigest()
        if cache is None:
            self._folder = Path(self.origin)
        else:
            self._folder = cache / f"{Path(path).name}-{split}-{self.digest[:12]}"
        self._shards = [self._shard(entry) for entry in json.loads(index)["shards"]]
        if not is_remote(path):
            self._check_presence()
        self.samples_per_shard: npt.NDArray[np.int64] = np.array([s.reader.samples for s in self._shards], np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self._checked: set[int] = set()

    @property
    def has_hashes(self) -> bool:
        """Whether the index says more about a shard than its size."""
        return all(shard.raw.hashes for shard in self._shards)

    @property
    def columns(self) -> dict[str, str]:
        """Name and MDS encoding of every column."""
        first = self._shards[0].reader if self._shards else None
        return dict(zip(first.column_names, first.column_encodings, strict=True)) if first else {}

    def __len__(self) -> int:
        return int(self.samples_per_shard.sum())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, decoded.

        Raises:
            ValueError: its shard is damaged or missing; names the file.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        file = self._folder / shard.raw.basename
        for _ in range(ATTEMPTS_TO_READ):
            if number not in self._checked:
                self._prepare(number, shard)
                self._checked.add(number)
            try:
                sample: dict[str, Any] = shard.reader[index - int(self._ends[number]) + shard.reader.samples]
                return sample
            except FileNotFoundError:  # someone tidied the cache under the run
                self._checked.discard(number)
            except (OSError, ValueError, IndexError) as error:  # it changed since it was checked
                raise ValueError(f"{file} cannot be read: {error}") from error
        raise ValueError(
            f"{file} disappeared {ATTEMPTS_TO_READ} times while it was read: set data.cache to a folder "
            "that nothing else tidies up"
        )

    def _read_index(self) -> bytes:
        if is_remote(self.origin):
            with tempfile.TemporaryDirectory() as folder:
                return download(f"{self.origin}/{INDEX_NAME}", Path(folder))
        file = Path(self.origin, INDEX_NAME)
        if not file.is_file():
            raise ValueError(f"{self.origin} has no {INDEX_NAME}: give a folder written by tools/prepare_data.py")
        return file.read_bytes()

    def _shard(self, entry: dict[str, Any]) -> _Shard:
        reader = reader_from_json(str(self._folder), None, entry)
        reader.validate(allow_unsafe_types=False)
        ((raw, packed),) = reader.file_pairs
        return _Shard(reader, raw, packed)

    def _check_presence(self) -> None:
        """Refuse a local split that lacks files now, rather than in the middle of the run."""
        present = {file.name for file in Path(self.origin).iterdir()}
        for shard in self._shards:
            stored = shard.packed or shard.raw
            if not {stored.basename, shard.raw.basename} & present:
                raise ValueError(f"{self.origin}/{stored.basename} is missing: copy or prepare the corpus again")

    def _prepare(self, number: int, shard: _Shard) -> None:
        """See to it that an intact raw file is there."""
        file = self._folder / shard.raw.basename
        if _file_damage(file, shard.raw) is None:
            return
        if shard.packed is None and self._is_in_place:
            raise ValueError(f"{file} {_file_damage(file, shard.raw)}: copy or prepare the corpus again")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / f".lock.{number % NUM_LOCKS}", timeout=LOCK_TIMEOUT_SECONDS):
                reason = _file_damage(file, shard.raw)
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

    @property
    def _is_in_place(self) -> bool:
        return str(self._folder) == str(Path(self.origin))

    def _make(self, file: Path, shard: _Shard, reason: str) -> None:
        aside = file.with_name(f".{file.name}.part")
        fetched = file.with_name(f".{file.name}.fetched")
        shutil.rmtree(fetched, ignore_errors=True)  # what a killed process left
        try:
            aside.write_bytes(self._raw_content(shard, fetched))
            aside.replace(file)
        except ValueError as error:
            raise error if reason == MISSING else ValueError(f"{file} {reason}, and {error}") from error
        finally:
            aside.unlink(missing_ok=True)
            shutil.rmtree(fetched, ignore_errors=True)
        if reason != MISSING:
            logger.warning("note: %s %s; it was made again from %s", file, reason, self.origin)

    def _raw_content(self, shard: _Shard, fetched: Path) -> bytes:
        """The raw file's content from the corpus, checked."""
        if shard.packed is None or not self._has(shard.packed):
            return self._fetch(shard.raw, fetched)
        packed = self._fetch(shard.packed, fetched)
        try:
            content: bytes = decompress(shard.reader.compression, packed)
        except Exception as error:  # every compression has errors of its own
            raise ValueError(f"{self.origin}/{shard.packed.basename} cannot be expanded: {error}") from error
        wrong = damage(content, shard.raw)
        if wrong:
            raise ValueError(f"{self.origin}/{shard.packed.basename} expands to {shard.raw.basename}, which {wrong}")
        return content

    def _has(self, info: FileInfo) -> bool:
        return is_remote(self.origin) or self._is_in_place or Path(self.origin, info.basename).is_file()

    def _fetch(self, info: FileInfo, fetched: Path) -> bytes:
        """A file of the corpus, checked."""
        place = f"{self.origin}/{info.basename}"
        if is_remote(place):
            fetched.mkdir()
            content = download(place, fetched)
        else:
            try:
                content = Path(place).read_bytes()
            except OSError as error:
                raise ValueError(f"{place} cannot be read: {error.strerror}") from error
        wrong = damage(content, info)
        if wrong:
            raise ValueError(f"{place} {wrong}: copy or prepare the corpus again")
        return content
