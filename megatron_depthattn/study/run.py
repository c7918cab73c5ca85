"""Run a study's points on this machine: finished runs are left alone, cut ones resume, a failure does not stop the
others."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_depthattn.config import RunConfig, load_config, to_dict
from megatron_depthattn.config.load import flatten
from megatron_depthattn.config.resolve import AUTO
from megatron_depthattn.study.plan import Point
from megatron_depthattn.switches import MODEL_SWITCHES
from megatron_depthattn.train.history import HISTORY, METRICS
from megatron_depthattn.train.line_files import read_records
from megatron_depthattn.train.stop_signals import EXIT_REQUEUE

ROUGH_RATE = 1.2e10
"""FLOPs a second of a run of under a million weights on a CPU core: docs/studies/cpu."""
START_SECONDS = 10.0
State = Literal["new", "cut", "finished"]
_DECIDES = ("model", "data", "optimizer", "precision")
"""Sections of the config that decide what a run computes; layout, checkpoints and the like do not."""
_DECIDES_ELSEWHERE = ("run.seed", "train.steps", "train.global_batch_size", "train.eval_batches")


class Progress(NamedTuple):
    """How far a point is."""

    state: State
    step: int


def progress_of(point: Point, output: Path) -> Progress:
    """How far a point is, by its run's record.

    Raises:
        ValueError: its folder holds a run of another config.
    """
    run_dir = output / point.run_dir
    records = list(read_records(run_dir / METRICS, step=int))
    saved = run_dir / "config.yaml"
    if saved.is_file():
        differing = _differences(load_config(output / point.config), load_config(saved))
        if differing:
            raise ValueError(
                f"{run_dir} was trained with another config ({'; '.join(differing[:3])}): the study has changed since. "
                "Give another --output, or move that folder away."
            )
    step = records[-1]["step"] if records else 0
    outcomes = [
        record.get("outcome") for record in read_records(run_dir / HISTORY, event=str) if record["event"] == "end"
    ]
    if step >= point.steps and outcomes[-1:] == ["finished"]:
        return Progress("finished", step)
    return Progress("cut" if saved.is_file() else "new", step)


def run_points(
    points: Sequence[Point], output: Path, *, jobs: int, log: Callable[[str], None]
) -> tuple[list[Point], bool]:
    """Train every unfinished point, ``jobs`` at a time, smallest first as planned.

    SIGINT and SIGTERM are passed on once: every running point saves and the function returns.

    Args:
        log: gets a line at the start and at the end of every point.

    Returns:
        The points that failed, and whether a signal stopped the rest.
    """
    runner = _Runner(output, log)
    waiting = []
    for point in points:
        if progress_of(point, output).state == "finished":
            log(f"{point.id}: finished already")
        else:
            waiting.append(point)
    log(f"{len(points) - len(waiting)} of {len(points)} points are finished, {len(waiting)} to run, {jobs} at a time")
    if waiting:
        log(describe_cost(waiting, points, output, jobs))
    with runner.passing_signals_on(), ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(runner.run, waiting))
    failed = [point for point, code in zip(waiting, codes, strict=True) if code not in (0, EXIT_REQUEUE, None)]
    return failed, runner.is_stopped


def describe_cost(waiting: Sequence[Point], points: Sequence[Point], output: Path, jobs: int) -> str:
    """What the waiting points will take, by the planner, else by the steps of this study so far, else roughly."""
    flops = sum(point.flops for point in waiting)
    if all(point.predicted_step_seconds for point in waiting):
        seconds, source = sum(p.steps * (p.predicted_step_seconds or 0.0) for p in waiting), "predicted by the planner"
    else:
        spent = trained = 0.0
        for point in points:
            records = list(read_records(output / point.run_dir / METRICS, step_seconds=float))
            spent += sum(record["step_seconds"] for record in records)
            trained += point.flops * len(records) / point.steps
        rate, source = (
            (trained / spent, "by the steps so far") if spent else (ROUGH_RATE, "a guess: nothing is timed yet")
        )
        seconds = flops / rate
    seconds += START_SECONDS * len(waiting)
    return f"cost: {flops:.3g} FLOPs, about {seconds / jobs / 3600:.1f} h ({source})"


class _Runner:
    """The processes of the points that run now."""

    def __init__(self, output: Path, log: Callable[[str], None]) -> None:
        self._output, self._log = output, log
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self.is_stopped = False

    def run(self, point: Point) -> int | None:
        """The exit code of the point's training; None if it was not started."""
        log = self._output / "logs" / f"{point.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        before = progress_of(point, self._output)
        with log.open("ab") as file:
            with self._lock:
                if self.is_stopped:
                    return None
                self._log(
                    f"{point.id}: {'resumes at' if before.step else 'starts; of'} step {before.step or point.steps}"
                )
                command = training_command(self._output / point.config, point.world)
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
                self._running.append(process)
            code = process.wait()
        with self._lock:
            self._running.remove(process)
        after = progress_of(point, self._output)
        if after.state == "finished":  # whatever a signal did to the process after that
            self._log(f"{point.id}: {describe_end(point, self._output)}")
            return 0
        reason = f"ended with code {code}: {_last_line(log)}"
        if code == EXIT_REQUEUE or (self.is_stopped and code < 0):  # below 0: so early that it had nothing to save
            reason = "stopped by a signal"
        self._log(f"{point.id}: at step {after.step} of {point.steps}, {reason} (log: {log})")
        return code or 1

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """SIGINT and SIGTERM reach the running processes; a thread's wait is not disturbed."""

        def stop(number: int, _: object) -> None:  # in the main thread, which only waits and holds no lock
            self.is_stopped = True
            for process in list(self._running):
                process.send_signal(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def training_command(config: Path, world: int) -> list[str]:
    """What trains the config in ``world`` processes of this machine."""
    train = ["-m", "megatron_depthattn.train", str(config)]
    if world == 1:
        return [sys.executable, *train]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return [sys.executable, *torchrun, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT", *train]


def describe_end(point: Point, output: Path) -> str:
    """Held-out loss and seconds of a finished point."""
    records = list(read_records(output / point.run_dir / METRICS))
    seconds = sum(record["step_seconds"] for record in records)
    return f"finished, held-out loss {records[-1]['eval_loss']:.4f}, {seconds:.0f} s in steps"


def _differences(wanted: RunConfig, found: RunConfig) -> list[str]:
    one, other = (_deciding(config) for config in (wanted, found))
    # What `auto` became on the machine of the run decides how it computes, not what.
    return [f"{key} is {other[key]}, not {one[key]}" for key in one if one[key] not in (other[key], AUTO)]


def _deciding(config: RunConfig) -> dict[str, Any]:
    keys = flatten(to_dict(config))
    ignored = {"data.path", "data.cache", "data.num_workers", *(f"model.{key}" for key in MODEL_SWITCHES)}
    decides = {key for key in keys if key.partition(".")[0] in _DECIDES} | set(_DECIDES_ELSEWHERE)
    return {key: value for key, value in keys.items() if key in decides - ignored}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"
