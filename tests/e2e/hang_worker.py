"""One rank of a small gloo world that hangs in a given way; started by test_hang.py.

    python -m tests.e2e.hang_worker FOLDER TIMEOUT SCENARIO

Rank 1 (or 0) misbehaves after two good steps; the other waits for it in a collective.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_depthattn.parallel.groups import initialize_distributed
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.watchdog import Watchdog


def main(folder: Path, timeout: float, scenario: str) -> None:
    initialize_distributed(launch_environment())
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    with Watchdog(timeout, folder, rank=rank, world_size=dist.get_world_size(), store=store) as watchdog:
        for step in range(7 if scenario == "slow" else 3):
            if step == 2:
                misbehave(scenario, rank, timeout)
            if scenario != "slow":
                watchdog.heartbeat(step, "step")
            elif step > 0:  # together far longer than the timeout, but every step is a sign of life
                watchdog.heartbeat(step, "step")
                time.sleep(timeout / 4)
            elif rank == 1:  # before the first heartbeat nothing is timed
                time.sleep(1.5 * timeout)
            dist.all_reduce(torch.ones(1))
        watchdog.heartbeat(step, "the end")
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} is done", flush=True)


def misbehave(scenario: str, rank: int, timeout: float) -> None:
    if scenario != "slow":
        time.sleep(timeout / 4)  # the step before gets into the store: a rank's sign there is up to timeout / 10 old
    if scenario == f"stopped_{rank}":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif scenario == "endless_loop" and rank == 1:
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
        endless_loop()
    elif scenario == "lock_held" and rank == 1:
        ctypes.PyDLL(None).sleep(600)  # PyDLL, unlike CDLL, keeps the interpreter's lock


def endless_loop() -> None:
    while True:
        sum(range(1000))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
