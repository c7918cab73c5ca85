"""Files that grow by lines over the restarts of a run: a record of steps, a history, a log."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_depthattn.durable import naming, write_durably

NUMBER = (int, float)


class AppendFile:
    """A file of lines on a disk that may be full for a while: what cannot be written waits for the next line."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)  # less the umask
        self._pending = b""
        self.problem: str | None = None
        """Why the last line could not be written, while it waits."""

    def write(self, text: str) -> None:
        """Add text that ends with a line's end."""
        self._pending += text.encode(errors="replace")
        self.problem = None
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        except OSError as error:  # a report that cannot be written must not end the run
            self.problem = error.strerror or str(error)

    def force_to_disk(self) -> None:
        """Return when a power cut can no longer take what was written; a full disk is as for `write`."""
        self.write("")
        with contextlib.suppress(OSError):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        self.write("")
        os.close(self._descriptor)


def append_durably(path: Path, record: dict[str, Any]) -> None:
    """Add one object to a .jsonl file, on a line of its own even after one that a crash cut off; force it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        begin = b"" if file.read() in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path, **kinds: type | tuple[type, ...]) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, but for lines that a crash has cut off; none if there is no file.

    Args:
        kinds: keys that a line must have to count, and of which type their values are.
    """
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
                    yield record


def held_out_losses(record: dict[str, Any]) -> dict[str, float]:
    """The held-out losses of a step's record by the names of their splits; the run's own val split has the name ''."""
    own = record.get("eval_loss")
    return ({} if own is None else {"": own}) | (record.get("held_out") or {})


def drop_steps_after(path: Path, step: int, *instead: dict[str, Any]) -> None:
    """Keep the lines up to ``step``, whole ones: a run that resumes there writes the later ones again.

    ``instead`` is written in place of what is dropped.
    """
    if path.exists():
        kept = [record for record in read_records(path, step=int) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in [*kept, *instead])
        if text != path.read_text(encoding="utf-8", errors="replace"):
            write_durably(path, text)
