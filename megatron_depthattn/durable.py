"""Files and folders that are complete or not there, whatever dies in between.

The order is always the same: write beside the place, force to disk, rename, force the rename to disk. A rename within
a file system is atomic; without the two forced writes a power cut can still leave a name without its content.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        fsync_path(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(path.parent)


def publish_folder(aside: Path, final: Path) -> None:
    """Give a complete folder, whose files are on disk already, its name, in place of a folder that has it now.

    Should the rename fail, the folder that had the name keeps it. A process that dies between two renames leaves it as
    ``.<name>.old``, which `recover_folder` brings back.
    """
    replaced = _replaced(final)
    fsync_path(aside)
    try:
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        aside.rename(final)
        fsync_path(final.parent)
    finally:
        recover_folder(final)
    shutil.rmtree(replaced, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Bring back the folder that a process was about to replace when it died."""
    replaced = _replaced(final)
    if replaced.exists() and not final.exists():
        replaced.rename(final)


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
