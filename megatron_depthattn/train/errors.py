"""Errors that end a run, and the record that one leaves for whoever started the process.

A launcher gives each process a file (torchrun's TORCHELASTIC_ERROR_FILE) and reads from the first record of all ranks
what ended the run. The record is torchrun's own form, so that plain torchrun shows it too, with keys of ours beside it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_depthattn.parallel.launch_env import LaunchEnvironment


class RunError(RuntimeError):
    """The end of a run that one line explains; a traceback would add nothing."""

    retry = True
    """Whether the same command, started again, may get further."""


class OtherRankError(ValueError):
    """Another rank has failed, and says why."""


_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
"""What gloo and torch's store say to a rank whose neighbour has gone."""


def is_secondary_failure(error: BaseException) -> bool:
    """Whether another rank's failure is the news."""
    return isinstance(error, OtherRankError) or any(text in str(error) for text in _LOST_PEER)


def write_error_record(environment: LaunchEnvironment, error: BaseException, text: str) -> None:
    """Leave ``text``, what the user is to see of ``error``, where the launcher looks; nothing without a launcher."""
    if environment.error_file is None:
        return
    record = {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))},
        },
        "time": time.time(),
        "host": platform.node(),
        "rank": environment.rank,
        "notes": getattr(error, "__notes__", []),
        # Whether starting again makes sense: the class's own word; else no for mistakes, yes for the rest.
        "retry": bool(getattr(error, "retry", not isinstance(error, ValueError | ImportError))),
        "consequence": is_secondary_failure(error),
    }
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        Path(environment.error_file).write_text(json.dumps(record), encoding="utf-8")


def leave_at_once(code: int) -> NoReturn:
    """End this process and its children without exit handlers: those may wait for ranks that wait for this one."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
