"""A run's checkpoints as its loop sees them: what is saved, what is said about it, what happens when it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_depthattn.config import CheckpointConfig
from megatron_depthattn.train.errors import RunError
from megatron_depthattn.train.reporter import Reporter
from megatron_depthattn.train.save import CheckpointSaver, SaveOutcome
from megatron_depthattn.train.step_folders import Progress, complete_folders

FINAL_ATTEMPTS = 3
PAUSE_SECONDS = 10.0


class CheckpointError(RunError):
    """The last checkpoint of a run could not be written."""


class RunCheckpoints:
    """Saves, and logs how each save ended; call every method on all ranks.

    A checkpoint that cannot be written costs nothing but itself: the run continues, with a loud line. Only the last one
    of a process is tried again, and is an error in the end.

    Args:
        config: how they are saved, and how many are kept.
        directory: where they lie.
        state: what to save, called when it is saved.
        report: where the lines go.
        on_progress: called whenever a part of a save is done, on this rank or on one that it waits for.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        directory: Path,
        state: Callable[[], dict[str, Any]],
        report: Reporter,
        on_progress: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._saver = CheckpointSaver(directory, keep=config.keep, is_async=config.async_save, on_progress=on_progress)
        self._state, self._report, self._on_progress = state, report, on_progress
        self._last: SaveOutcome | None = None
        self.blocking_seconds = 0.0
        """Seconds that the loop has waited for checkpoints since the process began."""
        self._stall = self._reported = 0.0

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint; end it too, unless asynchronous."""
        started = time.monotonic()
        self._report.force_to_disk()  # the record reaches at least as far as the checkpoint
        self.finish()
        self._saver.save(progress, self._state())
        self._stall = time.monotonic() - started
        self.blocking_seconds += self._stall
        self.log_outcome()

    def save_last(self, progress: Progress) -> None:
        """A checkpoint that is there when this returns; written now, unless it is the last one that was.

        Raises:
            CheckpointError: it could not be written.
        """
        self.finish()
        if self._last is not None and self._last.step == progress.step and self._last.error is None:
            return
        for attempt in range(FINAL_ATTEMPTS):
            if attempt:
                self._report.lines([f"trying again in {PAUSE_SECONDS:.0f} s"])
                time.sleep(PAUSE_SECONDS)
            self.save(progress)
            self.finish()
            assert self._last is not None and self._last.step == progress.step
            error = self._last.error
            if error is None:
                return
        raise CheckpointError(f"the state after step {progress.step} is lost: its checkpoint was not written: {error}")

    def pop_blocking_seconds(self) -> float:
        """Seconds that the loop has waited for checkpoints since this was last asked: those after the step before."""
        before, self._reported = self._reported, self.blocking_seconds
        return self._reported - before

    def log_outcome(self) -> None:
        """Log how the last save ended, once."""
        outcome = self._saver.take_outcome()
        if outcome is None:
            return
        self._last = outcome
        if outcome.error is None:
            size, rate = outcome.num_bytes / 1e9, outcome.num_bytes / 1e6 / outcome.seconds
            text = f"{size:.3f} GB in {outcome.seconds:.2f} s ({rate:.0f} MB/s); the loop waited {self._stall:.2f} s"
            self._report.lines([f"saved {outcome.folder}: {text}"])
            if outcome.warning:
                self._report.warn([outcome.warning])
        else:
            try:
                folders = complete_folders(self._directory) if self._report.is_writer else []
                left = f"the newest complete one is {folders[-1].name}" if folders else "there is none yet"
            except OSError as error:
                left = f"the folder cannot be read: {error}"
            self._report.warn([f"CHECKPOINT OF STEP {outcome.step} NOT WRITTEN: {outcome.error}; {left}"])

    def finish(self) -> None:
        """Wait for what is being written, and log how it ended."""
        self._on_progress()
        self._saver.wait()
        self._on_progress()
        self.log_outcome()
