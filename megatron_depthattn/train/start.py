"""Where a run starts: which checkpoint, checked byte by byte, and whether starting again makes sense at all."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_depthattn.parallel.patience import announced
from megatron_depthattn.train.history import RunHistory
from megatron_depthattn.train.manifest import find_damage
from megatron_depthattn.train.step_folders import LATEST, clean_up, complete_folders, quarantine, resolve_checkpoint

T = TypeVar("T")


@dataclass
class Start:
    """The same on all ranks."""

    folder: Path | None = None
    """The checkpoint to load; None: initial weights."""
    warnings: list[str] = field(default_factory=list)
    """Damaged checkpoints that were passed over."""


def find_start(load: str | None, run_dir: Path, checkpoints: Path) -> Start:
    """The checkpoint that ``checkpoint.load`` means, every file of it read and compared with its manifest.

    With ``latest`` a damaged checkpoint is quarantined (renamed, not removed) and the one before it is taken. Call on
    all ranks: they share the reading, and all of them start from what rank 0 sees in the folder.

    Raises:
        ValueError: on all ranks, if there is no such checkpoint, if a named one or all of them are damaged, or if the
            run would overwrite the checkpoints of another.
    """
    start = Start()
    first = ""
    candidates, note = broadcast_from_rank0(lambda: _candidates(load, run_dir, checkpoints))
    start.warnings += note
    for folder in candidates:
        damage = _damage(folder)
        if not damage:
            start.folder = folder
            return start
        reason = f"{damage[0]}{f' (and {len(damage) - 1} more)' if len(damage) > 1 else ''}"
        first = first or reason
        if load != LATEST and not note:
            raise ValueError(f"checkpoint.load={load} is damaged: {reason}. Name another one.")
        quarantined = broadcast_from_rank0(lambda folder=folder: quarantine(folder, "damaged"))  # type: ignore[misc]
        start.warnings.append(
            f"DAMAGED CHECKPOINT: {reason}. It is now {quarantined.name}; falling back to the one before."
        )
    if candidates:
        raise ValueError(
            f"all {len(candidates)} checkpoints in {checkpoints} are damaged and were renamed to .damaged; the newest: "
            f"{first}. To train from initial weights set another run.dir."
        )
    return start


def is_own_checkpoint(folder: Path | None, checkpoints: Path) -> bool:
    """Whether a run that starts from ``folder`` resumes, rather than begins with the weights or state of another."""
    return folder is not None and folder.resolve().parent == checkpoints.resolve()


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, on every rank; its ValueError or OSError is raised on every rank as well."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (ValueError, OSError) as error:
            box[0] = error
    with announced(f"rank {dist.get_rank()}", lambda: "rank 0, which reads the run's folders"):
        dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError | OSError):
        raise box[0]
    return box[0]


def _candidates(load: str | None, run_dir: Path, checkpoints: Path) -> tuple[list[Path], list[str]]:
    """The folders to try, the first one first, and what to say about them."""
    if checkpoints.is_dir():
        clean_up(checkpoints)
    own = complete_folders(checkpoints)
    if load != LATEST and own and RunHistory(run_dir).has_started_from(load):
        return own[::-1], [f"this run began with checkpoint.load={load} and was interrupted: it resumes from {own[-1]}"]
    folders = resolve_checkpoint(load, checkpoints)
    if own and not is_own_checkpoint(folders[0] if folders else None, checkpoints):
        raise ValueError(
            f"{checkpoints} holds the checkpoints of a run that would be overwritten: set checkpoint.load=latest to "
            "continue it, or another run.dir."
        )
    return folders, []


def _damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files; the ranks share the reading and agree.

    Raises:
        ValueError: on all ranks, if one of them cannot read a file: that is the file system's fault or a node's, and
            says nothing about the checkpoint. A file that rank 0 misses as well is damage.
    """
    damage: list[str] = []
    unreadable = None
    try:
        damage = find_damage(folder, part=dist.get_rank(), parts=dist.get_world_size())
    except OSError as error:
        unreadable = (error.filename, f"rank {dist.get_rank()} on {platform.node()}: {error}")
    found: list[tuple[list[str], tuple[str, str] | None]] = [([], None)] * dist.get_world_size()
    with announced(f"rank {dist.get_rank()}", lambda: f"the other ranks, which read {folder}"):
        dist.all_gather_object(found, (damage, unreadable))
    names = [problem[0] for _, problem in found if problem]
    gone = broadcast_from_rank0(lambda: {name for name in names if not os.path.exists(name)})
    for _, problem in found:
        if problem and problem[0] not in gone:
            raise ValueError(f"{folder} cannot be read by {problem[1]}. Fix that and start again; nothing was renamed.")
    damage = [f"{name} is missing" for name in names] + [text for texts, _ in found for text in texts]
    return list(dict.fromkeys(damage))  # a damaged manifest is found by every rank
