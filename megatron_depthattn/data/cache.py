"""A node's cache of shards, kept below a size by all the processes that use it.

Files and the kernel's locks are all that they share, so that a killed process leaves nothing that the next one must
wait for or could take for something else:

- `.NAME.cached` stands beside each shard NAME that was put there. It holds the inode of that file and the place that it
  was made from: what has no such record, or another inode, is nobody's cache and stays. Its time is that of the shard's
  last use. Who makes or reads the shard holds a shared lock on the record, and who evicts the shard needs it alone.
  While a shard is made, the record holds the bytes that this takes.
- `.needs.ID` in the cache lists what one process will need soon, in the order of need, for as long as it holds the
  file's lock.
- `.lock.room` is held while room is made and taken, never during a download.

Nobody waits for room while holding a shard, and the limit has room for any one shard, so waiting always ends.
"""

import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from megatron_depthattn.config.sizes import shown
from megatron_depthattn.data.shard_files import is_remote

RECORD, NEEDS, COUNTS = ".cached", ".needs.", ".counts"
EVICTED = b"-"
"""What the record of a shard holds that has been evicted."""
FETCHES = 4
"""Shards that processes of a node make ahead of need at the same time."""
WAIT_SECONDS = 900.0
LOOK_SECONDS = 0.05


class NoRoomError(Exception):
    """A shard that is not needed yet has no room."""


class Counts(NamedTuple):
    """What has happened in a cache with a limit, by all processes of all runs."""

    made: int = 0
    """Shards that were fetched or expanded."""
    again: int = 0
    """Those among them that had been evicted."""
    evicted: int = 0
    too_soon: int = 0
    """Those among them that a process needed soon."""

    def since(self, earlier: "Counts") -> "Counts":
        return Counts(*(now - then for now, then in zip(self, earlier, strict=True)))


class _Cached(NamedTuple):
    """A shard in a cache."""

    urgency: float
    """0: no process needs it soon; else 1 over its place in the order of need."""
    used: int
    """Nanoseconds."""
    folder: str
    name: str
    bytes: int


class ShardCache:
    """One split's folder in a node's cache.

    Args:
        folder: of the split, in the folder of the whole cache.
        limit: bytes of all shards in the cache; None: nothing is evicted by this process.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.root, self.limit, self._folder = folder.parent, limit, folder

    @contextmanager
    def in_use(self, name: str) -> Iterator[None]:
        """Keep a shard, which need not be there yet, from being evicted."""
        try:
            record = _open(self._folder / f".{name}{RECORD}", os.O_RDONLY | os.O_CREAT)
        except OSError:  # no folder yet, or one in which nobody can evict anything either
            yield
            return
        with _held(record, fcntl.LOCK_SH):
            with suppress(OSError):
                os.utime(record)
            yield

    @contextmanager
    def making(self, name: str, needed: int, origin: str, *, is_ahead: bool) -> Iterator[Callable[[Path], None]]:
        """Take room for a shard; what is yielded takes the complete file, before it gets its name.

        Args:
            needed: bytes that it takes while it is made.
            origin: what it is made from.
            is_ahead: it is not needed yet: nothing that is needed leaves for it, and nothing is waited for.

        Raises:
            ValueError: it can have no room.
            NoRoomError: it can have none now.
        """
        with _held(_open(self._folder / f".{name}{RECORD}", os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH) as record:
            before = os.pread(record, 1 << 16, 0)
            if self.limit is not None:  # what is made again is damaged, and would be waited for by all who need room
                with suppress(OSError):
                    os.unlink(self._folder / name)
            self._take_room(record, needed, before == EVICTED, is_ahead)
            try:
                # What is taken counts until the file has its name. A record is read at any moment: never an empty one.
                yield lambda file: _overwrite(
                    record, {"inode": os.stat(file).st_ino, "origin": origin, "making": needed}
                )
            except BaseException:
                _write(record, before)
                raise

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether this process may make a shard ahead of need, while it has one of the node's few turns to do so."""
        with ExitStack() as stack:
            for number in range(FETCHES):
                with suppress(Timeout):
                    stack.enter_context(FileLock(self.root / f".lock.ahead.{number}", timeout=0))
                    yield True
                    return
            yield False

    def _take_room(self, record: int, needed: int, again: bool, is_ahead: bool) -> None:
        if self.limit is None:
            _write_json(record, {"making": needed})
            return
        if needed > self.limit:
            raise ValueError(
                f"data.cache_limit is {shown(self.limit)}, and one shard of {self._folder.name} takes {shown(needed)} "
                f"while it is made: set at least {shown(needed)}"
            )
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with FileLock(self.root / ".lock.room", timeout=WAIT_SECONDS):
                is_enough, evicted = self._make_room(needed, is_ahead)
                happened = Counts(
                    is_enough, is_enough and again, len(evicted), sum(shard.urgency > 0 for shard in evicted)
                )
                if any(happened):
                    _add_counts(self.root, happened)
                if is_enough:
                    _write_json(record, {"making": needed})
                    return
            if is_ahead:
                raise NoRoomError
            if time.monotonic() > deadline:
                raise ValueError(
                    f"data.cache_limit is {shown(self.limit)}, and for {WAIT_SECONDS:.0f} s other processes have used "
                    f"so much of it that {shown(needed)} more had no room: set a larger one"
                )
            time.sleep(LOOK_SECONDS)

    def _make_room(self, needed: int, is_ahead: bool) -> tuple[bool, list[_Cached]]:
        """Evict until there is room beside what all processes have; returns whether there is, and what left."""
        assert self.limit is not None
        free, shards = self.limit - needed, list[_Cached]()
        evicted: list[_Cached] = []
        urgencies = _needs(self.root)
        for folder in sorted(os.listdir(self.root)):
            with suppress(OSError), _folder(self.root / folder) as descriptor:
                taken, found = _contents(descriptor, folder, urgencies)
                free -= taken
                shards += found
        free -= sum(shard.bytes for shard in shards)
        for shard in sorted(shards):
            if free >= 0 or (is_ahead and shard.urgency):
                break
            with suppress(OSError, ValueError), _folder(self.root / shard.folder) as descriptor:
                if _evict(descriptor, shard.name):
                    free += shard.bytes
                    evicted.append(shard)
        return free >= 0, evicted


class Needs:
    """What a process will need soon, for whoever makes room in a cache."""

    def __init__(self, root: Path) -> None:
        self._root, self._file = root, -1

    def publish(self, names: Sequence[str]) -> None:
        """Replace the list: `folder/shard` in the order of need."""
        if self._file == -1 or not os.fstat(self._file).st_nlink:  # taken for a dead process's before it was locked
            self.close()
            self._root.mkdir(parents=True, exist_ok=True)
            self._file = _open(self._root / f"{NEEDS}{uuid.uuid4().hex}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        # Who reads it meanwhile sees names cut in two, which are no shard's, and a shard leaves sooner than it should.
        _write(self._file, "\n".join([*names, ""]).encode())

    def close(self) -> None:
        if self._file != -1:
            os.close(self._file)
            self._file = -1


def counts(root: Path) -> Counts:
    """What has happened in a cache so far."""
    with suppress(OSError, ValueError, TypeError):
        file = _open(root / COUNTS, os.O_RDONLY)
        try:
            return Counts(*map(int, json.loads(os.pread(file, 1 << 12, 0))))
        finally:
            os.close(file)
    return Counts()


def _add_counts(root: Path, more: Counts) -> None:
    file = _open(root / COUNTS, os.O_RDWR | os.O_CREAT)
    try:
        _write_json(file, [old + new for old, new in zip(counts(root), more, strict=True)])
    finally:
        os.close(file)


def _needs(root: Path) -> dict[str, float]:
    """What is needed soon, by `folder/shard`; see `_Cached`. Lists of processes that are dead are removed."""
    urgencies: dict[str, float] = {}
    for entry in os.listdir(root):
        if not entry.startswith(NEEDS):
            continue
        with suppress(OSError):
            with _held(_open(root / entry, os.O_RDONLY)) as file:
                if _lock(file, fcntl.LOCK_SH):
                    os.unlink(root / entry)
                    continue
                names = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace").splitlines()
            for place, name in enumerate(names, 1):
                urgencies[name] = max(urgencies.get(name, 0.0), 1.0 / place)
    return urgencies


def _contents(descriptor: int, folder: str, urgencies: dict[str, float]) -> tuple[int, list[_Cached]]:
    """Bytes that are taken by shards in the making, and the shards of one folder of a cache."""
    files: dict[str, os.stat_result] = {}
    with os.scandir(descriptor) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # a file that has got its name meanwhile
                files[entry.name] = entry.stat(follow_symlinks=False)
    taken, shards = 0, []
    for place, record in files.items():
        if not place.endswith(RECORD) or record.st_size <= len(EVICTED):
            continue
        name = place[1 : -len(RECORD)]
        shard = files.get(name)
        if shard is not None and stat.S_ISREG(shard.st_mode):
            urgency = urgencies.get(f"{folder}/{name}", 0.0)
            shards.append(_Cached(urgency, record.st_mtime_ns, folder, name, shard.st_size))
        else:
            with suppress(OSError, ValueError):
                taken += _being_made(descriptor, name)
    return taken, shards


def _being_made(descriptor: int, name: str) -> int:
    """Bytes that are taken by a shard that is not there; of a dead maker none, and what it left is removed."""
    with _held(_open(f".{name}{RECORD}", os.O_RDWR, descriptor)) as record:
        if not _lock(record, fcntl.LOCK_EX):
            return int(json.loads(os.pread(record, 1 << 16, 0)).get("making", 0))
        with suppress(FileNotFoundError):  # it was made since the folder was listed
            return os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_size
        with suppress(OSError):
            os.unlink(f".{name}.part", dir_fd=descriptor)
        shutil.rmtree(f".{name}.fetched", ignore_errors=True, dir_fd=descriptor)
        os.truncate(record, 0)
    return 0


def _evict(descriptor: int, name: str) -> bool:
    """Remove a shard that nobody uses, that is the file of its record, and that can be made again."""
    with _held(_open(f".{name}{RECORD}", os.O_RDWR, descriptor)) as record:
        if not _lock(record, fcntl.LOCK_EX):
            return False
        made: dict[str, Any] = json.loads(os.pread(record, 1 << 16, 0))
        file = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if not stat.S_ISREG(file.st_mode) or file.st_ino != made.get("inode"):
            return False
        if not is_remote(made["origin"]) and not os.path.isfile(made["origin"]):
            return False
        os.unlink(name, dir_fd=descriptor)
        _write(record, EVICTED)
    return True


def _open(path: Path | str, flags: int, folder: int | None = None) -> int:
    """Open a plain file of ours: never through a link."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no plain file")
    return descriptor


def _write(descriptor: int, content: bytes) -> None:
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def _overwrite(descriptor: int, content: Any) -> None:
    """As `_write_json`, but who reads meanwhile sees the one or the other; spaces fill what is left of the old one."""
    os.pwrite(descriptor, json.dumps(content).encode().ljust(os.fstat(descriptor).st_size), 0)


def _write_json(descriptor: int, content: Any) -> None:
    _write(descriptor, json.dumps(content).encode())


def _lock(descriptor: int, kind: int) -> bool:
    """Whether a lock could be had at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _held(descriptor: int, kind: int | None = None) -> Iterator[int]:
    """A file, which is closed in the end; with a lock, whoever was forked meanwhile and has the file open as well."""
    try:
        if kind is not None:
            fcntl.flock(descriptor, kind)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
