"""Files and folders that are complete or not there, whatever dies in between.

The order is always the same: write beside the place, force to disk, rename, force the rename to disk. A rename within
a file system is atomic; without the two forced writes a power cut can still leave a name without its content.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Force a folder and all that is below it to disk."""
    for path in [folder, *folder.rglob("*")]:
        fsync_path(path)


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    with _staged(path, text) as staging:
        staging.replace(path)


def create_durably(path: Path, text: str) -> None:
    """Write a small file that nobody else has made: of several processes that try, one succeeds.

    Raises:
        FileExistsError: the file is there.
    """
    with _staged(path, text) as staging:
        try:
            os.link(staging, path)  # a rename would replace what another process has written
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("x", encoding="utf-8") as file:
                file.write(text)


@contextmanager
def _staged(path: Path, text: str) -> Iterator[Path]:
    """A new file beside ``path`` that holds the text; no other process writes it, and no link is followed."""
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with naming(path):
        try:
            with staging.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            yield staging
        finally:
            staging.unlink(missing_ok=True)
        fsync_path(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the operating system the file's name: a failed write comes without one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_error(problem: BaseException, folder: Path) -> str | None:
    """Why files could not be written into ``folder``, by the operating system, in one line; None: it takes files.

    Torch reports a failed write as a wrong position in its file. The error behind it is in the chain of exceptions
    where Python wrote the file, and comes back with the next file where C++ did.
    """
    cause: BaseException | None = problem
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        probe = folder / f".probe.{uuid.uuid4().hex}"
        try:
            probe.write_bytes(bytes(1 << 20))
        except OSError as error:
            cause = error
        finally:
            probe.unlink(missing_ok=True)
        if isinstance(cause, FileNotFoundError):  # the folder is gone: that says nothing about what was not written
            return None
    if not isinstance(cause, OSError):
        return None
    full = "the disk is full, or your share of it: " if cause.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{full}{cause.strerror}: {cause.filename or folder}"


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a link to one without following it; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def publish_folder(staging: Path, final: Path) -> None:
    """Give a complete folder, whose files are on disk already, its name, in place of a folder that has it now.

    Should the rename fail, the folder that had the name keeps it. A process that dies between two renames leaves it as
    ``.<name>.old``, which `recover_folder` brings back.
    """
    replaced = final.with_name(f".{final.name}.old")
    fsync_path(staging)
    try:
        if os.path.lexists(final):
            remove(replaced)
            final.rename(replaced)
        staging.rename(final)
        fsync_path(final.parent)
    finally:
        recover_folder(final)
    remove(replaced)


def recover_folder(final: Path) -> None:
    """Bring back the folder that a process was about to replace when it died."""
    replaced = final.with_name(f".{final.name}.old")
    if os.path.lexists(replaced) and not os.path.lexists(final):
        replaced.rename(final)
