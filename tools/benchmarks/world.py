"""Workers of a benchmark in a world of several processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_world(module: str, work: Any, processes: int) -> Any:
    """What ``python -m module WORK.json FOUND.json``, started by torchrun, makes of ``work``.

    Raises:
        ValueError: the processes failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, output = Path(folder) / "work.json", Path(folder) / "found.json"
        given.write_text(json.dumps(work))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*torchrun, "-m", module, str(given), str(output)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(f"the world of {processes} processes failed: {done.stderr[-2000:]}")
        return json.loads(output.read_text())
