"""What the launch tests share: a run of two ranks that takes some seconds, its record, processes of a user."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.commands import REPOSITORY, wait_until
from tests.e2e.small_run import MODEL

SAME = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "skipped_steps")
STEPS = 120
"""Of the run: long enough to be interrupted at some step, however fast the machine."""
FULL = pytest.mark.skipif(os.environ.get("DEPTHATTN_LAUNCH") != "full", reason="takes minutes: make launch-full")


def write_config(path: Path, corpus: Path) -> Path:
    """Two data-parallel ranks, a checkpoint every 20 steps; run.dir is left to the test."""
    settings = {
        "model": MODEL,
        "data": {"path": str(corpus), "sequence_length": 32},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "log_interval": 20},
        "optimizer": {"lr": 5.0e-3},
        "checkpoint": {"interval": 20},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def hostile_run_dir(folder: Path) -> tuple[Path, Path]:
    """A run.dir that a shell or Slurm would obey, which leaves ``folder/obeyed`` then, and the overlay that sets it."""
    order = f"touch {folder}/obeyed"
    run_dir = folder / f"run #1 %j $({order}) `{order}` \"; {order}; '"
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"run": {"dir": str(run_dir)}}))
    return run_dir, overlay


def environment(**variables: str) -> dict[str, str]:
    """A user's environment, without what a launcher or a scheduler around the tests may have set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NPROC_PER_NODE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return clean | {"PYTHON": sys.executable} | variables


def start(*command: str | Path, output: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A process from the repository's root; stdout and stderr go to ``output``."""
    words, given = [str(word) for word in command], environment(**variables)
    with output.open("ab") as file:
        return subprocess.Popen(words, cwd=REPOSITORY, env=given, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def run(*command: str | Path, seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    where = {"cwd": REPOSITORY, "env": environment(**variables), "timeout": seconds}
    return subprocess.run([str(word) for word in command], **where, capture_output=True, text=True, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and all that it has started."""
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            if child.is_running():
                child.kill()
    process.wait(30)


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = run_dir / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trajectory(run_dir: Path) -> list[tuple]:
    """Every number of every step that the layout and interruptions must not change."""
    return [tuple(record[name] for name in SAME) for record in records(run_dir)]


def history(run_dir: Path) -> list[dict]:
    path = run_dir / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def must_reach(run_dir: Path, step: int, log: Path, *, seconds: float = 120) -> None:
    """Wait until a step is on record."""
    reached = wait_until(lambda: len(records(run_dir)) >= step, seconds)
    assert reached, f"step {step} not reached in {seconds} s: {log.read_text()[-3000:] if log.exists() else 'no log'}"
