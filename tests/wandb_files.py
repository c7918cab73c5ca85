"""What a `.wandb` file of the client holds: its log of records, read without the client's own code."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7
"""Bytes of the file's header, and of that before every part of a record: CRC-32, length, whole/first/middle/last."""


def records(path: Path) -> list[Any]:
    """The `Record` messages, in order; what is cut off at the end is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = path.read_bytes(), HEADER, b"", []
    assert content[:4] == b":W&B"
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # padding
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        data = content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind == 0:
            break
        assert len(data) == length and zlib.crc32(bytes([kind]) + data) == checksum, f"damage before byte {at}"
        parts = parts + data if kind in (3, 4) else data
        if kind in (1, 4):
            found.append(Record.FromString(parts))
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """The rows, by the names of their curves."""
    rows = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def run_record(path: Path) -> Any:
    """The message that says which run it is."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")
