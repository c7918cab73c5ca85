"""The unfinished points of a study as the tasks of one Slurm array, for launch/submit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_depthattn.study.plan import Point
from megatron_depthattn.study.run import progress_of


def write_array(points: Sequence[Point], output: Path) -> tuple[Path | None, Path]:
    """Write a task for every unfinished point; the tasks' folders are links to the points' own.

    Returns:
        The file of tasks (None if every point is finished) and the folder to submit as ``run.dir``.

    Raises:
        ValueError: a point's folder holds a run of another config.
    """
    jobs = output / "jobs"
    job = jobs / f"{len(list(jobs.glob('*.tasks'))) + 1}"
    waiting = [point for point in points if progress_of(point, output).state != "finished"]
    if not waiting:
        return None, job
    job.mkdir(parents=True, exist_ok=True)
    for number, point in enumerate(waiting):
        run_dir = output / point.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        (job / f"task_{number}").symlink_to(Path("../..") / point.run_dir)
    tasks = job.with_suffix(".tasks")
    tasks.write_text("".join(f"{shlex.quote(str(output / point.config))}\n" for point in waiting), encoding="utf-8")
    return tasks, job
