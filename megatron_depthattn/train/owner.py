"""Which run owns a folder of checkpoints, and which process is in it: no other one reads, prunes or writes there.

`owner.json` in the folder names the run's id and its run.dir; the run's history names the same id. A run whose folder
was moved takes its checkpoints along. The file says who may start, a lock beside it who has: a process that ends, in
whatever way, releases the lock and leaves the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from megatron_depthattn.durable import create_durably, write_durably
from megatron_depthattn.train.history import new_run_id, recorded_run_id
from megatron_depthattn.train.step_folders import OWNER, complete_folders
from megatron_depthattn.train.step_reader import read_common

LOCK_SECONDS = 30.0
_RUN_LOCK, _CHECKPOINTS_LOCK = ".lock", ".checkpoints.lock"  # checkpoint.dir may be run.dir


class Owner(NamedTuple):
    """The run that a folder of checkpoints belongs to."""

    run_id: str
    run_dir: str
    """Absolute, or from the folder of checkpoints where that lies in it: they are moved and copied together."""

    def home(self, directory: Path) -> Path:
        """The run's folder."""
        return (directory.resolve() / self.run_dir).resolve()


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
    return _lock(
        run_dir / _RUN_LOCK,
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
    known, notes = recorded_run_id(run_dir), []
    directory.mkdir(parents=True, exist_ok=True)
    if read_owner(directory) is None:
        notes = _claim_unowned(directory, run_dir, known)
    _require_own(directory, run_dir, known)  # before the wait for its lock
    lock = _lock(
        directory / _CHECKPOINTS_LOCK,
        f"another process saves to checkpoint.dir={directory}, perhaps on another host: two would overwrite each "
        "other's checkpoints. Wait for it, end it, or set another checkpoint.dir",
    )
    owner = _require_own(directory, run_dir, known)
    if not _same(owner.home(directory), run_dir):
        write_durably(directory / OWNER, _record(owner.run_id, run_dir, directory))
        notes.append(f"run {owner.run_id} was moved from {owner.run_dir}; {directory} now belongs to {run_dir}")
    return Claim(owner.run_id, lock, notes)


def read_owner(directory: Path) -> Owner | None:
    """The owner that a folder's file names; None: there is no file.

    Raises:
        ValueError: the file names none.
    """
    path = directory / OWNER
    try:
        content = json.loads(path.read_bytes())
        owner = Owner(str(content["run_id"]), str(content["run_dir"]))
        owner.home(directory)
        return owner
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
    home = owner.home(directory)
    is_home = _same(home, run_dir)
    if known == owner.run_id and not is_home and _is_still_at(home, known):
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


def _is_still_at(home: Path, run_id: str) -> bool:
    """Whether a run's folder is where it was; one that this user may not look into is taken for moved away."""
    try:
        return recorded_run_id(home) == run_id
    except PermissionError:
        return False


def _claim_unowned(directory: Path, run_dir: Path, known: str | None) -> list[str]:
    """Write the owner of a folder that has none; returns what to log about checkpoints that were there before.

    Raises:
        ValueError: nothing says that those are this run's.
    """
    run_id, notes = known, []
    if folders := complete_folders(directory):
        saved_id = _saved_run_id(folders)
        is_within = _is_within(directory, run_dir)
        if not ((known and saved_id == known) or (is_within and None in (known, saved_id))):
            raise ValueError(
                f"checkpoint.dir={directory} holds checkpoints of run {saved_id or '(unnamed)'}, and no {OWNER} that "
                "makes them this run's: they would be overwritten. Set another checkpoint.dir; to resume that run, "
                f"bring back its {OWNER} or run.dir's history.jsonl; to start from its weights, set checkpoint.load to "
                "one of its step folders."
            )
        run_id = known or saved_id
        notes = [f"{directory} had no owner; by its checkpoints or place it is this run's, as {OWNER} now says"]
    try:
        create_durably(directory / OWNER, _record(run_id or new_run_id(), run_dir, directory))
    except FileExistsError:  # another start was faster: it owns the folder, and is compared with this one
        return []
    return notes


def _saved_run_id(folders: list[Path]) -> str | None:
    """The run that saved the newest checkpoint that can be read."""
    for folder in reversed(folders):
        try:
            return read_common(folder).get("run_id")
        except ValueError:
            continue
    return None


def _is_within(directory: Path, run_dir: Path) -> bool:
    return directory.resolve().is_relative_to(run_dir.resolve())


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, of which one need not exist."""
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()


def _record(run_id: str, run_dir: Path, directory: Path) -> str:
    home = run_dir.resolve()
    place = os.path.relpath(home, directory.resolve()) if _is_within(directory, run_dir) else str(home)
    return json.dumps(Owner(run_id, place)._asdict()) + "\n"


def _lock(path: Path, message: str) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=LOCK_SECONDS)  # no mode of its own: the umask decides who else may continue the run
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{message}. (The lock is {path}.)") from error
    except NotImplementedError:  # a file system without locks
        pass
    return lock
