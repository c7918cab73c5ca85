"""Starts a module of the package as torchrun would, with something wrong on rank 1.

    torchrun ... tests/e2e/odd_rank.py FAULT PLACE MODULE ARGUMENT...

PLACE is a folder that the fault needs: the other copy of the code, the folder to mount something on, ...
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time

import torch.distributed as dist

CLONE_NEWNS = 0x00020000


def own_mounts() -> None:
    """What this process mounts from now on, nobody else sees."""
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def _late(function):
    def late(*arguments, **more):
        time.sleep(2)
        return function(*arguments, **more)

    return late


def do_wrong(fault: str, place: str) -> None:
    if fault == "other code":
        sys.path.insert(0, place)
    elif fault == "no disk space":
        own_mounts()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True)
    elif fault == "no space at all":
        own_mounts()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", place], check=True)
    elif fault == "read-only":
        own_mounts()
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    elif fault == "another folder":
        own_mounts()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    elif fault == "disk that hangs":  # to open a pipe that nobody reads takes for ever
        os.mkfifo(os.path.join(place, ".preflight_1"))
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "stopped in a group":
        dist.all_reduce = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "slow to join":  # in all longer than a stage may take
        for name in ("init_process_group", "all_reduce"):
            setattr(dist, name, _late(getattr(dist, name)))
    elif fault == "other config":
        sys.argv.append(place)
    elif fault == "other variable":
        os.environ["NCCL_ALGO"] = "Ring"
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    _, fault, place, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    if os.environ["RANK"] == "1":
        do_wrong(fault, place)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
