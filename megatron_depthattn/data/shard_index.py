"""What a split's index says, checked before any of it becomes a path or a size: corpora are downloaded from anyone.

An index decides which files are read and written, and how much is expanded. So a shard's name is a plain file name in
the folder of its index, and its sizes are those that its samples need: the format is 32-bit offsets, a header, and
samples of a fixed length.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

INDEX_NAME = "index.json"
TOKEN_COLUMN = "tokens"
MAX_INDEX_BYTES = 64 << 20
"""About 150,000 shards."""
MAX_HEADER_BYTES = 1 << 16
"""Of a shard: its columns and settings as JSON."""
MAX_SHARD_BYTES = (1 << 32) - 1
"""Offsets in a shard have 32 bits."""
EXPANDABLE = ("zstd", "gz", "bz2")
HASHES = {*xxhash.algorithms_available, *hashlib.algorithms_guaranteed} - {"shake_128", "shake_256"}
"""Those of a fixed length."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}\.mds")
_TOKENS = re.compile(r"ndarray:(u?int(?:8|16|32|64)):([1-9][0-9]{0,8})")


@dataclass(kw_only=True, frozen=True)
class StoredFile:
    """A shard's file, raw or compressed."""

    name: str
    bytes: int
    hashes: Mapping[str, str]
    """Hex digest by algorithm; only algorithms that this machine has."""


@dataclass(kw_only=True, frozen=True)
class ShardEntry:
    """One shard of an index."""

    samples: int
    raw: StoredFile
    packed: StoredFile | None
    compression: str | None
    """One of `EXPANDABLE`; None where there is no compressed form."""


@dataclass(kw_only=True, frozen=True)
class SplitIndex:
    """A split's index."""

    digest: str
    """SHA-256 of the file."""
    dtype: np.dtype[Any]
    tokens_per_sample: int
    shards: tuple[ShardEntry, ...]


def parse_index(content: bytes, source: str) -> SplitIndex:
    """The index in a file's content.

    Raises:
        ValueError: it is no index of token shards, or names or sizes in it are not what they must be; names `source`.
    """
    try:
        entries = json.loads(content)["shards"]
        columns = [_columns(entry) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source} is no index of MDS shards: copy or prepare the corpus again") from error
    if not entries:
        raise ValueError(f"{source} lists no shards: prepare more data")
    tokens = _TOKENS.fullmatch(columns[0].get(TOKEN_COLUMN, "")) if len(columns[0]) == 1 else None
    if tokens is None:
        raise ValueError(
            f"{source} has the columns {reprlib.repr(columns[0])}, not '{TOKEN_COLUMN}' of a fixed length: prepare the "
            "corpus with depthattn prepare"
        )
    dtype, tokens_per_sample = np.dtype(tokens[1]), int(tokens[2])
    shards, names = [], set()
    for number, entry in enumerate(entries):
        try:
            if columns[number] != columns[0]:
                raise ValueError(f"its columns are {reprlib.repr(columns[number])}, not those of shard 0")
            shard = _shard(entry, sample_bytes=dtype.itemsize * tokens_per_sample)
            if shard.raw.name.lower() in names:  # file systems can ignore case
                raise ValueError(f"it has the name of an earlier shard, {shard.raw.name}")
        except ValueError as error:
            raise ValueError(f"{source}, shard {number}: {error}; copy or prepare the corpus again") from error
        names.add(shard.raw.name.lower())
        shards.append(shard)
    digest = hashlib.sha256(content).hexdigest()
    return SplitIndex(digest=digest, dtype=dtype, tokens_per_sample=tokens_per_sample, shards=tuple(shards))


def new_hash(algorithm: str) -> Any:
    """A hash object."""
    return getattr(xxhash, algorithm)() if algorithm in xxhash.algorithms_available else hashlib.new(algorithm)


def count(entry: Mapping[str, Any], key: str) -> int:
    """The value of a key, a whole number from 0 on that fits 63 bits.

    Raises:
        ValueError: it is something else.
    """
    value = entry.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:  # a bool is an int as well
        raise ValueError(f"{key} is {reprlib.repr(value)}, not a count")
    return value


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    pairs = zip(entry["column_names"], entry["column_encodings"], strict=True)
    return {str(name): str(encoding) for name, encoding in pairs}


def _shard(entry: Mapping[str, Any], sample_bytes: int) -> ShardEntry:
    kind = entry.get("format"), entry.get("version")
    if kind != ("mds", 2):
        raise ValueError(f"its format is {reprlib.repr(kind)}, not MDS version 2")
    samples = count(entry, "samples")
    if samples < 1:
        raise ValueError("it holds no samples")
    raw = _file(entry.get("raw_data"), "raw_data")
    if not _NAME.fullmatch(raw.name):
        raise ValueError(f"its file is named {reprlib.repr(raw.name)}, which is no plain name such as shard.00000.mds")
    least = 4 * (samples + 2) + samples * sample_bytes  # count, offsets, samples
    if not least <= raw.bytes <= min(least + MAX_HEADER_BYTES, MAX_SHARD_BYTES):
        raise ValueError(
            f"{raw.name} has {raw.bytes} bytes, and {samples} samples of {sample_bytes} bytes with their header have "
            f"{least} to {min(least + MAX_HEADER_BYTES, MAX_SHARD_BYTES)}"
        )
    if entry.get("zip_data") is None:
        return ShardEntry(samples=samples, raw=raw, packed=None, compression=None)
    packed = _file(entry["zip_data"], "zip_data")
    compression = str(entry.get("compression")).partition(":")[0]
    if compression not in EXPANDABLE:
        given = reprlib.repr(entry.get("compression"))
        raise ValueError(f"{raw.name} is compressed with {given}: only {', '.join(EXPANDABLE)} can be read")
    if packed.name != f"{raw.name}.{compression}":
        raise ValueError(
            f"the compressed {raw.name} is named {reprlib.repr(packed.name)}, not {raw.name}.{compression}"
        )
    if packed.bytes > MAX_SHARD_BYTES:
        raise ValueError(f"{packed.name} has {packed.bytes} bytes, more than {MAX_SHARD_BYTES}")
    return ShardEntry(samples=samples, raw=raw, packed=packed, compression=compression)


def _file(entry: Any, key: str) -> StoredFile:
    hashes = entry.get("hashes") or {} if isinstance(entry, dict) else None
    if not isinstance(hashes, dict) or not isinstance(entry.get("basename"), str):
        raise ValueError(f"{key} is {reprlib.repr(entry)}, not name, size and hashes of a file")
    known = hashes.keys() & HASHES
    if hashes and not known:
        raise ValueError(f"its hashes are {reprlib.repr(list(hashes))}, none of which this machine can compute")
    return StoredFile(
        name=entry["basename"], bytes=count(entry, "bytes"), hashes={name: str(hashes[name]) for name in known}
    )
