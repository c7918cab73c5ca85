"""Start the world in which this machine is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_depthattn.config import RunConfig, to_dict

ROOT = Path(__file__).resolve().parents[1]


def calibrate_world(config: RunConfig, world_size: int, output: Path) -> None:
    """Measure with so many processes on this machine (gloo, or NCCL where there are GPUs) and write a machine file.

    Raises:
        ValueError: the processes failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.json"
        settings.write_text(json.dumps(to_dict(config)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        done = subprocess.run(
            [*torchrun, "-m", "megatron_depthattn.estimate.calibrate", str(settings), str(output.absolute())],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | dict(os.environ),
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise ValueError(f"the {world_size} processes that measure failed: {done.stderr[-1500:]}")
