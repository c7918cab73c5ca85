"""A rank that joins a world "on GPUs", with a backend that keeps a list of what torch asks of it in NCCL's place.

    python -m tests.e2e.pretend_nccl

Prints, as JSON, what joining as local rank 2 and as local rank 1 gives, the calls until then, those of two new groups,
of which it is in the first, and the same of two more after the world was bound to its device again.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_depthattn.parallel import groups
from megatron_depthattn.parallel.launch_env import LaunchEnvironment

calls: list[str] = []


class Pretend(Backend):
    supports_splitting = True

    def eager_connect_single_device(self, device: torch.device) -> None:
        calls.append(f"connect {device}")

    def perform_nocolor_split(self, device: torch.device) -> None:
        calls.append(f"split without me {device}")


def taken() -> list[str]:
    found = list(calls)
    calls.clear()
    return found


def main() -> None:
    alive: list[Backend] = []

    def create(_store: Any, rank: int, size: int, _timeout: Any) -> Backend:
        alive.append(Pretend(rank, size))
        return alive[-1]

    dist.Backend.register_backend("pretend", create, devices=["cuda"])
    join = dist.init_process_group
    with (
        mock.patch.object(groups, "enter_cpu_runtime", return_value=False),
        mock.patch.object(torch.cuda, "device_count", return_value=2),
        mock.patch.object(torch.cuda, "set_device", lambda device: calls.append(f"set {device}")),
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cuda")),
        mock.patch.object(torch.accelerator, "device_count", return_value=2),
        mock.patch.object(dist, "init_process_group", lambda backend, **more: join("pretend", **more)),
    ):
        found: list[Any] = []
        for local_rank in (2, 1):
            environment = LaunchEnvironment(rank=1, world_size=4, local_rank=local_rank, launched=True)
            try:
                found.append(str(groups.initialize_distributed(environment, store=FakeStore())))
            except ValueError as error:
                found.append(str(error))
        found.append(taken())
        for bound in (None, torch.device("cuda", 1)):
            if bound:
                dist.distributed_c10d._get_default_group().bound_device_id = bound
            dist.new_group([0, 1])
            dist.new_group([2, 3])
            found.append(taken())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
