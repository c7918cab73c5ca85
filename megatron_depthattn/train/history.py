"""The history of a run over its restarts: who it is, whether it gets on, and how much of the time was of use.

``<run.dir>/history.jsonl`` has one object per start and per end, in order. A process that was killed has no end: the
next start follows its start. The file is written by rank 0 and forced to disk.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import megatron_depthattn
from megatron_depthattn.train.line_files import NUMBER, append_durably, read_records

HISTORY = "history.jsonl"
METRICS = "metrics.jsonl"

EndReason = Literal["finished", "stop_after", "signal", "not finite", "error"]
DELIBERATE: frozenset[EndReason] = frozenset(["finished", "stop_after"])
"""Ends that the user asked for: what passes until the next start is not time that the run has lost."""


def package_digest() -> str:
    """SHA-256 of this package's Python files, shortened, which identifies a version of the code."""
    root = Path(megatron_depthattn.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def code_commit() -> str | None:
    """Commit of the code that runs, with ``+changes`` if it has been edited since; None where it is unknown."""
    root = Path(megatron_depthattn.__file__).parents[1]
    frozen = root / "commit.txt"  # beside the code of a submitted job
    if frozen.is_file():
        commit, *changes = frozen.read_text(encoding="utf-8").strip().split(", ")
        return commit[:12] + ("+changes" if changes else "")
    ask = ["git", "-C", str(root), "--no-optional-locks", "describe", "--always", "--abbrev=12", "--exclude=*"]
    try:
        text = subprocess.run([*ask, "--dirty=+changes"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip()


def recorded_run_id(run_dir: Path) -> str | None:
    """The identity of the run in ``run_dir``, by its history; None: it has none yet."""
    return next((record["run_id"] for record in read_records(run_dir / HISTORY, run_id=str)), None)


def has_finished(run_dir: Path) -> bool:
    """Whether the history of the run in ``run_dir`` ends with its last step."""
    *_, last = [{}, *read_records(run_dir / HISTORY, event=str)]
    return last.get("outcome") == "finished"


class RunHistory:
    """Starts and ends of the run in ``run_dir``; on rank 0 only.

    Args:
        run_dir: the run's folder.
        run_id: the identity that the folder of checkpoints names, for a run that has no history; else a new one.
    """

    def __init__(self, run_dir: Path, run_id: str | None = None) -> None:
        self._path, self._metrics = run_dir / HISTORY, run_dir / METRICS
        self._records = list(read_records(self._path, event=str, time=NUMBER))
        self.run_id: str = recorded_run_id(run_dir) or run_id or uuid.uuid4().hex[:12]
        """Who the run is for loggers, the same after every restart."""

    def check_restart_loop(self, step: int, version: str, limit: int | None) -> None:
        """Stop what starts again and again from the same step.

        Args:
            step: where this start would begin.
            version: digest of config and code; another one means that somebody has changed something.
            limit: starts without progress that are let through.

        Raises:
            ValueError: the last ``limit`` starts all began here, with this version, and none saved a checkpoint;
                those that a signal stopped are not counted.
        """
        vain, outcome = 0, None
        for record in reversed(self._records):
            if record["event"] == "end":
                outcome = record.get("outcome")
            elif outcome in DELIBERATE or (record.get("step"), record.get("version")) != (step, version):
                break
            else:
                vain, outcome = vain + (outcome != "signal"), None
        if limit is not None and vain >= limit:
            raise ValueError(
                f"the last {vain} starts all began at step {step} and none reached another checkpoint, with the "
                f"same config and code: starting again will not help. Read {self._path.with_name('log.txt')} for why "
                f"they ended; fix the cause, or set train.max_restarts_without_progress={limit * 2} (null: no limit)."
            )

    def has_started_from(self, load: str | None) -> bool:
        """Whether the run was interrupted after a start with this ``checkpoint.load``, so that it may resume."""
        if self._records and self._records[-1].get("outcome") in DELIBERATE:
            return False
        return any(record["event"] == "start" and record.get("load", ...) == load for record in self._records)

    def start(self, step: int, version: str, world_size: int, load: str | None, **more: Any) -> None:
        """Record that training begins after ``step`` steps, as ``checkpoint.load`` says."""
        import torch  # not needed by those who read a history

        machine = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} CPU cores"
        )
        self._append(
            {"event": "start", "step": step, "run_id": self.run_id, "version": version}
            | {"host": platform.node(), "world_size": world_size, "load": load}
            | {"commit": code_commit(), "machine": machine, **more}
        )

    def end(self, step: int, outcome: EndReason, **more: Any) -> dict[str, Any]:
        """Record that training ends after ``step`` steps, and why; returns the record with the run's goodput."""
        record = {"event": "end", "step": step, "outcome": outcome, **more}
        self._append(record | {"goodput": self.goodput()})
        return self._records[-1]

    def goodput(self) -> dict[str, float]:
        """Seconds of the whole run up to now.

        Useful are the training steps that count, each once: steps that had to be repeated after a crash, starts, saves
        and evaluations are not. The time between a crash and the next start counts as lost, the time after a
        deliberate end does not.
        """
        wall, began, now = 0.0, None, time.time()
        for record in self._records:
            if record["event"] == "start":
                began = began if began is not None else record["time"]
            elif record.get("outcome") in DELIBERATE and began is not None:
                wall += record["time"] - began
                began = None
        wall += 0.0 if began is None else now - began
        useful = sum(record["step_seconds"] for record in read_records(self._metrics, step_seconds=NUMBER))
        starts = sum(record["event"] == "start" for record in self._records)
        share = useful / wall if wall else 0.0
        return {"goodput": share, "useful_seconds": useful, "wall_seconds": wall, "starts": starts}

    def _append(self, record: dict[str, Any]) -> None:
        record = {"time": time.time()} | record
        self._records.append(record)
        append_durably(self._path, record)
