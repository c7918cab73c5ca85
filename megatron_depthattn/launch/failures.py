"""The records that failing ranks leave (torchrun's TORCHELASTIC_ERROR_FILE), and the first of all of them."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

_MOST_TEXT = 20_000
_UNANNOUNCED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)


class Failure(NamedTuple):
    """What ended a rank; the least of several ended the run: ranks that lost a neighbour come after all others."""

    secondary: bool
    """Whether it speaks of another rank that has gone or failed."""
    time: float
    """Seconds since 1970, by that host's clock."""
    rank: int
    host: str
    message: str
    """One line, or a traceback."""

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
            it = json.loads(path.read_text(encoding="utf-8"))
            text = it["message"]["extraInfo"]["py_callstack"]
            found.append(
                Failure(bool(it.get("consequence", it.get("secondary"))), it["time"], it["rank"], it["host"], text)
            )
    return min((failure for failure in found if failure.time >= since), default=None)


def record_death(path: Path, rank: int, pid: int, code: int) -> None:
    """Leave a record for a rank that ended without one."""
    what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    memory = "; if nobody did that, the host ran out of memory: see its kernel's log"
    what += {70: ": the watchdog found the run hung", -signal.SIGKILL: memory}.get(code, "")
    # Its neighbours fail within milliseconds, torchrun looks ten times a second: this came before.
    now = time.time() - (1.0 if code in _UNANNOUNCED else 0.0)
    record: dict[str, Any] = {"time": now, "host": platform.node(), "rank": rank, "retry": True, "consequence": False}
    last: list[str] = []
    with contextlib.suppress(OSError):
        last = path.with_name("stderr.log").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
    text = "\n".join([*last, f"rank {rank} (pid {pid}) ended: {what}"])
    record["message"] = {"message": what, "extraInfo": {"py_callstack": text, "timestamp": str(int(now))}}
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(record), encoding="utf-8")
