"""Training commands in forks of one process that has imported the loop once.

Run as a script with a folder: each line of the input is a JSON list of arguments; the command's output and errors go to
<folder>/out and <folder>/err, its exit code to the output.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.commands import REPOSITORY

SECONDS = 120


class ForkedTrain:
    """``python -m megatron_depthattn.train`` as a function of its arguments, without the seconds of its imports."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.e2e.forked_train", str(folder)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps([str(argument) for argument in arguments]), file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        output, errors = ((self._folder / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(arguments, code, output, errors)

    def close(self) -> None:
        self._server.communicate()


def main(folder: Path) -> None:
    import megatron_depthattn.train.loop  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            for descriptor, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
            sys.argv = ["train", *json.loads(line)]
            runpy.run_module("megatron_depthattn.train", run_name="__main__", alter_sys=True)  # ends the process
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
