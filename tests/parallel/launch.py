"""Work off jobs in worlds of processes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.forked import PRELOADED, start

STALL_SECONDS = 240
"""A world that finishes no job for this long is stopped. A job takes seconds; the machine may be busy."""
MAX_WORLDS = 4
"""Worlds started for one list of jobs before the rest are given up: every failing job costs one."""


WORKER = "tests.parallel.worker"


def run_jobs(
    folder: Path, world_size: int, jobs: Sequence[Any], worker: str = WORKER, preloaded: tuple[str, ...] = PRELOADED
) -> None:
    """Leave a NAME.json or a NAME.error in ``folder`` for every job; jobs are dataclasses with a ``name``."""
    for attempt in range(MAX_WORLDS):
        todo = [job for job in jobs if not _is_done(folder, job)]
        if not todo:
            return
        log = folder / f"world{world_size}-{jobs[0].name}-{attempt}.log"
        ending = _run_world(folder, world_size, todo, log, worker, preloaded)
        tail = f"the world of {world_size} {ending}\n{log}:\n{log.read_text(errors='replace')[-4000:]}"
        left = [job for job in todo if not _is_done(folder, job)]
        if left and not any((folder / f"{job.name}.error").exists() for job in todo):
            _fail(folder, left[0], tail)  # the one that was running
    for job in jobs:
        if not _is_done(folder, job):
            _fail(folder, job, f"not run: {MAX_WORLDS} worlds were stopped by the jobs before it")


def _is_done(folder: Path, job: Any) -> bool:
    return any((folder / f"{job.name}.{kind}").exists() for kind in ("json", "error"))


def _fail(folder: Path, job: Any, reason: str) -> None:
    (folder / f"{job.name}.error").write_text(reason)


def _run_world(
    folder: Path, world_size: int, jobs: Sequence[Any], log: Path, worker: str, preloaded: tuple[str, ...]
) -> str:
    """Run one world to its end; how it ended, in words."""
    listing = log.with_suffix(".jobs.json")
    listing.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    world = start(world_size, worker, folder, listing, logs=(log, log), preloaded=preloaded)
    done, since = 0, time.monotonic()
    while not world.wait(0.2):
        now_done = sum(_is_done(folder, job) for job in jobs)
        if now_done > done:
            done, since = now_done, time.monotonic()
        if time.monotonic() - since > STALL_SECONDS:
            world.stop()
            return f"was stopped: no job finished for {STALL_SECONDS} s"
    return f"ended with exit codes {world.codes}"
