"""Worlds that are measured: this process alone, or several on this machine, started by torchrun.

`python -m megatron_depthattn.benchmarks.world VERB PARALLEL WORK FILE` is one of those: it calls the verb's ``work``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def joined_world(**parallel: Any) -> Iterator[torch.device]:
    """Join the world that was launched, or one of this process alone, with Megatron's groups; our device."""
    from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
    from megatron_depthattn.parallel.launch_env import launch_environment

    device = initialize_distributed(launch_environment())
    try:
        initialize_model_parallel(**parallel)
        yield device
    finally:
        shut_down()


def run_torchrun(module: str, arguments: Sequence[str], processes: int) -> None:
    """Run ``python -m module`` in so many processes, with library warnings silenced.

    Raises:
        ValueError: the processes failed.
    """
    quiet = ["env", "OMP_NUM_THREADS=1", "PYTHONWARNINGS=ignore", sys.executable]
    torchrun = [*quiet, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*torchrun, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{processes} processes of {module} {' '.join(arguments)} failed: {done.stderr[-2000:]}")


def run_world(verb: str, processes: int, parallel: dict[str, int], work: dict[str, Any]) -> Any:
    """What ``work(device, **work)`` of the verb's module returns on rank 0; raises as `run_torchrun`."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        arguments = [verb, json.dumps(parallel), json.dumps(work), str(found)]
        run_torchrun("megatron_depthattn.benchmarks.world", arguments, processes)
        return json.loads(found.read_text())


if __name__ == "__main__":
    import torch.distributed as dist

    verb, parallel, work, file = sys.argv[1:]
    with joined_world(**json.loads(parallel)) as device:
        found = import_module(f"megatron_depthattn.benchmarks.{verb}").work(device, **json.loads(work))
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(found))
