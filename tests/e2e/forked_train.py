"""Training commands in forks of one process that has imported the loop once: arguments are a folder and JSON lists.

Run as a script: each command's output, errors and exit code go to <folder>/<number>.{out,err,code}.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.commands import must_succeed, python


def train_forked(folder: Path, commands: Sequence[Sequence[str | Path]]) -> list[subprocess.CompletedProcess[str]]:
    """What ``python -m megatron_depthattn.train`` does with each list of arguments, one after another."""
    listed = json.dumps([[str(word) for word in command] for command in commands])
    must_succeed(
        python("-W", "ignore", "-m", "tests.e2e.forked_train", folder, listed, seconds=60 + 20 * len(commands))
    )
    return [
        subprocess.CompletedProcess(
            command,
            int((folder / f"{number}.code").read_text()),
            (folder / f"{number}.out").read_text(),
            (folder / f"{number}.err").read_text(),
        )
        for number, command in enumerate(commands)
    ]


def main() -> None:
    import megatron_depthattn.train.loop  # noqa: F401

    folder = Path(sys.argv[1])
    for number, arguments in enumerate(json.loads(sys.argv[2])):
        child = os.fork()
        if child == 0:
            for descriptor, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{number}.{end}", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
            sys.argv = ["train", *arguments]
            runpy.run_module("megatron_depthattn.train", run_name="__main__", alter_sys=True)  # ends the process
        _, status = os.waitpid(child, 0)
        (folder / f"{number}.code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
