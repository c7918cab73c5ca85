"""Commands in forks of one process that has imported what they need: as torchrun starts them, without their imports.

`python -m tests.forked IMPORTS` is that process. Each line of its input asks for one world of processes, as JSON; it
answers with their pids and then, for each that ends, with its rank and exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import math
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PRELOADED = ("megatron_depthattn.train.loop", "tests.parallel.worker")
"""What is imported once, in this order; with ``:name`` of a function in it, which is called then."""
GRACE_SECONDS = 30
"""What a process has to end after another one failed."""


class World:
    """Processes of one command that are running."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers
        self.pids: list[int] = json.loads(answers.readline())
        self.codes: dict[int, int] = {}
        """Exit codes by rank, negative: of a signal. As far as `wait` has seen them."""

    def wait(self, seconds: float, rank: int | None = None) -> bool:
        """Whether all ranks, or this one, have ended within so long."""
        until = time.monotonic() + seconds
        while len(self.codes) < len(self.pids) and rank not in self.codes:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                return False
            ended, code = json.loads(self._answers.readline())
            self.codes[ended] = code
        return True

    def stop(self) -> None:
        """End what still runs: by SIGTERM, then by SIGKILL."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            _kill((pid for rank, pid in enumerate(self.pids) if rank not in self.codes), kind)
            self.wait(GRACE_SECONDS)


@functools.cache
def _server(root: Path, preloaded: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """The process that forks, one for all tests of this process; it ends when its input is closed."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.forked", *preloaded],
        cwd=root,  # comes first on the path
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # a line that is read leaves the next one to `select`
        preexec_fn=_end_with_parent,
    )


_worlds: list[World] = []


def start(
    num_processes: int,
    module: str,
    *arguments: str | Path,
    logs: Sequence[Path],
    end_together: bool = True,
    root: Path = REPOSITORY,
    preloaded: tuple[str, ...] = PRELOADED,
) -> World:
    """``python -m module arguments`` as ranks of a world; 0: one process and no launcher. One world at a time.

    Args:
        logs: files of stdout and stderr, which ``{rank}`` in them makes each rank's own.
        end_together: whether one failure ends the others.
        root: of the package.
        preloaded: see `PRELOADED`.
    """
    while _worlds:
        _worlds.pop().stop()  # a test may have been interrupted
    server = _server(root, preloaded)
    assert server.stdin is not None
    request = {"module": module, "arguments": [*map(str, arguments)], "ranks": num_processes, "logs": [*map(str, logs)]}
    server.stdin.write(f"{json.dumps(request | {'end_together': end_together})}\n".encode())
    _worlds.append(World(server.stdout))
    return _worlds[-1]


def forked(
    num_processes: int, module: str, *arguments: str | Path, seconds: float = 180, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`start`, with its ``options``, to the end; the exit code is 0 or that of the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, name) for name in ("out", "err")]
        world = start(num_processes, module, *arguments, logs=logs, **options)
        in_time = world.wait(seconds)
        world.stop()
        output, errors = (path.read_text(errors="replace") for path in logs)
    assert in_time, f"{module} {arguments} took over {seconds} s\n{output[-2000:]}\n{errors[-2000:]}"
    return subprocess.CompletedProcess(
        (module, *arguments), next(filter(None, world.codes.values()), 0), output, errors
    )


def _end_with_parent() -> None:
    """In a child: be killed when its parent is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _kill(pids: Iterable[int], kind: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kind)


# ---- in the process that forks


def main() -> None:
    for wanted in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # tests of Hugging Face's side alone run without Megatron
            module, _, function = wanted.partition(":")
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
    for line in sys.stdin:
        request = json.loads(line)
        if request["module"].startswith("tests."):
            importlib.import_module(request["module"])
        end_together = request.pop("end_together")
        gc.freeze()  # collections need not look at, and copy, what a process was forked with
        pids = _fork(**request)
        print(json.dumps(pids), flush=True)
        _wait(pids, end_together)


def _fork(module: str, arguments: list[str], ranks: int, logs: list[str]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(max(1, ranks)):
        if pid := os.fork():
            pids.append(pid)
            continue
        _end_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, path in enumerate(logs, start=1):
            file = path.replace("{rank}", str(rank))
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        if ranks:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()
    return pids


def _wait(pids: list[int], end_together: bool) -> None:
    """Until all have ended; prints their ranks and exit codes."""
    running, limit = dict(zip(pids, range(len(pids)), strict=True)), math.inf
    while running:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps([running.pop(ended), code]), flush=True)
            if code and end_together and limit == math.inf:
                limit = time.monotonic() + GRACE_SECONDS
                _kill(running, signal.SIGTERM)
            continue
        if time.monotonic() > limit:
            _kill(running, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
