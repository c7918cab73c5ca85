"""Writing checkpoints: while the training loop waits only for a copy in host memory, or until everything is on disk.

A save has two halves. The first runs in the loop, on all ranks: each rank copies what it writes into host memory (its
share, see megatron_state.py); nothing is gathered. The second writes it with torch's distributed checkpoint writer,
hashes what lies on disk, and publishes the folder; it runs in a thread of each rank and talks over a process group of
its own, so that with ``checkpoint.async_save`` training continues meanwhile. Without it the loop waits for that thread.

The copy goes into buffers that are kept from save to save (page-locked where there is a GPU): the next save waits until
they are written. A save that fails on any rank, for whatever reason, fails on all of them, is logged, and removes its
files. It changes neither the run nor the checkpoints that exist.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from megatron_depthattn.config import CheckpointConfig
from megatron_depthattn.durable import publish_folder, remove, write_error
from megatron_depthattn.train.errors import RunError
from megatron_depthattn.train.reporter import Reporter
from megatron_depthattn.train.step_folders import (
    SAVED_METADATA,
    Digests,
    Progress,
    complete_folders,
    digest_files,
    staging_folder,
    step_folder,
    update_latest_and_rotate,
    write_manifest,
)

Notify = Callable[[], None]
WRITE_TIMEOUT = timedelta(hours=1)
"""How long ranks wait for the slowest writer before the save is given up. The loop itself waits no longer than
``train.hang_timeout`` for ranks that all write nothing."""
LOOK_SECONDS = 1.0
"""How often a loop that waits looks whether something was written."""
FINAL_ATTEMPTS = 3
PAUSE_SECONDS = 10.0
"""Between the attempts to write the last checkpoint of a process."""


@dataclass(frozen=True)
class SaveOutcome:
    """What became of a save; the same on all ranks, but for the seconds."""

    step: int
    folder: Path
    num_bytes: int
    seconds: float
    """From the call of `CheckpointSaver.save` to the published folder."""
    error: str | None = None
    """Why there is no such checkpoint, in one line."""
    warning: str | None = None
    """What went wrong after it was published; on rank 0."""


class CheckpointSaver:
    """Writes the checkpoints of one run; construct it and call its methods on all ranks.

    Args:
        directory: the run's checkpoint folder, shared by all ranks.
        keep: complete checkpoints to leave in the folder; None: all.
        keep_steps: steps whose checkpoints are left there beside those.
        is_async: return from `save` as soon as the copy is made.
        on_progress: called in the loop while a save gets on, also while it waits for the writers.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int | None = None,
        keep_steps: Sequence[int] = (),
        is_async: bool = False,
        on_progress: Notify = lambda: None,
    ) -> None:
        self._directory, self._is_async, self._on_progress = directory, is_async, on_progress
        self._keep, self._keep_steps = keep, keep_steps
        self._written = _Written()
        self._group: Any = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        self._strategy = _CopyToHost(on_progress)
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._is_first = True

    def save(self, progress: Progress, state: dict[str, Any]) -> None:
        """Begin to save ``state`` as the checkpoint after ``progress.step`` steps; end it too, unless asynchronous.

        An earlier save that is still being written is waited for; its outcome must have been taken before.

        Args:
            progress: names the folder.
            state: what Megatron's ``dist_checkpointing.save`` takes.
        """
        self.wait()
        assert self._outcome is None, "the outcome of the last save was not taken"
        started = time.monotonic()
        staging = staging_folder(self._directory, progress.step)
        error = None
        if dist.get_rank() == 0:
            try:
                remove(staging)  # what an interrupted save left, or a link that somebody has put in the way
                staging.mkdir(parents=True)
            except OSError as problem:
                error = _reason(problem, staging)
        error = self._agree(error)
        self._on_progress()
        if error is None:
            try:
                dist_checkpointing.save(
                    state | {"progress": asdict(progress)},
                    str(staging),
                    sharded_strategy=self._strategy,
                    async_sharded_save=True,
                    validate_access_integrity=self._is_first,  # who writes what does not change within a run
                    content_metadata=dict(SAVED_METADATA),
                )
            except (OSError, RuntimeError) as problem:  # rank 0 writes the common state; torch.save raises either
                error = f"rank {dist.get_rank()}: {_reason(problem, staging)}"
            self._is_first = False
        self._on_progress()
        arguments = (progress.step, staging, self._strategy.take(), error, started)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint writer", daemon=True)
        self._thread.start()
        if not self._is_async:
            self.wait()

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        while self._thread is not None:
            self._thread.join(LOOK_SECONDS)
            if not self._thread.is_alive():
                self._thread = None
            elif self._written.has_grown():
                self._on_progress()

    def take_outcome(self) -> SaveOutcome | None:
        """What became of the last save, once, when it has ended; None while it is being written, and afterwards.

        Ranks may learn of the end at different steps: after `wait` all of them know.
        """
        if self.is_writing:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _write(self, step: int, staging: Path, state: dict[str, Any] | None, error: str | None, started: float) -> None:
        """The second half, in the thread."""
        if self._device is not None:
            torch.cuda.set_device(self._device)  # each thread has its own current device, and begins with 0
        final, num_bytes, warning = step_folder(self._directory, step), 0, None
        try:
            files: Digests = {}
            if (error := self._agree(error)) is None:
                assert state is not None
                files, error = self._write_files(staging, state)
            gathered: list[tuple[str | None, Digests]] = [(None, {})] * dist.get_world_size()
            dist.all_gather_object(gathered, (error, files), group=self._group)
            error = next((each for each, _ in gathered if each), None)
            digests = {name: file for _, of_rank in gathered for name, file in of_rank.items()}
            num_bytes = sum(file["bytes"] for file in digests.values())
            if dist.get_rank() == 0:
                if error := error or self._publish(final, staging, digests):
                    remove(staging)
                else:
                    warning = update_latest_and_rotate(final, self._keep, self._keep_steps)
            error = self._agree(error)
        except Exception as problem:  # another rank is gone: the loop will meet that itself
            error = _reason(problem, staging)
        self._outcome = SaveOutcome(step, final, num_bytes, time.monotonic() - started, error, warning)

    def _write_files(self, staging: Path, state: dict[str, Any]) -> tuple[Digests, str | None]:
        """Write this rank's files and hash them; all ranks together."""
        try:
            dcp.save(
                state,
                # All lies in host memory: to copy ahead would mean to wait for the GPU's default stream.
                storage_writer=dcp.FileSystemWriter(staging, sync_files=True, per_thread_copy_ahead=0),
                planner=_Planner(self._written.grow),
                process_group=self._group,
            )
            names = [path.name for path in staging.glob(f"__{dist.get_rank()}_*.distcp")]
            return digest_files(staging, names, on_part=self._written.grow), None
        except CheckpointException as problem:
            # Torch keeps the first error in a cycle with its frames. Were the cycle left to the garbage collector,
            # Python 3.12 could crash on it: on a view of an io.BytesIO that is cleared after its owner.
            traceback.clear_frames(problem.__traceback__)
            mine = problem.failures.get(dist.get_rank())  # a rank that has not failed leaves it to those that have
            return {}, f"rank {dist.get_rank()}: {_reason(mine[0], staging)}" if mine else None
        except Exception as problem:  # nothing that goes wrong with a save may end the run
            return {}, f"rank {dist.get_rank()}: {_reason(problem, staging)}"

    def _publish(self, final: Path, staging: Path, digests: Digests) -> str | None:
        try:
            save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(staging))
            rest = [path.name for path in staging.iterdir() if path.name not in digests]
            write_manifest(staging, digests | digest_files(staging, rest))
            publish_folder(staging, final)
        except Exception as problem:
            return _reason(problem, staging)
        return None

    def _agree(self, error: str | None) -> str | None:
        """The first rank's error that has one, on every rank."""
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self._group)
        return next((each for each in errors if each), None)


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
        on_progress: Notify,
    ) -> None:
        self._directory = directory
        self._saver = CheckpointSaver(
            directory,
            keep=config.keep,
            keep_steps=config.keep_steps or (),
            is_async=config.async_save,
            on_progress=on_progress,
        )
        self._state, self._report, self._on_progress = state, report, on_progress
        self._last = SaveOutcome(-1, directory, 0, 0.0)
        self.blocking_seconds = 0.0
        """Seconds that the loop has waited for checkpoints since the process began."""
        self._stall = 0.0

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
        if self._last.step == progress.step and self._last.error is None:
            return
        for attempt in range(FINAL_ATTEMPTS):
            if attempt:
                self._report.lines([f"trying again in {PAUSE_SECONDS:.0f} s"])
                time.sleep(PAUSE_SECONDS)
            self.save(progress)
            self.finish()
            if self._last.error is None:
                return
        raise CheckpointError(f"the state after step {progress.step} was not written and is lost: {self._last.error}")

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


class _Written:
    """Whether any rank has written something, which all of them see: those that are done wait for the slowest.

    A rank that hangs while it writes stops the count, and so the heartbeats of all that wait for it.
    """

    def __init__(self) -> None:
        self._store = dist.PrefixStore("checkpoint", dist.distributed_c10d._get_default_store().clone())
        self._at, self._seen = 0.0, 0

    def grow(self) -> None:
        """Called in the writer's thread."""
        now = time.monotonic()
        if now - self._at > LOOK_SECONDS:
            self._at = now
            self._store.add("written", 1)

    def has_grown(self) -> bool:
        """Whether it has since this was last asked."""
        before = self._seen
        with contextlib.suppress(RuntimeError):  # the host of the store is gone: the writer will meet that itself
            self._seen = self._store.add("written", 0)
        return self._seen != before


class _Planner(MCoreSavePlanner):
    """Megatron's planner, which says when a part is about to be written."""

    def __init__(self, on_part: Notify) -> None:
        super().__init__(flatten_state_dict=False)
        self._on_part = on_part

    def resolve_data(self, write_item: WriteItem) -> Any:
        self._on_part()
        return super().resolve_data(write_item)


class _CopyToHost(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where it would write: a copy of this rank's parts in host memory.

    The buffers are filled anew by every save; what is kept is their memory.
    """

    def __init__(self, on_part: Notify) -> None:
        super().__init__("torch_dist", 1)
        self._on_part = on_part
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._state: dict[str, Any] | None = None

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Any, *_: Any) -> AsyncRequest:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        for part in itertools.chain.from_iterable(by_key.values()):
            if isinstance(part, ShardedTensor):
                self._on_part()  # page-locked memory is slow to get
                part.data = self._copy(part)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._state = mcore_to_pyt_state_dict(by_key)
        return AsyncRequest(None, (), [])

    def take(self) -> dict[str, Any] | None:
        """The copy; None if there is none to write."""
        state, self._state = self._state, None
        return state

    def _copy(self, part: ShardedTensor) -> torch.Tensor:
        source, name = part.data.detach(), (part.key, part.global_offset)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(source, non_blocking=True)


def _reason(problem: BaseException, folder: Path) -> str:
    if text := write_error(problem, folder):
        return text
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[-1] if lines else ''}"
