"""Run the product's commands as a user does, with a time limit, and leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(command: Sequence[str | Path], *, seconds: float, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run to the end; on time-out ask the process to stop (torchrun then stops its workers) and raise."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            output, errors = process.communicate(timeout=45)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
        raise AssertionError(f"{command} took over {seconds} s\n{output[-2000:]}\n{errors[-2000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def python(*arguments: str | Path, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """This interpreter with the given arguments."""
    return run([sys.executable, *arguments], seconds=seconds)


def torchrun(num_processes: int, *arguments: str | Path, seconds: float = 180) -> subprocess.CompletedProcess[str]:
    """``torchrun --standalone`` of this interpreter; ``arguments`` begin with a script or ``-m module``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return python(*launcher, *arguments, seconds=seconds)


def must_succeed(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The result itself, or an assertion with what the command said."""
    assert result.returncode == 0, f"{result.args}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def wait_until(condition: Callable[[], bool], seconds: float, *, poll: float = 0.05) -> bool:
    """Whether ``condition`` came true within ``seconds``."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(poll)
    return False
