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
from typing import Any, NamedTuple

import numpy as np
import xxhash

INDEX_NAME = "index.json"
TOKEN_COLUMN, STARTS_COLUMN, PADDING_COLUMN = "tokens", "starts", "padding"
MAX_INDEX_BYTES = 64 << 20
"""About 150,000 shards."""
MAX_HEADER_BYTES = 1 << 16
"""Of a shard: its columns and settings as JSON."""
MAX_SHARD_BYTES = (1 << 32) - 1
"""Offsets in a shard have 32 bits."""
EXPANDABLE = (".mds.zstd", ".mds.gz", ".mds.bz2")
HASHES = {*xxhash.algorithms_available, *hashlib.algorithms_guaranteed} - {"shake_128", "shake_256"}
"""Those of a fixed length."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}\.mds")
_TOKENS = re.compile(r"ndarray:(u?int(?:8|16|32|64)):([1-9][0-9]{0,8})")


class StoredFile(NamedTuple):
    """A shard's file, raw or compressed."""

    name: str
    bytes: int
    hashes: Mapping[str, str]
    """Hex digest by algorithm; only algorithms that this machine has."""


class ShardEntry(NamedTuple):
    """One shard of an index."""

    samples: int
    raw: StoredFile
    packed: StoredFile | None
    """The compressed form, one of `EXPANDABLE` by its name."""


class SplitIndex(NamedTuple):
    """A split's index."""

    digest: str
    """SHA-256 of the file."""
    dtype: np.dtype[Any]
    tokens_per_sample: int
    shards: list[ShardEntry]
    stores_documents: bool
    """Whether a sample begins with its padding and the bits that start documents, before its tokens."""


def columns_of(dtype: np.dtype[Any], tokens_per_sample: int) -> dict[str, str]:
    """The columns of a shard, in the order in which a sample holds them, which is that of their names.

    `padding` is the number of tokens at the end of the sample that are padding; `starts` has a bit a token, the highest
    of a byte first: 1 is the first token of a document.
    """
    return {
        PADDING_COLUMN: "uint32",
        STARTS_COLUMN: f"ndarray:uint8:{starts_bytes(tokens_per_sample)}",
        TOKEN_COLUMN: f"ndarray:{dtype}:{tokens_per_sample}",
    }


def starts_bytes(tokens_per_sample: int) -> int:
    return -(-tokens_per_sample // 8)


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
    tokens = _TOKENS.fullmatch(columns[0].get(TOKEN_COLUMN, ""))
    dtype, tokens_per_sample = (np.dtype(tokens[1]), int(tokens[2])) if tokens else (np.dtype("u2"), 1)
    with_documents = columns_of(dtype, tokens_per_sample)
    stores_documents = list(columns[0].items()) == list(with_documents.items())
    if tokens is None or not (stores_documents or len(columns[0]) == 1):
        raise ValueError(
            f"{source} has the columns {reprlib.repr(columns[0])}, not '{TOKEN_COLUMN}' of a fixed length, alone or "
            f"with '{PADDING_COLUMN}' and '{STARTS_COLUMN}': prepare the corpus with depthattn prepare"
        )
    sample_bytes = dtype.itemsize * tokens_per_sample + (4 + starts_bytes(tokens_per_sample)) * stores_documents
    shards, names = [], set()
    for number, entry in enumerate(entries):
        try:
            if list(columns[number].items()) != list(columns[0].items()):
                raise ValueError(f"its columns are {reprlib.repr(columns[number])}, not those of shard 0")
            shard = _shard(entry, sample_bytes)
            if shard.raw.name.lower() in names:  # file systems can ignore case
                raise ValueError(f"it has the name of an earlier shard, {shard.raw.name}")
        except ValueError as error:
            raise ValueError(f"{source}, shard {number}: {error}; copy or prepare the corpus again") from error
        names.add(shard.raw.name.lower())
        shards.append(shard)
    return SplitIndex(hashlib.sha256(content).hexdigest(), dtype, tokens_per_sample, shards, stores_documents)


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
    kind, samples = (entry.get("format"), entry.get("version")), count(entry, "samples")
    raw = _file(entry.get("raw_data"), "raw_data")
    least = 4 * (samples + 2) + samples * sample_bytes  # count, offsets, samples
    most = min(least + MAX_HEADER_BYTES, MAX_SHARD_BYTES)
    checks = [
        (kind == ("mds", 2), f"its format is {reprlib.repr(kind)}, not MDS version 2"),
        (samples >= 1, "it holds no samples"),
        (
            bool(_NAME.fullmatch(raw.name)),
            f"its file is named {reprlib.repr(raw.name)}, which is no plain name such as shard.00000.mds",
        ),
        (
            least <= raw.bytes <= most,
            f"{raw.name} has {raw.bytes} bytes, and {samples} samples of {sample_bytes} bytes with their header have "
            f"{least} to {most}",
        ),
    ]
    packed = None
    if entry.get("zip_data") is not None:
        packed, given = _file(entry["zip_data"], "zip_data"), entry.get("compression")
        name = f"{raw.name}.{str(given).partition(':')[0]}"
        checks += [
            (
                packed.name == name and name.endswith(EXPANDABLE),
                f"{raw.name} is compressed with {reprlib.repr(given)} and named {reprlib.repr(packed.name)}, not "
                f"{raw.name} with the ending of its compression, {', '.join(EXPANDABLE)}",
            ),
            (packed.bytes <= MAX_SHARD_BYTES, f"{packed.name} has {packed.bytes} bytes, more than {MAX_SHARD_BYTES}"),
        ]
    for is_right, fault in checks:
        if not is_right:
            raise ValueError(fault)
    return ShardEntry(samples, raw, packed)


def _file(entry: Any, key: str) -> StoredFile:
    hashes = entry.get("hashes") or {} if isinstance(entry, dict) else None
    if not isinstance(hashes, dict) or not isinstance(entry.get("basename"), str):
        raise ValueError(f"{key} is {reprlib.repr(entry)}, not name, size and hashes of a file")
    known = hashes.keys() & HASHES
    if hashes and not known:
        raise ValueError(f"its hashes are {reprlib.repr(list(hashes))}, none of which this machine can compute")
    return StoredFile(entry["basename"], count(entry, "bytes"), {name: str(hashes[name]) for name in known})
