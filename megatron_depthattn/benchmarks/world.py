"""Worlds of several processes on this machine, started by torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_torchrun(module: str, arguments: Sequence[str], processes: int) -> None:
    """``python -m module`` in so many processes, with library warnings silenced.

    Raises:
        ValueError: the processes failed.
    """
    quiet = ["env", "OMP_NUM_THREADS=1", "PYTHONWARNINGS=ignore", sys.executable]
    torchrun = [*quiet, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*torchrun, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{processes} processes of {module} {' '.join(arguments)} failed: {done.stderr[-2000:]}")


def run_world(module: str, work: Any, processes: int) -> Any:
    """What ``python -m module WORK.json FOUND.json`` makes of ``work``; raises as `run_torchrun`."""
    with tempfile.TemporaryDirectory() as folder:
        given, output = Path(folder) / "work.json", Path(folder) / "found.json"
        given.write_text(json.dumps(work))
        run_torchrun(module, [str(given), str(output)], processes)
        return json.loads(output.read_text())
