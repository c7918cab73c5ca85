"""Where a run starts: whose folder of checkpoints it is, which of them is loaded, and that every byte of it is intact.

`owner.json` in the folder names the run's id and its run.dir; the run's history names the same id. A run whose folder
was moved takes its checkpoints along. The file says who may start, a lock beside it who has: a process that ends, in
whatever way, releases the lock and leaves the file.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout

from megatron_depthattn.durable import create_durably, write_durably
from megatron_depthattn.parallel.patience import announced
from megatron_depthattn.train.history import RunHistory, recorded_run_id
from megatron_depthattn.train.lease import lease
from megatron_depthattn.train.step_folders import (
    LATEST,
    OWNER,
    clean_up,
    complete_folders,
    find_damage,
    newest_checkpoint,
    quarantine,
    resolve_checkpoint,
)
from megatron_depthattn.train.step_reader import read_common

LOCK_SECONDS = 30.0
T = TypeVar("T")


class Start(NamedTuple):
    """The same on all ranks."""

    folder: Path | None
    """The checkpoint to load; None: initial weights."""
    warnings: list[str]
    """Damaged checkpoints that were passed over."""
    is_parent: bool = False
    """Whether a new run begins with it, by ``checkpoint.start_from``."""


def find_start(load: str | None, run_dir: Path, checkpoints: Path, start_from: str | None, held: ExitStack) -> Start:
    """The checkpoint that ``checkpoint.load`` means, every file of it read and compared with its manifest; where there
    is none, the one that ``checkpoint.start_from`` means.

    With ``latest`` a damaged checkpoint is quarantined (renamed, not removed) and the one before it is taken. Another
    run's folder is only read, with a lease that keeps that run from rotating it away until ``held`` is closed. Call on
    all ranks: they share the reading, and all of them start from what rank 0 sees in the folder.

    Raises:
        ValueError: on all ranks, if there is no such checkpoint, if a named one or all of them are damaged, or if the
            run would overwrite the checkpoints of another.
    """
    candidates, warnings = broadcast_from_rank0(lambda: _candidates(load, run_dir, checkpoints, start_from, held))
    is_parent = start_from is not None and bool(candidates) and not is_own_checkpoint(candidates[0], checkpoints)
    for folder in candidates:
        damage = _damage(folder)
        if not damage:
            return Start(folder, warnings, is_parent)
        reason = damage[0] + (f" (and {len(damage) - 1} more)" if len(damage) > 1 else "")
        if is_parent or (load != LATEST and not warnings):
            given = f"checkpoint.start_from={start_from}" if is_parent else f"checkpoint.load={load}"
            raise ValueError(f"{given} is damaged: {reason}. Name another one.")
        quarantined = broadcast_from_rank0(lambda folder=folder: quarantine(folder, "damaged"))  # type: ignore[misc]
        warnings.append(f"DAMAGED CHECKPOINT: {reason}. It is now {quarantined.name}.")
    if candidates:
        raise ValueError(
            f"all {len(candidates)} checkpoints in {checkpoints} are damaged and were renamed to .damaged; the newest: "
            f"{warnings[-len(candidates)]} To train from initial weights set another run.dir."
        )
    return Start(None, warnings)


def is_own_checkpoint(folder: Path | None, checkpoints: Path) -> bool:
    """Whether a run that starts from ``folder`` resumes, rather than begins with the weights or state of another."""
    return folder is not None and folder.resolve().parent == checkpoints.resolve()


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, on every rank; its ValueError or OSError is raised on every rank as well."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [function()]
        except (ValueError, OSError) as error:
            box = [error]
    with announced(f"rank {dist.get_rank()}", lambda: "rank 0, which reads the run's folders"):
        dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError | OSError):
        raise box[0]
    return box[0]


def _candidates(
    load: str | None, run_dir: Path, checkpoints: Path, start_from: str | None, held: ExitStack
) -> tuple[list[Path], list[str]]:
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
    if not folders and start_from:
        return [_leased(lambda: newest_checkpoint(Path(start_from)), held)], []
    if folders and not is_own_checkpoint(folders[0], checkpoints):
        return [_leased(lambda: resolve_checkpoint(load, checkpoints)[0], held)], []
    return folders, []


def _leased(choose: Callable[[], Path], held: ExitStack) -> Path:
    """The folder that ``choose`` finds, which raises ValueError where none is left, with a lease on it."""
    while True:
        folder = choose()
        with suppress(FileNotFoundError):  # rotated away since: there may be a newer one
            held.enter_context(lease(folder))
            return folder


def _damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files; the ranks share the reading and agree.

    Raises:
        ValueError: on all ranks, if one of them cannot read a file: that is the file system's fault or a node's, and
            says nothing about the checkpoint. A file that rank 0 misses as well is damage.
    """
    mine: tuple[list[str], dict[str, str]]
    try:
        mine = find_damage(folder, part=dist.get_rank(), parts=dist.get_world_size()), {}
    except OSError as error:
        mine = [], {error.filename: f"rank {dist.get_rank()} on {platform.node()}: {error}"}
    found = [mine] * dist.get_world_size()
    with announced(f"rank {dist.get_rank()}", lambda: f"the other ranks, which read {folder}"):
        dist.all_gather_object(found, mine)
    unreadable = {name: who for _, problems in found for name, who in problems.items()}
    for name in broadcast_from_rank0(lambda: list(filter(os.path.exists, unreadable))):
        raise ValueError(
            f"{folder} cannot be read by {unreadable[name]}. Fix that and start again; nothing was renamed."
        )
    damage = [f"{name} is missing" for name in unreadable] + [text for texts, _ in found for text in texts]
    return list(dict.fromkeys(damage))  # a damaged manifest is found by every rank


# ---- which run owns the folder, and which process is in it


class Owner(NamedTuple):
    """The run that a folder of checkpoints belongs to."""

    run_id: str
    home: Path
    """The run's folder. In the file it is absolute, or from the folder of checkpoints where that lies in it: they are
    moved and copied together."""


class Claim(NamedTuple):
    """A run's hold on its folder of checkpoints, until the process ends."""

    run_id: str
    lock: FileLock
    notes: list[str]
    """How the folder became this run's, for the log."""


def lock_run(run_dir: Path) -> FileLock:
    """Keep other processes out of a run's folder until this one ends, in whatever way; made if it is not there.

    Raises:
        ValueError: another process has it. One that was just killed may take a moment to release it, so this waits.
    """
    return lock_file(
        run_dir / ".lock",
        f"another process is training in {run_dir}: two would overwrite each other's checkpoints. Wait for it, end it, "
        "or set another run.dir",
    )


def check_owner(directory: Path, run_dir: Path) -> None:
    """Let through a run's own folder of checkpoints and one without an owner; any rank may ask, and nothing is written.

    Raises:
        ValueError: the folder is another run's.
    """
    if read_owner(directory) is not None:
        _require_own(directory, run_dir, recorded_run_id(run_dir))


def claim_checkpoints(directory: Path, run_dir: Path) -> Claim:
    """Make a run the owner of its folder of checkpoints, or find that it is; ``run_dir`` must be locked.

    Raises:
        ValueError: the folder is another run's, or holds checkpoints of which nothing says that they are this run's.
            Nothing was changed in it.
    """
    known = recorded_run_id(run_dir)
    notes: list[str] = []
    directory.mkdir(parents=True, exist_ok=True)
    if read_owner(directory) is None:
        run_id, notes = _id_for_unowned(directory, run_dir, known)
        with suppress(FileExistsError):  # another start was faster: it owns the folder, and is compared with this one
            create_durably(directory / OWNER, _record(run_id, run_dir, directory))
    _require_own(directory, run_dir, known)  # before the wait for its lock
    lock = lock_file(
        directory / ".checkpoints.lock",  # checkpoint.dir may be run.dir
        f"another process saves to checkpoint.dir={directory}, perhaps on another host: two would overwrite each "
        "other's checkpoints. Wait for it, end it, or set another checkpoint.dir",
    )
    owner = _require_own(directory, run_dir, known)
    if not _same(owner.home, run_dir):
        write_durably(directory / OWNER, _record(owner.run_id, run_dir, directory))
        notes.append(f"run {owner.run_id} was moved from {owner.home}; {directory} now belongs to {run_dir}")
    return Claim(owner.run_id, lock, notes)


def read_owner(directory: Path) -> Owner | None:
    """The owner that a folder's file names; None: there is no file.

    Raises:
        ValueError: the file names none.
    """
    path = directory / OWNER
    try:
        content = json.loads(path.read_bytes())
        return Owner(str(content["run_id"]), (directory.resolve() / str(content["run_dir"])).resolve())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not name a run ({type(error).__name__}: {error}). If {directory} is this run's alone, remove "
            "that file and start again."
        ) from error


def _require_own(directory: Path, run_dir: Path, known: str | None) -> Owner:
    """The folder's owner; raises ValueError if it is not the run in ``run_dir``, whose history says ``known``."""
    owner = read_owner(directory)
    if owner is None:
        raise ValueError(f"{directory / OWNER} was removed while a run started: start again.")
    home, is_home = owner.home, _same(owner.home, run_dir)
    is_copy = False
    if known == owner.run_id and not is_home:
        with suppress(PermissionError):  # a folder that this user may not look into is taken for moved away
            is_copy = recorded_run_id(home) == owner.run_id
    if is_copy:
        raise ValueError(
            f"run.dir={run_dir} is a copy of {home}, and checkpoint.dir={directory} belongs to the original (run "
            f"{known}): both would overwrite each other's checkpoints. Continue the original, or start a new run from "
            "its last checkpoint: another run.dir, another checkpoint.dir and checkpoint.load=<step folder>."
        )
    if known not in (None, owner.run_id) or (known is None and not is_home):
        unused = f" It holds no checkpoint: if there is no such run, remove {OWNER}."
        raise ValueError(
            f"checkpoint.dir={directory} belongs to run {owner.run_id} of run.dir={home}: that and this run "
            f"({known or 'a new one'}) would overwrite each other's checkpoints. Set another checkpoint.dir (null: one "
            f"below run.dir); to continue that run set run.dir={home}.{'' if complete_folders(directory) else unused}"
        )
    return owner


def _id_for_unowned(directory: Path, run_dir: Path, known: str | None) -> tuple[str, list[str]]:
    """The run that a folder without an owner belongs to, and what to log about checkpoints that were there before.

    Raises:
        ValueError: nothing says that those are this run's.
    """
    folders = complete_folders(directory)
    if not folders:
        return RunHistory(run_dir).run_id, []
    saved_id = None  # of the newest checkpoint that can be read
    for folder in folders:
        with suppress(ValueError):
            saved_id = read_common(folder).get("run_id")
    if not ((known and saved_id == known) or (_is_within(directory, run_dir) and None in (known, saved_id))):
        raise ValueError(
            f"checkpoint.dir={directory} holds checkpoints of run {saved_id or '(unnamed)'}, and no {OWNER} that makes "
            "them this run's: they would be overwritten. Set another checkpoint.dir; to resume that run, bring back "
            f"its {OWNER} or run.dir's history.jsonl; to start from its weights, set checkpoint.load to one of its "
            "step folders."
        )
    note = f"{directory} had no owner; by its checkpoints or place it is this run's, as {OWNER} now says"
    return RunHistory(run_dir, saved_id).run_id, [note]


def _is_within(directory: Path, run_dir: Path) -> bool:
    return directory.resolve().is_relative_to(run_dir.resolve())


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, of which one need not exist."""
    with suppress(OSError):
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _record(run_id: str, run_dir: Path, directory: Path) -> str:
    home = run_dir.resolve()
    place = os.path.relpath(home, directory.resolve()) if _is_within(directory, run_dir) else str(home)
    return json.dumps({"run_id": run_id, "run_dir": place}) + "\n"


def lock_file(path: Path, message: str, seconds: float = LOCK_SECONDS) -> FileLock:
    """Take the lock at ``path`` until this process ends or releases it; ValueError with ``message``: another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=seconds)  # no mode of its own: the umask decides who else may continue the run
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
    except Timeout as error:
        raise ValueError(f"{message}. (The lock is {path}.)") from error
    return lock
