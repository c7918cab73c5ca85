"""What a run reports: log.txt and the console for people, metrics.jsonl as the record, curves, samples."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.config import WandbConfig
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.curves import TensorBoard, WandbMirror, is_mirrored
from megatron_depthattn.train.history import METRICS
from megatron_depthattn.train.line_files import AppendFile, drop_steps_after, held_out_losses, read_records
from megatron_depthattn.train.start import broadcast_from_rank0
from megatron_depthattn.train.step import SAMPLE_IDS, Microbatch


class Reporter:
    """Writes a run's record; on ranks other than 0 every method does nothing.

    Args:
        run_dir: the run's folder.
        log_interval: steps between lines on the console.
        first_step: steps already done; what the files say about later ones (of a run that was cut off) is dropped.
        last_step: the step at which the run ends.
        samples: consumed before, and at that end, for the ETA.
        wandb: whether and where Weights & Biases gets the curves.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        log_interval: int,
        first_step: int,
        last_step: int,
        samples: tuple[int, int],
        wandb: WandbConfig = WandbConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.is_writer, self.last_step, self.log_interval = dist.get_rank() == 0, last_step, log_interval
        if not self.is_writer:
            return
        self._path = run_dir / METRICS
        drop_steps_after(self._path, first_step)
        self._metrics, self._log = AppendFile(self._path), AppendFile(run_dir / "log.txt")
        self._curves: list[TensorBoard | WandbMirror] = [
            TensorBoard(run_dir / "tensorboard", purge_step=first_step + 1),
            *([WandbMirror(run_dir, self)] if is_mirrored(wandb) else []),
        ]
        self._is_waiting = False
        self._started, (self._first_sample, self._last_sample) = time.monotonic(), samples

    def lines(self, texts: Iterable[str]) -> None:
        """Lines for people, on the console and in log.txt."""
        if not self.is_writer:
            return
        for text in texts:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            _print(text, sys.stdout)

    def warn(self, texts: Iterable[str]) -> None:
        """Lines that nobody should miss: on stderr as well."""
        texts = list(texts)
        self.lines(texts)
        for text in texts if self.is_writer else ():
            _print(text, sys.stderr)

    def step(self, metrics: dict[str, Any]) -> None:
        """One step's numbers; ``None`` values are kept in the record and left out of the curves."""
        if not self.is_writer:
            return
        step = metrics["step"]
        self._metrics.write(json.dumps(metrics) + "\n")
        if self._metrics.problem and not self._is_waiting:
            self.warn([f"{METRICS} cannot be written: {self._metrics.problem}; its lines wait in memory"])
        self._is_waiting = self._metrics.problem is not None
        self._draw(metrics)
        if step % self.log_interval == 0 or step == self.last_step or held_out_losses(metrics):
            self.lines([self._text(metrics)])

    def lacks(self, step: int, names: Iterable[str]) -> bool:
        """Whether the record has this step without the loss of one of these held-out splits; where it is written."""
        records = (record for record in read_records(self._path, step=int) if record["step"] == step)
        return any(not set(names) <= held_out_losses(record).keys() for record in records)

    def add_evaluation(self, step: int, found: dict[str, Any]) -> None:
        """Complete the newest step of the record, which an earlier start wrote; not if nothing was found."""
        if not self.is_writer or not found:
            return
        *_, newest = (record for record in read_records(self._path, step=int) if record["step"] == step)
        self._metrics.close()
        with contextlib.suppress(OSError):
            drop_steps_after(self._path, step - 1, newest | found)
        self._metrics = AppendFile(self._path)
        self._draw({"step": step, **found})
        self.lines([f"step {step}/{self.last_step} | {_held_out_text(found)}"])

    def force_to_disk(self) -> None:
        """Before a checkpoint: the record must not end before it, whatever happens then."""
        if self.is_writer:
            self._metrics.force_to_disk()

    def close(self) -> None:
        """Flush and close everything."""
        if self.is_writer:
            self._metrics.close()
            for curves in self._curves:
                curves.close()
            self._log.close()
            if self._metrics.problem:
                _print(f"the last lines of {METRICS} are lost: {self._metrics.problem}", sys.stderr)

    def _draw(self, metrics: dict[str, Any]) -> None:
        for curves in self._curves:
            curves.draw(metrics)

    def _text(self, metrics: dict[str, Any]) -> str:
        step = metrics["step"]
        seconds_per_sample = (time.monotonic() - self._started) / max(1, metrics["samples"] - self._first_sample)
        remaining = round(seconds_per_sample * (self._last_sample - metrics["samples"]))
        held_out = f"{text} | " if (text := _held_out_text(metrics)) else ""
        return (
            f"step {step}/{self.last_step} | loss {_number(metrics['loss'], '.4f')} | {held_out}"
            f"grad norm {_number(metrics['grad_norm'], '.3f')} | lr {metrics['lr']:.2e} | "
            f"{metrics['tokens_per_second']:,.0f} tokens/s | eta {timedelta(seconds=remaining)}"
        )


class SampleLog:
    """Which samples this rank read in every step: ``<run.dir>/samples/rank_<NNNNN>.jsonl``, one object a step.

    An object holds the step, the data-parallel rank, and the sample ids of every microbatch; the ids count through the
    streams. Of several streams it also holds how many samples of each the run has read. The ranks of one replica write
    equal lines. Without ``data.log_samples`` nothing is written. Construct it on all ranks.

    Args:
        run_dir: the run's folder.
        is_on: ``data.log_samples``.
        first_step: steps already done; what the files of any rank say about later ones is dropped.
    """

    def __init__(self, run_dir: Path, *, is_on: bool, first_step: int) -> None:
        folder = run_dir / "samples"
        self._path = folder / f"rank_{dist.get_rank():05d}.jsonl" if is_on else None
        self._file: AppendFile | None = None

        def prepare() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("rank_*.jsonl"):
                drop_steps_after(file, first_step)

        if is_on:
            broadcast_from_rank0(prepare)  # for all ranks: the run may have had more of them before

    def write(self, step: int, batches: list[Microbatch], stream_samples: dict[str, int] | None = None) -> None:
        """Add a step; a rank that read nothing writes nothing."""
        if self._path is None or SAMPLE_IDS not in batches[0]:
            return
        self._file = self._file or AppendFile(self._path)
        line = {
            "step": step,
            "data_parallel_rank": parallel_state.get_data_parallel_rank(),
            SAMPLE_IDS: [batch[SAMPLE_IDS].tolist() for batch in batches],
            **({"stream_samples": stream_samples} if stream_samples else {}),
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _print(text: str, stream: TextIO) -> None:
    with contextlib.suppress(OSError):
        print(printable(text), file=stream, flush=True)


def _held_out_text(record: dict[str, Any]) -> str:
    return ", ".join(
        f"held-out {name}{' ' if name else ''}{loss:.4f}" for name, loss in held_out_losses(record).items()
    )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
