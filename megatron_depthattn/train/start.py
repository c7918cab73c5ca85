"""Where a run starts: which checkpoint, checked byte by byte, and whether starting again makes sense at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_depthattn.config import RunConfig
from megatron_depthattn.train.manifest import find_damage
from megatron_depthattn.train.step_folders import LATEST, complete_folders, resolve_checkpoint, set_aside, tidy

T = TypeVar("T")


@dataclass
class Start:
    """The same on all ranks."""

    folder: Path | None = None
    """The checkpoint to load; None: initial weights."""
    warnings: list[str] = field(default_factory=list)
    """Damaged checkpoints that were passed over."""


def find_start(config: RunConfig) -> Start:
    """The checkpoint that ``checkpoint.load`` means, every file of it read and compared with its manifest.

    With ``latest`` a damaged checkpoint is set aside (renamed, not removed) and the one before it is taken. Call on all
    ranks: they share the reading, and all of them start from what rank 0 sees in the folder.

    Raises:
        ValueError: on all ranks, if there is no such checkpoint, if a named one or all of them are damaged, or if the
            run would overwrite the checkpoints of another.
    """
    checkpoints = Path(config.checkpoint_dir)
    start = Start()
    first = ""
    candidates = from_rank_0(lambda: _candidates(config.checkpoint.load, checkpoints))
    for folder in candidates:
        damage = _damage(folder)
        if not damage:
            start.folder = folder
            return start
        told = f"{damage[0]}{f' (and {len(damage) - 1} more)' if len(damage) > 1 else ''}"
        first = first or told
        if config.checkpoint.load != LATEST:
            raise ValueError(f"checkpoint.load={config.checkpoint.load} is damaged: {told}. Name another one.")
        aside = from_rank_0(lambda folder=folder: set_aside(folder, "damaged"))  # type: ignore[misc]
        start.warnings.append(f"DAMAGED CHECKPOINT: {told}. It is now {aside.name}; falling back to the one before.")
    if candidates:
        raise ValueError(
            f"all {len(candidates)} checkpoints in {checkpoints} are damaged and were renamed to .damaged; the newest: "
            f"{first}. To train from initial weights set another run.dir."
        )
    return start


def from_rank_0(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, on every rank; its ValueError or OSError is raised on every rank as well."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (ValueError, OSError) as error:
            box[0] = error
    dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError | OSError):
        raise box[0]
    return box[0]


def _candidates(load: str | None, checkpoints: Path) -> list[Path]:
    if checkpoints.is_dir():
        tidy(checkpoints)
    folders = resolve_checkpoint(load, checkpoints)
    continues = bool(folders) and folders[0].resolve().parent == checkpoints.resolve()
    if complete_folders(checkpoints) and not continues:
        raise ValueError(
            f"{checkpoints} holds the checkpoints of a run that would be overwritten: set checkpoint.load=latest to "
            "continue it, or another run.dir."
        )
    return folders


def _damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files; the ranks share the reading and agree."""
    found: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(folder, part=dist.get_rank(), parts=dist.get_world_size()))
    return list(dict.fromkeys(problem for of_rank in found for problem in of_rank))
