"""A run's checkpoints as its loop sees them: what is saved, what is said about it, what happens when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_depthattn.config import RunConfig
from megatron_depthattn.train.report import Reporter
from megatron_depthattn.train.save import CheckpointSaver, SaveOutcome
from megatron_depthattn.train.step_folders import Progress, newest_step

FINAL_ATTEMPTS = 3
PAUSE_SECONDS = 10.0


class CheckpointError(RuntimeError):
    """The last checkpoint of a run could not be written."""


class RunCheckpoints:
    """Saves, and tells how each save ended; call every method on all ranks.

    A checkpoint that cannot be written costs nothing but itself: the run goes on, with a loud line. Only the last one
    of a process is tried again, and is an error in the end.

    Args:
        state: what to save, called when it is saved.
        report: where the lines go.
    """

    def __init__(self, config: RunConfig, state: Callable[[], dict[str, Any]], report: Reporter) -> None:
        self._directory = Path(config.checkpoint_dir)
        self._saver = CheckpointSaver(
            self._directory, keep=config.checkpoint.keep, is_async=config.checkpoint.async_save
        )
        self._state, self._report = state, report
        self._stall = 0.0
        self._last: SaveOutcome | None = None
        self.stall_seconds = 0.0
        """Seconds that the loop has waited for checkpoints since the process began."""

    def save(self, progress: Progress) -> float:
        """Begin a checkpoint (and end it, unless asynchronous); returns the seconds that the loop waited."""
        started = time.monotonic()
        self._saver.wait()
        self.tell()
        self._saver.save(progress, self._state())
        self._stall = time.monotonic() - started
        self.stall_seconds += self._stall
        self.tell()
        return self._stall

    def save_last(self, progress: Progress) -> float:
        """A checkpoint that is there when this returns; returns the seconds that the loop waited.

        Raises:
            CheckpointError: it could not be written.
        """
        waited = 0.0
        for attempt in range(FINAL_ATTEMPTS):
            if attempt:
                self._report.lines([f"trying again in {PAUSE_SECONDS:.0f} s"])
                time.sleep(PAUSE_SECONDS)
            waited += self.save(progress)
            self.finish()
            assert self._last is not None and self._last.step == progress.step
            if self._last.error is None:
                return waited
        raise CheckpointError(f"the state after step {progress.step} is lost: its checkpoint could not be written")

    def tell(self) -> None:
        """Say how the last save ended, if it has and was not told."""
        outcome = self._saver.take_outcome()
        if outcome is None:
            return
        self._last = outcome
        if outcome.error is None:
            size, rate = outcome.num_bytes / 1e9, outcome.num_bytes / 1e6 / outcome.seconds
            text = f"{size:.3f} GB in {outcome.seconds:.2f} s ({rate:.0f} MB/s); the loop waited {self._stall:.2f} s"
            self._report.lines([f"saved {outcome.folder}: {text}"])
        else:
            newest = newest_step(self._directory)
            left = "there is none yet" if newest is None else f"the newest complete one is of step {newest}"
            self._report.warn([f"CHECKPOINT OF STEP {outcome.step} NOT WRITTEN: {outcome.error}; {left}"])

    def finish(self) -> None:
        """Wait for what is being written, and tell."""
        self._saver.wait()
        self.tell()
