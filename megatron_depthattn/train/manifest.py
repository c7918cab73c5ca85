"""A checkpoint's manifest: the size and hash of every file, so that damage is found before a run resumes from it.

XXH3-128 finds bytes that changed by accident, which is what happens to files; at several GB/s it is faster than any
disk. It is no defence against someone who changes a checkpoint on purpose.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_depthattn.durable import fsync_path, naming, write_durably

MANIFEST = "manifest.json"
HASH = "xxh3_128"
FORMAT_VERSION = 1
HASH_PART = 1 << 24
"""Bytes of a file that are read at once."""

Digests = dict[str, dict[str, Any]]
"""File name to ``bytes`` and ``xxh3_128``."""


def digest_files(folder: Path, names: Iterable[str], on_part: Callable[[], None] = lambda: None) -> Digests:
    """Sizes and hashes of some files of a folder, all on disk when this returns; ``on_part``: see `file_hash`."""
    result: Digests = {}
    for name in names:
        path = folder / name
        fsync_path(path)
        result[name] = {"bytes": path.stat().st_size, HASH: file_hash(path, on_part)}
    return result


def file_hash(path: Path, on_part: Callable[[], None] = lambda: None) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal; ``on_part`` is called as reading proceeds."""
    digest = xxhash.xxh3_128()
    with naming(path), path.open("rb") as file:
        while part := file.read(HASH_PART):
            on_part()
            digest.update(part)
    return digest.hexdigest()


def write_manifest(folder: Path, files: Digests) -> None:
    """Write the manifest of a folder: its last file, by which it is complete."""
    content = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    write_durably(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def find_damage(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a folder's files, a line each; empty: every byte is as it was written.

    Args:
        folder: a folder with a manifest.
        part: which share of the files to read, when ``parts`` processes share the work.

    Raises:
        OSError: a file is missing or cannot be read here; which need not mean that it is damaged.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
        files = sorted((name, int(known["bytes"]), known[HASH]) for name, known in manifest["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return [f"{folder / MANIFEST} is no manifest: {error}"]
    if outside := [name for name, *_ in files if not _is_inside(name)]:
        return [f"{folder / MANIFEST} is no manifest: {outside[0]!r} is no file of this folder"]
    return [problem for name, *known in files[part::parts] if (problem := _problem(folder / name, *known))]


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _problem(path: Path, num_bytes: int, digest: str) -> str | None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device would be read for ever
        return f"{path} is no plain file"
    size = status.st_size
    if size != num_bytes:
        return f"{path} has {size} bytes, not {num_bytes}"
    if file_hash(path) != digest:
        return f"{path} holds other bytes than were written ({HASH} differs)"
    return None
