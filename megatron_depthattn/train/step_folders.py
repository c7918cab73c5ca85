"""Where checkpoints lie, which of them are complete and intact, and what is in them besides tensors; no Megatron."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_depthattn.durable import fsync_path, naming, recover_folder, remove, write_durably
from megatron_depthattn.train.lease import is_leased

MANIFEST = "manifest.json"
HASH = "xxh3_128"
FORMAT_VERSION = 1
HASH_PART = 1 << 24
"""Bytes of a file that are read at once."""

LATEST = "latest"
"""The file that names the newest complete step folder."""
OWNER = "owner.json"
"""The file that names the run which a folder of checkpoints belongs to, see start.py."""
COMMON = "common.pt"
"""What is no tensor: progress, config, schedule."""
GENERATION = "generation_config"
"""In `COMMON`: the generation config of the imported model that a run started from, handed on for its export."""
SAVED_METADATA: dict[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}
"""How Megatron lays tensors out: per-parameter optimizer state, and layers by their number in the whole model."""
Digests = dict[str, dict[str, Any]]
"""File name to ``bytes`` and ``xxh3_128``."""
_STEP = "step_????????"
_NAME = re.compile(r"step_\d{8}", re.ASCII)


@dataclass(frozen=True)
class Progress:
    """How far a run has come; everything about data order follows from it."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    """Steps whose update was left out because loss or gradient was not finite; they count in ``step``."""

    def after_step(self, samples: int, sequence_length: int, *, skipped: bool) -> Progress:
        """One global batch further."""
        tokens = self.consumed_tokens + samples * sequence_length
        return Progress(self.step + 1, self.consumed_samples + samples, tokens, self.skipped_steps + skipped)


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return directory / f"step_{step:08d}"


def staging_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is written before it is complete."""
    return directory / f".{step_folder(directory, step).name}.part"


def checkpoints_of(place: Path) -> Path:
    """The checkpoints of a run by its folder; any other path is left as it is."""
    return place / "checkpoints" if (place / "checkpoints").is_dir() else place


def complete_folders(directory: Path) -> list[Path]:
    """The complete step folders, oldest first."""
    folders = [folder for folder in _named(directory, _STEP) if _NAME.fullmatch(folder.name)]
    return [folder for folder in folders if (folder / MANIFEST).is_file()]


def _named(directory: Path, pattern: str) -> list[Path]:
    """What is named so in a folder, in order. `Path.glob` finds nothing in a folder that cannot be listed."""
    names = os.listdir(directory) if directory.exists() else []
    return sorted(directory / name for name in fnmatch.filter(names, pattern))


def is_run_checkpoint(folder: Path) -> bool:
    """Whether a run that saves beside this folder would take it for its own, there or not."""
    is_saved_to = any((folder.parent / name).is_file() for name in (OWNER, LATEST))
    return is_saved_to and _NAME.fullmatch(folder.name) is not None


def read_latest(directory: Path) -> str | None:
    """The name of the step folder that ``latest`` holds; None: there is no such file, or something else is in it."""
    try:
        name = (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    return name if _NAME.fullmatch(name) else None


def update_latest_and_rotate(final: Path, keep: int | None, keep_steps: Iterable[int] = ()) -> str | None:
    """Let ``latest`` name a published folder, then drop all but the newest ``keep`` and those of ``keep_steps``.

    A folder on which somebody holds a lease stays until a later call. Returns what went wrong, if so.
    """
    latest = final.with_name(LATEST)
    stay = {step_folder(final.parent, step) for step in keep_steps}
    try:
        write_durably(latest, final.name + "\n")
        now = latest.stat().st_mtime  # by the clock that leases are touched by
        passing = [folder for folder in complete_folders(final.parent) if folder not in stay]
        for folder in passing[: -keep if keep is not None else 0]:
            if is_leased(folder, now):
                continue
            doomed = folder.with_name(f".{folder.name}.removed")  # half removed, it must not look like a checkpoint
            remove(doomed)
            folder.rename(doomed)
            if is_leased(doomed, now):  # since it was looked at
                doomed.rename(folder)
            else:
                remove(doomed)
    except OSError as error:
        return f"{final} is complete, but '{LATEST}' or older checkpoints could not be changed: {error}"
    return None


def clean_up(directory: Path) -> None:
    """Remove what a process that died while saving left behind; bring back what it was about to replace."""
    for folder in _named(directory, f".{_STEP}.old"):
        recover_folder(folder.with_name(folder.name[1 : -len(".old")]))
    for end in ("part", "removed", "old"):
        for folder in _named(directory, f".{_STEP}.{end}"):
            remove(folder)


def quarantine(folder: Path, why: str) -> Path:
    """Rename a step folder to ``<name>.<why>``: no run loads it by itself any more, and nothing is lost."""
    target = folder.with_name(f"{folder.name}.{why}")
    number = 1
    while os.path.lexists(target):
        number += 1
        target = folder.with_name(f"{folder.name}.{why}-{number}")
    return folder.rename(target)


def quarantine_after(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond ``step``, where the run resumes: it will write others in their place."""
    later = [folder for folder in complete_folders(directory) if folder.name > step_folder(directory, step).name]
    return [quarantine(folder, "abandoned") for folder in later]


def newest_checkpoint(place: Path) -> Path:
    """The step folder that a path stands for: itself, or the newest complete one of a run or of its checkpoints.

    Raises:
        ValueError: there is none.
    """
    if (place / MANIFEST).is_file():
        return place
    folders = complete_folders(checkpoints_of(place))
    if not folders:
        raise ValueError(
            f"checkpoint.start_from={place} holds no complete checkpoint (no folder with a {MANIFEST}). Name a step "
            "folder (step_00000100), a run's folder or its checkpoints; or set checkpoint.start_from=null."
        )
    return folders[-1]


def resolve_checkpoint(load: str | None, directory: Path) -> list[Path]:
    """The step folders that ``checkpoint.load`` allows, the one to try first in front; empty: start fresh.

    ``latest`` allows every complete checkpoint of the run, newest first; a named folder is that one and no other.

    Raises:
        ValueError: a folder was named that holds no complete checkpoint, or ``latest`` names one and none is left.
    """
    if load is None:
        return []
    if load != LATEST:
        folder = Path(load) if Path(load).exists() else directory / load
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"checkpoint.load={load}: {folder} holds no complete checkpoint (it has no {MANIFEST}). Name a step "
                "folder (step_00000100), or set checkpoint.load=latest or null."
            )
        return [folder]
    candidates = complete_folders(directory)[::-1]
    pointer = directory / LATEST
    if not candidates and pointer.exists():
        raise ValueError(
            f"checkpoint.load=latest: {pointer} names {read_latest(directory) or 'no step folder'}, but {directory} "
            "holds no complete checkpoint. Bring it back, or start anew with checkpoint.load=null and another run.dir."
        )
    return candidates


# ---- the manifest: the size and hash of every file, so that damage is found before a run resumes from it. XXH3-128
# finds bytes that changed by accident, which is what happens to files; at several GB/s it is faster than any disk.
# It is no defence against someone who changes a checkpoint on purpose.


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
