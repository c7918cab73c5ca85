"""Process groups: torch.distributed, then Megatron's model-parallel groups over it; what all ranks must agree on."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
from megatron_depthattn.parallel.launch_env import LaunchEnvironment, store_address
from megatron_depthattn.parallel.patience import WaitedInVain, announced, within

COLLECTIVE_TIMEOUT = timedelta(minutes=20)
"""How long a rank waits for the others before it gives up, at the least; for what comes before the first step, since
later on `train.hang_timeout` is shorter and reports more."""


def join_store(
    environment: LaunchEnvironment, timeout: timedelta = COLLECTIVE_TIMEOUT, *, patience: timedelta | None = None
) -> dist.Store:
    """The store that all ranks meet in; with it alone they can talk, whatever becomes of the backend.

    Args:
        timeout: of what is asked of the store later on.
        patience: how long to look for the store, or, on a rank 0 that keeps it, for the others; default: ``timeout``.

    Raises:
        TimeoutError: the store, or some of the others, are not there.
    """
    if not environment.launched:
        return dist.HashStore()
    patience = patience or timeout
    seconds, me = patience.total_seconds(), f"rank {environment.rank} of {environment.world_size}"
    where = f"the store of rank 0 at {store_address()}"
    try:
        store, _, _ = within(  # torch's own limit is not for a port at which something else listens, and never answers
            seconds + min(5.0, seconds), me, lambda: where, lambda: next(rendezvous("env://", timeout=patience))
        )
    except (dist.DistError, WaitedInVain) as error:
        why = str(error).splitlines()[0] if isinstance(error, dist.DistError) else "what listens there does not answer"
        raise TimeoutError(
            f"{me} waited at MASTER_ADDR:MASTER_PORT ({store_address()}) in vain ({why}). See that all ranks were "
            "started, with the address of rank 0's host, and that this port is open between the hosts and nobody "
            "else's; where imports are slow set preflight.timeout higher."
        ) from error
    store.set_timeout(timeout)
    return store


def initialize_distributed(
    environment: LaunchEnvironment, timeout: timedelta = COLLECTIVE_TIMEOUT, store: dist.Store | None = None
) -> torch.device:
    """Join the world (NCCL on GPUs, gloo elsewhere) over ``store`` (default: `join_store`); return our device."""
    on_cpu = enter_cpu_runtime()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", environment.local_rank)
    if not on_cpu:
        torch.cuda.set_device(device)
    store = store or join_store(environment, timeout)
    with announced(f"rank {environment.rank}", lambda: "all ranks to join the world", timeout.total_seconds()):
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            timeout=timeout,
            store=dist.PrefixStore("default_pg", store),
            rank=environment.rank,
            world_size=environment.world_size,
        )
    return device


def initialize_model_parallel(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    seed: int = 1234,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> None:
    """Build Megatron's groups for this layout over the world that was joined, and seed its random number trackers."""
    with announced(f"rank {dist.get_rank()}", lambda: "the ranks of its groups", timeout.total_seconds()):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            context_parallel_size=context,
            distributed_timeout_minutes=round(timeout.total_seconds() / 60),
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def check_same_on_all_ranks(what: str, digest: str) -> None:
    """Raise on every rank if ranks hold different ``digest`` strings of ``what``."""
    digests: list[str] = [""] * dist.get_world_size()
    with announced(f"rank {dist.get_rank()}", lambda: f"the other ranks' {what}"):
        dist.all_gather_object(digests, digest)
    outliers = {rank: other for rank, other in enumerate(digests) if other != digests[0]}
    if outliers:
        raise ValueError(
            f"ranks hold different {what}: rank 0 has {digests[0]}, but {outliers}. Start all ranks with the same "
            "config, code, data and software."
        )


def shut_down() -> None:
    """Leave Megatron's groups and the world."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
