"""Score a run's checkpoints while it trains: each is exported to a temporary Hugging Face folder and scored beside it.

``<run.dir>/evaluations.jsonl`` has one object for each step and measure. It is the only state: what is on record for a
checkpoint, by the digest of its manifest, is not scored again. The name of an export has step and digest, so that a
process that was killed while it scored needs the checkpoint no more.
"""

from __future__ import annotations

import gc
import hashlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from megatron_depthattn.config import CheckpointConfig
from megatron_depthattn.config.load import load_record
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.durable import remove
from megatron_depthattn.launch import heeded_signals
from megatron_depthattn.suite import VERSIONS
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.curves import EVALUATIONS, log_evaluation
from megatron_depthattn.train.history import HISTORY, has_finished
from megatron_depthattn.train.lease import lease
from megatron_depthattn.train.line_files import append_durably, read_records
from megatron_depthattn.train.start import lock_file
from megatron_depthattn.train.step_folders import MANIFEST, complete_folders, file_hash

LOOK_SECONDS = 2.0
LOCK_SECONDS = 10.0
"""A process that was just killed may take a moment to release its lock."""
_EXPORT = re.compile(r"\.?step_(\d{8})-([0-9a-f]{16})", re.ASCII)
_LEFT = re.compile(r"\.\.?step_\d{8}-[0-9a-f]{16}\.(part|old)", re.ASCII)
_SHOWN = 4


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end, which the same command continues; it has the signal's name."""


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Within the block a scheduler's signals raise `Stopped`, once; SIGUSR2 sets the event; Ctrl-C stays Python's."""
    no_more = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            no_more.set()
            return
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in heeded_signals() if each != signal.SIGINT}
    try:
        yield no_more
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Figures(NamedTuple):
    """What a model scored."""

    values: dict[str, float | None]
    samples: int
    more: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something to score every checkpoint by."""

    what: Mapping[str, Any]
    """``task``, and ``shots``, ``data``, ``limit``, ``document_mask`` as they apply: the same on record is done."""
    name: str
    """For people, and for curves."""
    score: Callable[[PreTrainedModel, Path], Figures]
    """Of a loaded model and its folder; ValueError: it cannot be scored."""


class Work(NamedTuple):
    """A checkpoint to score."""

    step: int
    digest: str
    folder: Path
    """The step folder, or an export of it."""


class Follower:
    """Scores the checkpoints of one run, the oldest first.

    Args:
        run_dir: the run's folder; the run need not have started.
        load: makes a model of an exported folder, where it is to compute.
        every: score steps that are divisible by it, and the last one.
        output: exports lie in a folder here that is this run's alone; None: in the run's folder.
        keep_exports: leave them there.
        tokenizer: for the exports; None: the one of the run's data.
    """

    def __init__(
        self,
        run_dir: Path,
        measures: Sequence[Measure],
        load: Callable[[Path], PreTrainedModel],
        *,
        output: Path | None = None,
        every: int = 1,
        keep_exports: bool = False,
        tokenizer: Path | None = None,
    ) -> None:
        self._run_dir, self._measures, self._load, self._every = run_dir, measures, load, every
        name = f"{run_dir.resolve().name}-{hashlib.sha256(bytes(run_dir.resolve())).hexdigest()[:8]}"
        self._output = output / name if output else run_dir / "exports"
        self._keeps, self._tokenizer = keep_exports, tokenizer
        self._done: set[tuple[int, str, str]] = set()
        self._failed: dict[tuple[int, str], str] = {}
        self._waiting: Collection[int] = ()
        self._num_scored = self._seen = 0
        self._has_warned_of_curves = False

    def run(self, no_more: threading.Event) -> None:
        """Score until the run has finished, or ``no_more`` is set (no checkpoint will follow), and nothing is left.

        Raises:
            ValueError: another process scores this run, or no checkpoint at all could be scored.
            RuntimeError: torch's, such as out of memory; or a score could not be put on record.
        """
        lock = lock_file(
            self._run_dir / ".evaluate.lock",
            f"another process scores the checkpoints of {self._run_dir}: wait for it, or end it",
            LOCK_SECONDS,
        )
        try:
            self._follow(no_more)
        finally:
            lock.release()
        if self._failed and not self._num_scored:
            *_, reason = self._failed.values()
            raise ValueError(f"none of {len(self._failed)} checkpoints could be scored: {reason}")

    def _follow(self, no_more: threading.Event) -> None:
        """Look and score; the lock is held."""
        records = read_records(self._run_dir / EVALUATIONS, step=int, task=str, checkpoint=str)
        self._done = {(record["step"], record["checkpoint"], _key(record)) for record in records}
        self._clean_up()
        is_waiting = False
        while True:
            ends = no_more.is_set() or has_finished(self._run_dir)  # before the look: what it saved is there then
            if work := next(iter(self._pending(ends)), None):
                self._score(work)
                is_waiting = False
            elif ends:
                return
            else:
                if not is_waiting:
                    _say(f"waiting for checkpoints of {self._run_dir}")
                is_waiting = True
                time.sleep(LOOK_SECONDS)

    def _pending(self, ends: bool) -> list[Work]:
        """What is to be scored, the oldest first; ``ends``: the newest checkpoint is the last one."""
        found: dict[tuple[int, str], Work] = {}
        config = _checkpoint_config(self._run_dir)
        folders = complete_folders(Path((config and config.dir) or self._run_dir / "checkpoints"))
        last = int(folders[-1].name.removeprefix("step_")) if folders else 0
        for folder in folders:
            step = int(folder.name.removeprefix("step_"))
            if step % self._every == 0 or (ends and step == last):
                with suppress(FileNotFoundError):  # it was rotated away just now
                    digest = file_hash(folder / MANIFEST)[:16]
                    found[step, digest] = Work(step, digest, folder)
        for step, digest, folder in self._exports():
            if folder.name.startswith(".") or step % self._every == 0 or (step, digest) in found:  # begun, or kept
                found[step, digest] = Work(step, digest, folder)
        if config:
            known = {step for step, *_ in self._done} | {step for step, _ in (*found, *self._failed)}
            self._report_lost(config, known, last)
        pending = sorted(work for work in found.values() if self._missing(work) and work[:2] not in self._failed)
        self._waiting = {work.step for work in pending}
        return pending

    def _report_lost(self, config: CheckpointConfig, known: set[int], last: int) -> None:
        """Warn of steps that were to be scored and are not there any more: of the last look, or saved since."""
        starts = [each["step"] for each in read_records(self._run_dir / HISTORY, event=str, step=int)]
        since, self._seen = max(self._seen, min(starts or known, default=0)), max(self._seen, last)
        saved = [s for s in range(0, last, config.interval or last + 1) if s > since and s % self._every == 0]
        if lost := sorted({*self._waiting, *saved} - known):
            more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
            _warn(
                f"no checkpoint is left of step {', '.join(map(str, lost[:_SHOWN]))}{more}: set checkpoint.keep "
                f"({config.keep}) larger, or a larger --every, if they are to be scored"
            )

    def _missing(self, work: Work) -> list[Measure]:
        return [each for each in self._measures if (work.step, work.digest, _key(each.what)) not in self._done]

    def _score(self, work: Work) -> None:
        """Score a checkpoint by what it lacks; one that cannot be scored is a warning."""
        folder = self._output / f"{'' if self._keeps else '.'}step_{work.step:08d}-{work.digest}"
        try:
            if _EXPORT.fullmatch(work.folder.name):
                folder = work.folder
            else:
                with lease(work.folder):
                    export(MegatronCheckpoint(work.folder), folder, tokenizer=self._tokenizer, overwrite=True)
            self._measure(work, folder)
            self._num_scored += 1
        except (ValueError, OSError) as error:
            self._failed[work.step, work.digest] = reason = " ".join(str(error).split())
            _warn(f"step {work.step} is not scored: {reason}")
        gc.collect()  # the model, before the next is loaded
        if folder.name.startswith("."):
            remove(folder)

    def _measure(self, work: Work, folder: Path) -> None:
        model = self._load(folder)
        for measure in self._missing(work):
            started = time.monotonic()
            figures = measure.score(model, folder)
            about = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
            self._record(work, measure, figures, about | {"seconds": round(time.monotonic() - started, 3)})

    def _record(self, work: Work, measure: Measure, figures: Figures, about: Mapping[str, Any]) -> None:
        record = {
            "step": work.step,
            "name": measure.name,
            **measure.what,
            "values": figures.values,
            "samples": figures.samples,
        }
        record |= {"checkpoint": work.digest, "time": time.time(), **figures.more, **about, "versions": _versions()}
        try:
            append_durably(self._run_dir / EVALUATIONS, record)
        except OSError as error:
            raise RuntimeError(f"the scores of step {work.step} are not on record: {error}") from error
        self._done.add((work.step, work.digest, _key(measure.what)))
        problem = log_evaluation(self._run_dir, work.step, record)
        if problem and not self._has_warned_of_curves:
            self._has_warned_of_curves = True
            _warn(f"step {work.step} is on record, but not in the curves: {problem}")
        values = [f"{name} {value:.4f}" for name, value in figures.values.items() if value is not None]
        _say(f"step {work.step} | {measure.name}, {figures.samples} samples on {record['device']}: {', '.join(values)}")

    def _exports(self) -> list[tuple[int, str, Path]]:
        paths = sorted(self._output.iterdir()) if self._output.is_dir() else []
        return [(int(match[1]), match[2], path) for path in paths if (match := _EXPORT.fullmatch(path.name))]

    def _clean_up(self) -> None:
        """Remove what a process that was killed has left, but for the export that it was scoring."""
        for path in self._output.iterdir() if self._output.is_dir() else ():
            if _LEFT.fullmatch(path.name):
                remove(path)
        for step, digest, path in self._exports():
            if path.name.startswith(".") and not self._missing(Work(step, digest, path)):
                remove(path)


def _key(what: Mapping[str, Any]) -> str:
    """What identifies a measure, of itself or of its record."""
    return str([what.get(key) for key in ("task", "shots", "data", "limit", "document_mask")])


def _checkpoint_config(run_dir: Path) -> CheckpointConfig | None:
    """The section ``checkpoint`` of the run's config; None before its start."""
    with suppress(OSError, ValueError):
        return load_record(run_dir / "config.yaml").checkpoint
    return None


def _versions() -> dict[str, str]:
    """Of the packages that figures depend on, as far as they are there."""
    found = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
