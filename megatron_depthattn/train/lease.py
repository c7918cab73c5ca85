"""A lease keeps a run from rotating a checkpoint away while another process reads it.

It is a file in the step folder, locked by its holder, who touches it every minute. A holder on this host that dies, in
whatever way, releases the lock, and the lease with it. A lock says nothing about another host, where a shared file
system may keep locks to itself: there the lease ends when it was not touched for `EXPIRY_SECONDS`, and so does that of
a holder that hangs. Times are the file system's own, so clocks need not agree.
"""

from __future__ import annotations

import fcntl
import os
import platform
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXPIRY_SECONDS = 600.0
TOUCH_SECONDS = 60.0
_LEASE = ".lease-"


@contextmanager
def lease(folder: Path) -> Iterator[None]:
    """Hold a step folder for the block; without a lease where this user cannot write.

    Raises:
        FileNotFoundError: the folder is not there, or was just removed.
    """
    path = folder / f"{_LEASE}{uuid.uuid4().hex}"
    try:
        file = path.open("x", encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError:
        yield
        return
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(path)  # `touch` would make it anew in a folder that came in place of this one

    try:
        with file:
            with suppress(OSError):  # a file system without locks: its age says whether the lease is held
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(_host())  # only now: who reads it may trust the lock
                file.flush()
            threading.Thread(target=touch, name="lease", daemon=True).start()
            yield
    finally:
        done.set()
        with suppress(OSError):
            path.unlink()


def is_leased(folder: Path, now: float) -> bool:
    """Whether somebody holds a lease on the folder; ``now`` is the file system's time."""
    return any(_is_held(path, now) for path in folder.glob(f"{_LEASE}*"))


def _is_held(path: Path, now: float) -> bool:
    try:
        if abs(now - path.stat().st_mtime) > EXPIRY_SECONDS:
            return False
        with path.open(encoding="utf-8") as file:
            if file.read() != _host():
                return True
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            return False
    except FileNotFoundError:  # released just now
        return False
    except OSError:  # another user's: its age alone is known
        return True


def _host() -> str:
    """A name for this kernel, within which locks hold; no two hosts have the same, whatever they are called."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return platform.node()
