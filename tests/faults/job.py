"""A training job under torchrun, as a supervisor sees it: its processes, its run directory, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_depthattn.train.step_folders import complete_folders, find_damage
from tests.e2e.commands import REPOSITORY

END_SECONDS = 150.0
"""How long a stricken job may take to end: a hang is noticed, a stopped rank waits for torchrun's SIGKILL."""


class Job:
    """``torchrun -m megatron_depthattn.train`` on this machine.

    Args:
        command: the arguments of ``python -m megatron_depthattn.train``.
        num_processes: ranks.
        output: file for stdout and stderr, appended.
        earlier_starts: how often the run was started before.
    """

    def __init__(self, command: Sequence[str], num_processes: int, output: Path, earlier_starts: int) -> None:
        self.earlier_starts = earlier_starts
        self._log = output.open("ab")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "megatron_depthattn.train", *command],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> list[psutil.Process]:
        """The training processes by rank; shorter while the job starts or ends."""
        found = {}
        for process in self._children(self.process.pid):
            try:
                found[int(process.environ()["RANK"])] = process
            except (psutil.Error, KeyError):
                continue
        return [found[rank] for rank in sorted(found)]

    def loader_workers(self) -> list[psutil.Process]:
        """The processes that read data for the ranks."""
        return [worker for rank in self.ranks() for worker in self._children(rank.pid)]

    def _children(self, pid: int) -> list[psutil.Process]:
        try:
            children = psutil.Process(pid).children()
        except psutil.Error:
            return []
        self._seen |= {child.pid: child for child in children}
        return children

    def wait(self, seconds: float = END_SECONDS) -> int:
        """The exit code, once every process that was seen is gone.

        Raises:
            AssertionError: the job, or a process that it left behind, is still there after ``seconds``.
        """
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end within {seconds} s") from None
        _, left = psutil.wait_procs(self._seen.values(), timeout=20)
        names = [" ".join(process.cmdline()[:6]) for process in left if process.is_running()]
        self.kill()
        assert not names, f"processes outlived their job: {names}"
        return code

    def kill(self) -> None:
        """SIGKILL to everything that belongs to the job."""
        self.ranks(), self.loader_workers()
        for process in [psutil.Process(self.process.pid)] if self.is_running else []:
            process.send_signal(signal.SIGKILL)
        for process in self._seen.values():
            if process.is_running():  # psutil compares start times: never another process with the same pid
                process.kill()
        self.process.wait()


class RunState:
    """What a run directory says."""

    def __init__(self, run_dir: Path, checkpoints: Path) -> None:
        self.run_dir, self.checkpoints = run_dir, checkpoints

    def records(self) -> list[dict[str, Any]]:
        return _json_lines(self.run_dir / "metrics.jsonl")

    def starts(self) -> list[int]:
        """The step from which each start of training went on."""
        return [record["step"] for record in _json_lines(self.run_dir / "history.jsonl") if record["event"] == "start"]

    def openings(self) -> int:
        """How many starts have got as far as to train: the record is that of the start from there on."""
        return self.log().count(" start: ")

    def last_step(self) -> int:
        records = self.records()
        return records[-1]["step"] if records else 0

    def newest_good_step(self) -> int:
        """The step of the newest checkpoint whose every byte is right; 0 without one."""
        good = [folder for folder in complete_folders(self.checkpoints) if not find_damage(folder)]
        return int(good[-1].name.removeprefix("step_")) if good else 0

    def is_saving(self) -> bool:
        return any(self.checkpoints.glob(".step_*.part"))

    def log(self) -> str:
        path = self.run_dir / "log.txt"
        return path.read_text() if path.exists() else ""


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
