"""One split of a prepared corpus as a data set of token sequences, read by sample number.

mosaicml-streaming gives the format and the downloads from object stores. Its StreamingDataset
is not used. It deals samples out by torchrun rank, while a replica's tensor, pipeline and context ranks must read the
same rows; and it coordinates processes through named shared memory, which a killed run leaves behind, where it blocks
the next run or must be removed at the risk of a live one. Here files are all that processes share:

- A shard appears under its name by a rename, complete, so a reader never sees a part of one.
- One process at a time makes a shard, under a file lock. The kernel drops the lock of a process that dies.
- A shard in a cache can leave it when no process reads it (`cache`); a reader that misses one makes it again.
- A process hashes a shard when it first reads it. What is damaged is made again where there is an intact source,
  and is an error that names the file where there is none. What is in the corpus itself is never removed.

A corpus can come from anyone, and others can write to a shared cache. So names and sizes are those that `shard_index`
let through, no more is read, expanded or kept in memory than they say, and no file is read or written through a link.
"""

import json
import logging
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset

from megatron_depthattn.data.cache import ShardCache
from megatron_depthattn.data.shard_files import (
    MISSING,
    copy,
    damage,
    download,
    expanded,
    is_remote,
    open_plain,
    read_small_file,
)
from megatron_depthattn.data.shard_index import (
    INDEX_NAME,
    ShardEntry,
    StoredFile,
    count,
    parse_index,
    starts_bytes,
)
from megatron_depthattn.durable import naming, remove
from megatron_depthattn.parallel.patience import announced

MANIFEST_NAME = "manifest.json"
PACKS = ("concat", "best-fit")
COUNTED = {"vocab_size", "eos_token_id", "bytes", "tokens", "samples", "documents", "padding_tokens"} | {
    "dropped_tail_tokens"
}
"""Of a manifest, what must be a count where it is there."""
LOCK_TIMEOUT_SECONDS = 900.0
NUM_LOCKS = 16
"""Shards of a folder that processes can make at the same time."""
ATTEMPTS_TO_READ = 3
AGAIN = "copy or prepare the corpus again"

logger = logging.getLogger(__name__)


def pack_of(manifest: Mapping[str, Any]) -> str:
    """How samples were made of documents: concat or best-fit."""
    return str(manifest.get("settings", {}).get("pack", "concat"))


def read_manifest(path: str) -> dict[str, Any] | None:
    """The corpus's manifest, or None where there is none (MDS shards from elsewhere)."""
    file = f"{path.rstrip('/')}/{MANIFEST_NAME}"
    try:
        content = read_small_file(file)
    except FileNotFoundError:
        return None
    except ValueError as error:  # stores do not agree on how they say that there is none
        if not is_remote(path):
            raise
        logger.warning("note: vocabulary and tokenizer of %s are not checked: %s", path, error)
        return None
    try:
        manifest = json.loads(content)
        _check_manifest(manifest)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no manifest of a corpus: {error}; {AGAIN}") from error
    return cast(dict[str, Any], manifest)


def _check_manifest(manifest: Any) -> None:
    """Check the type of whatever is used of a manifest; all of it may be absent."""
    for part in (manifest, manifest.get("sources", {}), *manifest.get("splits", {}).values()):
        for key in part.keys() & COUNTED:
            count(part, key)
        if any(type(sample) is not int for sample in part.get("breaks", [])):
            raise ValueError(f"its breaks are {reprlib.repr(part['breaks'])}, not numbers of samples")
    if manifest.get("eos_token_id", 0) >= manifest.get("vocab_size", math.inf):
        raise ValueError(f"its eos_token_id is {manifest['eos_token_id']}, and its vocab_size {manifest['vocab_size']}")
    if pack_of(manifest) not in PACKS:
        raise ValueError(f"settings.pack is {reprlib.repr(pack_of(manifest))}, not one of {', '.join(PACKS)}")
    digest = manifest.get("tokenizer_sha256", "0")
    if not isinstance(digest, str) or not digest.isalnum():  # it is printed
        raise ValueError(f"tokenizer_sha256 is {reprlib.repr(digest)}, not a hash")


class Sample(NamedTuple):
    """A sample with its documents."""

    tokens: torch.Tensor
    """int64 [sequence_length + 1]"""
    starts: torch.Tensor
    """bool [sequence_length + 1]: the first token of a document, and the first one of the padding."""
    padding: int
    """Tokens at the end that are padding."""


def has_split(path: str, split: str) -> bool:
    """Whether a corpus has a split: by its folder, or by the manifest of a remote one; by default it has."""
    if not is_remote(path):
        return Path(path, split, INDEX_NAME).exists()
    splits = (read_manifest(path) or {}).get("splits", {split: {"samples": 1}})
    return bool(splits.get(split, {}).get("samples"))


class TokenDataset(Dataset[torch.Tensor]):
    """One split of a prepared corpus, read by sample number; a shard is fetched and checked on first use.

    Every process may open it on its own, at any time. It can be handed to forked processes.

    Args:
        path: the folder written by `depthattn prepare`, or a remote URL of its copy.
        split: "train" or "val": the folder below it that holds the index.
        sequence_length: what the model will be trained with; None takes what the corpus has.
        cache: folder for downloaded and expanded shards. Needed for a URL; with a local path it holds the expanded
            shards, for a corpus in a read-only folder. Each corpus has a folder of its own in it, named by its content,
            so that runs on different corpora can share a cache.
        cache_limit: bytes of all shards in the cache, beyond which those leave that are not needed soon; None: none do.

    Raises:
        ValueError: no such split, a damaged index, a shard missing, another sequence length, or a URL without a cache.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        sequence_length: int | None = None,
        cache: str | Path | None = None,
        cache_limit: int | None = None,
    ) -> None:
        self.path = str(path)
        if is_remote(self.path) and cache is None:
            raise ValueError(f"data.path {self.path} is remote and data.cache is not set: set it to a local folder")
        self._origin = f"{self.path.rstrip('/')}/{split}"
        try:
            content = read_small_file(f"{self._origin}/{INDEX_NAME}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{self._origin} has no {INDEX_NAME}: give a folder of depthattn prepare") from error
        self._index = parse_index(content, f"{self._origin}/{INDEX_NAME}")
        self.digest = self._index.digest
        """SHA-256 of the split's index, which holds the hash of every shard."""
        self._tokens_at = 4 + starts_bytes(self._index.tokens_per_sample) if self._index.stores_documents else 0
        """Bytes of a sample before its tokens."""
        self._is_in_place = cache is None
        name = f"{Path(self.path).name}-{split}-{self.digest[:12]}"
        self._folder = Path(cache, name) if cache is not None else Path(self._origin)
        self.cache = ShardCache(self._folder, cache_limit) if cache is not None else None
        # A local split that lacks files is an error now, rather than in the middle of the run.
        try:
            present = None if is_remote(self.path) else set(os.listdir(self._origin))
        except OSError as error:
            raise ValueError(f"{self._origin} cannot be read: {error.strerror}") from error
        for shard in self._index.shards:
            stored = shard.packed or shard.raw
            if present is not None and not {stored.name, shard.raw.name} & present:
                raise ValueError(f"{self._origin}/{stored.name} is missing: {AGAIN}")
        self.samples_per_shard: npt.NDArray[np.int64] = np.array([s.samples for s in self._index.shards], np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self.num_samples = int(self._ends[-1])
        self._checked: set[int] = set()
        self.manifest = read_manifest(self.path)
        self.tokenizer: str | None = (self.manifest or {}).get("tokenizer_sha256")
        """SHA-256 of the tokenizer that made the tokens, where the manifest names it."""
        self.stores_documents = self._index.stores_documents
        """Whether the shards say where documents begin; without that, they begin after EOS."""
        self.pads = self.stores_documents and (not self.manifest or pack_of(self.manifest) == "best-fit")
        """Whether samples can end in padding."""
        self.sequence_length = self._index.tokens_per_sample - 1
        if sequence_length is not None and sequence_length != self.sequence_length:
            raise ValueError(
                f"data.sequence_length is {sequence_length}, but {self.path} was prepared with "
                f"{self.sequence_length}: set data.sequence_length={self.sequence_length}, or prepare again "
                f"with --sequence-length {sequence_length}"
            )
        if not all(shard.raw.hashes for shard in self._index.shards):
            logger.warning("note: %s has no hashes in its index: only the sizes of its shards are checked", self.path)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tokens of one sample: int64 [sequence_length + 1].

        Raises:
            ValueError: its shard is damaged or missing; names the file.
        """
        _, _, data = self._read(index, self._tokens_at)
        return self._tokens(data)

    def sample(self, index: int) -> Sample:
        """One sample with the borders of its documents.

        Raises:
            ValueError: as for `[index]`; or its borders or its padding cannot be; or nothing says where documents end.
        """
        file, number, data = self._read(index)
        tokens = self._tokens(data[self._tokens_at :])
        if not self.stores_documents:
            end = (self.manifest or {}).get("eos_token_id")
            if end is None:
                raise ValueError(
                    f"{self.path} does not say where its documents begin: its shards hold tokens alone, and it has no "
                    f"{MANIFEST_NAME} with eos_token_id; prepare it with depthattn prepare"
                )
            return Sample(tokens, torch.nn.functional.pad(tokens[:-1] == end, (1, 0)), 0)
        padding = int.from_bytes(data[:4], "little")
        bits = np.unpackbits(np.frombuffer(data[4 : self._tokens_at], np.uint8)).astype(bool)
        first = len(tokens) - padding  # of the padding, which is one document
        if not (first > 0 and (padding == 0 or bits[first]) and not bits[first + bool(padding) :].any()):
            raise ValueError(
                f"{file} cannot be read: in its sample {number}, of {len(tokens)} tokens, the padding of {padding} "
                f"and the starts of documents do not fit together: {AGAIN}"
            )
        return Sample(tokens, torch.from_numpy(bits[: len(tokens)]), padding)

    def _tokens(self, data: bytes) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(data, self._index.dtype).astype(np.int64))

    def _read(self, index: int, skip: int = 0) -> tuple[Path, int, bytes]:
        """The shard's file, the sample's number in it, and the sample's bytes but for the first `skip`."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._index.shards[number]
        file = self._folder / shard.raw.name
        for _ in range(ATTEMPTS_TO_READ):
            with self._in_use(shard):
                if number not in self._checked:
                    self._prepare(number, shard)
                    self._checked.add(number)
                try:
                    sample = index - int(self._ends[number]) + shard.samples
                    return file, sample, self._read_from(file, sample, skip)
                except FileNotFoundError:  # it has been evicted, or someone has emptied the cache under the run
                    self._checked.discard(number)
        raise ValueError(f"{file} disappears while it is read: set data.cache to a folder that nothing else empties")

    def shards_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of each sample's shard."""
        return np.searchsorted(self._ends, ids, side="right")

    def place(self, shard: int) -> Path:
        """Where a shard is read from."""
        return self._folder / self._index.shards[shard].raw.name

    def bytes_of(self, shard: int) -> tuple[int, int]:
        """The size of a shard, and what it takes while it is made."""
        entry = self._index.shards[shard]
        fetched = (entry.packed or entry.raw).bytes if is_remote(self._origin) else 0
        return entry.raw.bytes, entry.raw.bytes + fetched

    def fetch(self, shard: int) -> bool:
        """Make a shard that is not needed yet; False: another process makes it, or has this one's turn.

        Raises:
            NoRoomError: it has no room yet.
            ValueError: as when it is read.
        """
        with self.cache.turn() if self.cache else nullcontext(True) as is_free:
            return is_free and self._prepare(shard, self._index.shards[shard], is_ahead=True)

    def _in_use(self, shard: ShardEntry) -> AbstractContextManager[None]:
        return self.cache.in_use(shard.raw.name) if self.cache else nullcontext()

    def _read_from(self, file: Path, sample: int, skip: int) -> bytes:
        """From a shard: a count of samples, the offsets of each and of the end, a header, the samples."""
        size = self._tokens_at + self._index.dtype.itemsize * self._index.tokens_per_sample
        with open_plain(file) as stream, naming(file):
            offsets = os.pread(stream.fileno(), 8, 4 * (1 + sample))
            begin, end = np.frombuffer(offsets, "<u4").tolist() if len(offsets) == 8 else (0, 0)
            data = os.pread(stream.fileno(), size - skip, begin + skip)
        if end - begin != size or len(data) != size - skip:  # no hash in the index, or it changed since it was checked
            raise ValueError(f"{file} cannot be read: its sample {sample} is not {size} bytes inside the file")
        return data

    def _prepare(self, number: int, shard: ShardEntry, *, is_ahead: bool = False) -> bool:
        """See to it that an intact raw file is there; only ahead of need it may not be: another process makes it."""
        file = self._folder / shard.raw.name
        if not self._is_in_place and self._folder.is_symlink():
            raise ValueError(f"{self._folder} is a link: remove it, or set data.cache to a folder of your own")
        reason = damage(file, shard.raw)
        if reason is None:
            return True
        if shard.packed is None and self._is_in_place:
            raise ValueError(f"{file} {reason}: {AGAIN}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(
                self._folder / f".lock.{number % NUM_LOCKS}", timeout=0 if is_ahead else LOCK_TIMEOUT_SECONDS
            )
            with announced(str(file), lambda: f"the process that holds {lock.lock_file}", LOCK_TIMEOUT_SECONDS):
                held = lock.acquire()
            with held:
                reason = damage(file, shard.raw)
                if reason is not None:  # no other process has made it meanwhile
                    self._make(number, file, reason, is_ahead)
        except Timeout as error:
            if is_ahead:
                return False
            raise ValueError(
                f"{file} could not be made: another process has held the lock {error.lock_file} for "
                f"{LOCK_TIMEOUT_SECONDS:.0f} s; end that process, or set data.cache to another folder"
            ) from error
        except OSError as error:
            reason = str(error.strerror or error)
            raise ValueError(
                f"{file} cannot be written ({reason}): set data.cache to a folder that is writable and has room for "
                "the expanded shards"
            ) from error
        return True

    def _make(self, number: int, file: Path, reason: str, is_ahead: bool) -> None:
        shard = self._index.shards[number]
        staging, fetched = (file.with_name(f".{file.name}.{ending}") for ending in ("part", "fetched"))
        try:
            for leftover in (staging, fetched):  # of a killed process, or placed there by another user of the cache
                remove(leftover)
            with self._room(number, is_ahead) as record:
                with open(staging, "xb") as target:  # x: a new file, never through a link
                    self._write_raw(target, shard, fetched)
                record(staging)
                staging.replace(file)
        except ValueError as error:
            raise error if reason == MISSING else ValueError(f"{file} {reason}, and {error}") from error
        finally:
            for leftover in (staging, fetched):
                remove(leftover)
        if reason != MISSING:
            logger.warning("note: %s %s; it was made again from %s", file, reason, self._origin)

    def _room(self, number: int, is_ahead: bool) -> AbstractContextManager[Callable[[Path], None]]:
        if self.cache is None:
            return nullcontext(lambda file: None)
        shard = self._index.shards[number]
        origin, needed = f"{self._origin}/{(shard.packed or shard.raw).name}", self.bytes_of(number)[1]
        return self.cache.making(shard.raw.name, needed, origin, is_ahead=is_ahead)

    def _write_raw(self, target: IO[bytes], shard: ShardEntry, fetched: Path) -> None:
        """Write the raw file's content, checked, from the corpus."""
        packed = shard.packed
        is_local_copy = not is_remote(self._origin) and not self._is_in_place
        if packed is None or (is_local_copy and not Path(self._origin, packed.name).is_file()):
            self._copy_stored(shard.raw, fetched, target)
            return
        with open_plain(self._copy_stored(packed, fetched)) as stream:
            wrong = copy(expanded(stream, packed.name), shard.raw, target)
        if wrong:
            raise ValueError(f"{self._origin}/{packed.name} expands to {shard.raw.name}, which {wrong}: {AGAIN}")

    def _copy_stored(self, stored: StoredFile, fetched: Path, target: IO[bytes] | None = None) -> Path:
        """Check a file of the corpus, and write it on; returns where it lies on this machine."""
        place = f"{self._origin}/{stored.name}"
        file = Path(place)
        if is_remote(place):
            fetched.mkdir(mode=0o700)
            file = fetched / stored.name
            download(place, file)
        if wrong := damage(file, stored, target, place):
            raise ValueError(f"{place} {wrong}: {AGAIN}")
        return file
