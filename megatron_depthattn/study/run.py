"""Run a study's points: finished runs are left alone, cut ones resume, a failure does not stop the others.

A point that branches off a trunk waits for that to be finished.
"""

from __future__ import annotations

import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_depthattn.config import to_dict
from megatron_depthattn.config.load import flatten, load_record
from megatron_depthattn.config.resolve import AUTO
from megatron_depthattn.parallel.launch_env import job_environment
from megatron_depthattn.study.plan import Point
from megatron_depthattn.switches import MODEL_SWITCHES
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.history import METRICS, has_finished
from megatron_depthattn.train.line_files import read_records
from megatron_depthattn.train.stop_signals import EXIT_REQUEUE

ROUGH_RATE = 1.2e10
"""FLOPs a second of a run of under a million weights on a CPU core: docs/studies/cpu."""
START_SECONDS = 10.0
_DECIDES = ("model", "data", "optimizer", "precision")
"""Sections of the config that decide what a run computes; layout, checkpoints and the like do not."""
_DECIDES_ELSEWHERE = (
    *("run.seed", "train.steps", "train.global_batch_size", "train.batch_ramp", "train.eval_batches"),
    "checkpoint.start_optimizer",
)
_IGNORED = (
    *("data.path", "data.held_out", "data.cache", "data.cache_limit", "data.predownload", "data.num_workers"),
    *(f"model.{key}" for key in MODEL_SWITCHES),
)


class Progress(NamedTuple):
    """How far a point is."""

    state: Literal["new", "cut", "finished"]
    step: int


def progress_of(point: Point, output: Path) -> Progress:
    """How far a point is, by its run's record.

    Raises:
        ValueError: its folder holds a run of another config.
    """
    run_dir = output / point.run_dir
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        return Progress("new", 0)
    wanted, found = (flatten(to_dict(load_record(path))) for path in (output / point.config, saved))
    deciding = [key for key in wanted if key.partition(".")[0] in _DECIDES and key not in _IGNORED]
    # What `auto` became on the machine of the run decides how it computes, not what.
    keys = [key for key in (*deciding, *_DECIDES_ELSEWHERE) if wanted[key] not in (found[key], AUTO)]
    differing = [f"{key} is {found[key]}, not {wanted[key]}" for key in keys]
    if differing:
        raise ValueError(
            f"{run_dir} was trained with another config ({'; '.join(differing[:3])}): the study has changed since. "
            "Give another --output, or move that folder away."
        )
    step = max((record["step"] for record in read_records(run_dir / METRICS, step=int)), default=0)
    return Progress("finished" if step >= point.steps and has_finished(run_dir) else "cut", step)


def left_to_run(points: Sequence[Point], output: Path) -> list[Point]:
    """The points that are not finished; of trunks those alone that one of these branches off."""
    left = [point for point in points if progress_of(point, output).state != "finished"]
    spared = {point.trunk for point in points} - {point.trunk for point in left}
    return [point for point in left if point.id not in spared]


def _log(line: str) -> None:
    print(printable(line), flush=True)


def run_points(points: Sequence[Point], output: Path, jobs: int) -> tuple[list[Point], bool]:
    """Train every unfinished point, ``jobs`` at a time, smallest first as planned; print a line at its start and end.

    SIGINT and SIGTERM are passed on: every running point saves and the function returns.

    Returns:
        The points that failed, and whether a signal stopped the rest.
    """
    waiting = left_to_run(points, output)
    for point in points:
        if point not in waiting:
            _log(f"{point.id}: finished already")
    _log(f"{len(points) - len(waiting)} of {len(points)} points are finished, {len(waiting)} to run, {jobs} at a time")
    if waiting:
        _log(describe_cost(waiting, points, output, jobs))
    running: list[tuple[Point, subprocess.Popen[bytes]]] = []
    failed: list[Point] = []
    signals: list[int] = []
    is_stopped = False
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [(number, signal.signal(number, lambda got, _: signals.append(got))) for number in numbers]
    try:
        while running or (waiting and not is_stopped):
            while signals:
                is_stopped, number = True, signals.pop(0)
                for _, process in running:
                    process.send_signal(number)
            while not is_stopped and len(running) < jobs and (ready := _first_ready(waiting, running)):
                waiting.remove(ready)
                running.append((ready, _start(ready, output, jobs)))
            for point, process in [each for each in running if each[1].poll() is not None]:
                running.remove((point, process))
                if not _ended_well(point, process.returncode, is_stopped, output):
                    branches = [each for each in waiting if each.trunk == point.id]
                    for each in branches:
                        _log(f"{each.id}: not started, because {point.id} failed, which it branches off")
                        waiting.remove(each)
                    failed += [point, *branches]
            time.sleep(0.1)
    finally:
        for _, process in running:  # after an error here: each saves and ends
            process.terminate()
        for number, handler in before:
            signal.signal(number, handler)
        for _, process in running:
            process.wait()
    return failed, is_stopped


def _first_ready(waiting: Sequence[Point], running: Sequence[tuple[Point, object]]) -> Point | None:
    """The first point whose trunk, if it has one, is neither still to run nor running."""
    unfinished = {point.id for point in (*waiting, *(point for point, _ in running))}
    return next((point for point in waiting if point.trunk not in unfinished), None)


def describe_cost(waiting: Sequence[Point], points: Sequence[Point], output: Path, jobs: int) -> str:
    """What the waiting points will take, by the planner, else by the steps of this study so far, else roughly."""
    flops = sum(point.flops * point.own_share for point in waiting)
    predicted = [point.steps * point.predicted_step_seconds for point in waiting if point.predicted_step_seconds]
    timed = [
        (point.flops * point.own_share / point.steps, record["step_seconds"])
        for point in points
        for record in read_records(output / point.run_dir / METRICS, step_seconds=float)
    ]
    seconds, source = flops / ROUGH_RATE, "a guess: nothing is timed yet"
    if len(predicted) == len(waiting):
        seconds, source = sum(predicted), "predicted by the planner"
    elif timed:
        trained, spent = map(sum, zip(*timed, strict=True))
        seconds, source = flops * spent / trained, "by the steps so far"
    hours = (seconds + START_SECONDS * len(waiting)) / jobs / 3600
    return f"cost: {flops:.3g} FLOPs, about {hours:.1f} h ({source})"


def _log_of(point: Point, output: Path) -> Path:
    return output / "logs" / f"{point.id}.log"


def _start(point: Point, output: Path, jobs: int) -> subprocess.Popen[bytes]:
    """The process that trains the point; a group of its own, which no terminal's Ctrl-C reaches."""
    step, path = progress_of(point, output).step, _log_of(point, output)
    _log(f"{point.id}: {f'resumes at step {step}' if step else f'starts; of step {point.steps}'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = training_command(output / point.config, point.world)
    with path.open("ab") as file:
        return subprocess.Popen(
            command, env=job_environment(jobs), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _ended_well(point: Point, code: int, is_stopped: bool, output: Path) -> bool:
    """Whether the point is finished or was stopped by a signal; says so, or why it failed."""
    progress, path = progress_of(point, output), _log_of(point, output)
    if progress.state == "finished":  # whatever a signal did to the process after that
        records = list(read_records(output / point.run_dir / METRICS))
        loss, seconds = records[-1]["eval_loss"] or math.nan, sum(record["step_seconds"] for record in records)
        _log(f"{point.id}: finished, held-out loss {loss:.4f}, {seconds:.0f} s in steps")
        return True
    is_cut = code == EXIT_REQUEUE or (is_stopped and code < 0)  # below 0: so early that it had nothing to save
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")
    reason = "stopped by a signal" if is_cut else f"ended with code {code}: {last}"
    _log(f"{point.id}: at step {progress.step} of {point.steps}, {reason} (log: {path})")
    return is_cut


def training_command(config: Path, world: int) -> list[str]:
    """What trains the config in ``world`` processes of this machine."""
    train = ["-m", "megatron_depthattn.train", str(config)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    torchrun += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT"]
    return [sys.executable, *(torchrun if world > 1 else []), *train]


def write_array(points: Sequence[Point], output: Path) -> tuple[Path, Path]:
    """Write a task of a Slurm array for every point; the tasks' folders are links to the points' own.

    Returns:
        The file of tasks and the folder to submit as ``run.dir``.
    """
    job = output / "jobs" / f"{len(list((output / 'jobs').glob('*.tasks'))) + 1}"
    job.mkdir(parents=True, exist_ok=True)
    for number, point in enumerate(points):
        (output / point.run_dir).mkdir(parents=True, exist_ok=True)
        (job / f"task_{number}").symlink_to(Path("../..") / point.run_dir)
    tasks = job.with_suffix(".tasks")
    tasks.write_text("".join(f"{shlex.quote(str(output / point.config))}\n" for point in points), encoding="utf-8")
    return tasks, job
