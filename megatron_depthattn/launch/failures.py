"""The records that failing ranks leave (torchrun's TORCHELASTIC_ERROR_FILE), and the first of all of them."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_TEXT = 20_000
_UNANNOUNCED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)


@dataclass(frozen=True)
class Failure:
    """What ended a rank."""

    secondary: bool
    """Whether it speaks of another rank that has gone or failed."""
    time: float
    """Seconds since 1970, by that host's clock."""
    rank: int
    host: str
    message: str
    """One line, or a traceback."""

    @property
    def order(self) -> tuple[bool, float]:
        """The first one in this order ended the run: ranks that lost a neighbour come after all others."""
        return self.secondary, self.time

    @property
    def text(self) -> str:
        """For people; ends with the message."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"first failure, at {moment}: rank {self.rank} on {self.host}\n{self.message.rstrip()[-_MOST_TEXT:]}"


def first_failure(logs: Path, since: float = 0.0) -> Failure | None:
    """What failed first of all ranks whose records below ``logs`` are from ``since`` or later."""
    found = []
    for path in logs.glob("**/error.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # cut off: the rank died while it wrote
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["time"] >= since:
                message = values["message"]["extraInfo"]["py_callstack"]
                secondary = bool(values.get("secondary", values.get("consequence")))
                found.append(Failure(secondary, values["time"], values["rank"], values["host"], message))
    return min(found, key=lambda failure: failure.order, default=None)


def record_death(path: Path, rank: int, pid: int, code: int) -> None:
    """Leave a record for a rank that ended without one."""
    what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == 70:
        what += ": the watchdog found the run hung"
    if code == -signal.SIGKILL:
        what += "; if nobody did that, the host ran out of memory: see its kernel's log"
    # Its neighbours fail within milliseconds, torchrun looks ten times a second: this came before.
    now = time.time() - (1.0 if code in _UNANNOUNCED else 0.0)
    text = "\n".join([*_tail(path.with_name("stderr.log")), f"rank {rank} (pid {pid}) ended: {what}"])
    record: dict[str, Any] = {
        "message": {"message": what, "extraInfo": {"py_callstack": text, "timestamp": str(int(now))}},
        "time": now,
        "host": platform.node(),
        "rank": rank,
        "retry": True,
        "secondary": False,
    }
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(record), encoding="utf-8")


def _tail(path: Path, lines: int = 30) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return []
