"""Process groups: torch.distributed, then Megatron's model-parallel groups over it; what all ranks must agree on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
from megatron_depthattn.parallel.launch_env import LaunchEnvironment, set_defaults, store_address
from megatron_depthattn.parallel.patience import WaitedInVain, announced, within
from megatron_depthattn.parallel.rank_spans import rank_spans

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
    """Join the world (NCCL on GPUs, gloo elsewhere) over ``store`` (default: `join_store`); return our device.

    Raises:
        ValueError: there is no GPU for this rank.
    """
    on_cpu = enter_cpu_runtime()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", environment.local_rank)
    if not on_cpu:
        if environment.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {environment.rank} is number {environment.local_rank} on its host, from 0, and sees "
                f"{torch.cuda.device_count()} GPUs: start as many ranks on a host as it has GPUs (--nproc-per-node), "
                "and see CUDA_VISIBLE_DEVICES and nvidia-smi there."
            )
        torch.cuda.set_device(device)
    set_defaults(
        TORCH_FR_BUFFER_SIZE="2000",  # so many collectives the flight recorder keeps
        TORCH_NCCL_DUMP_ON_TIMEOUT="1",
        TORCH_NCCL_USE_COMM_NONBLOCKING="0",  # torch 2.6 and 2.7 take it for a world with a device, and NCCL 2.26 hangs
        # By default torch's thread that looks after NCCL's ends a process after 8 minutes, before the watchdog reports.
        TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=str(int(timeout.total_seconds())),
    )
    store = store or join_store(environment, timeout)
    with announced(f"rank {environment.rank}", lambda: "all ranks to join the world", timeout.total_seconds()):
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            timeout=timeout,
            store=dist.PrefixStore("default_pg", store),
            rank=environment.rank,
            world_size=environment.world_size,
            device_id=None if on_cpu else device,  # connects now, and on the right GPU
        )
    # For as long as the world is bound to a device, each later group is split off it by all ranks, be it used or not,
    # and messages between stages queue up with that group's collectives. The world's own connection stays as it is.
    dist.distributed_c10d._get_default_group().bound_device_id = None
    return device


def initialize_model_parallel(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    context: int = 1,
    seed: int = 1234,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    create_gloo_process_groups: bool = True,
) -> None:
    """Build Megatron's groups for this layout over the world that was joined, and seed its random number trackers.

    ``create_gloo_process_groups``: Megatron's optimizers ask for them, unless they get
    ``use_gloo_process_groups=False`` as those of a run do: a connection of each rank to each, three times.
    """
    with announced(f"rank {dist.get_rank()}", lambda: "the ranks of its groups", timeout.total_seconds()):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            context_parallel_size=context,
            distributed_timeout_minutes=round(timeout.total_seconds() / 60),
            create_gloo_process_groups=create_gloo_process_groups,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def connect_groups(
    device: torch.device, on_stage: Callable[[str], None] = lambda _: None, *, sums_fp8_scales: bool = False
) -> None:
    """Use each group of a step once, as NCCL connects at first use; of Megatron's groups a dozen more are never used.

    All ranks take theirs in the same order, so that none waits for one that waits for it. TransformerEngine's context
    parallel connects its neighbours itself, in the first step.

    Args:
        on_stage: called before each, with the group's name and ranks.
        sums_fp8_scales: ``precision.fp8=delayed``, whose largest entries have a group of their own.

    Raises:
        ConnectionError: names the group that does not connect, or over which a sum is wrong.
    """
    stage = ""
    try:
        for name, ranks in _use_groups(device, sums_fp8_scales):
            stage = f"connecting {name}, {rank_spans(ranks)}"
            on_stage(stage)
    except RuntimeError as error:  # torch's DistBackendError among them
        raise ConnectionError(f"{stage}: {str(error).strip().splitlines()[-1]}") from error


def _use_groups(device: torch.device, sums_fp8_scales: bool) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield each group's name and ranks, and then use it."""
    groups = [
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ]
    groups += filter(None, [parallel_state.get_embedding_group(check_initialized=False)])  # the first and last stages'
    if sums_fp8_scales:
        groups.append(parallel_state.get_amax_reduction_group(with_context_parallel=True))
    for group in [each for each in groups if each.size() > 1]:
        name, ranks = group.group_desc, dist.get_process_group_ranks(group)
        yield name, ranks
        total = torch.ones(1, device=device)
        dist.all_reduce(total, group=group)
        if total.item() != len(ranks):
            raise RuntimeError(f"the sum of ones is {total.item():g}")
        if name == "PIPELINE_MODEL_PARALLEL_GROUP" and parallel_state.get_virtual_pipeline_model_parallel_world_size():
            # Interleaved schedules send one by one, for which NCCL connects each pair of neighbours by itself; of two
            # stages Megatron sends one way over the world.
            ways = (group, dist.group.WORLD) if len(ranks) == 2 else (group,)
            for pair in {tuple(sorted(pair)): None for pair in itertools.pairwise([*ranks, ranks[0]])}:
                if dist.get_rank() in pair:
                    yield name, pair
                    first, second = pair
                    for way in ways:
                        dist.send(total, second, way) if dist.get_rank() == first else dist.recv(total, first, way)
                    total.item()  # it has arrived


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
