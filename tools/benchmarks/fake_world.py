"""One process that is any rank of any layout: Megatron's groups over torch's fake backend, which sends nothing.

Modules, shapes, what autograd saves, and what data-parallel wrapper and optimizer allocate are a real rank's; numbers
that would have come from other ranks are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_depthattn.config import RunConfig
from megatron_depthattn.parallel.cpu_runtime import enter_cpu_runtime
from megatron_depthattn.parallel.groups import initialize_model_parallel, shut_down


@contextmanager
def fake_rank(config: RunConfig, rank: int, world_size: int) -> Iterator[None]:
    """This process as ``rank`` of the config's layout; on machines without a GPU."""
    enter_cpu_runtime()
    parallel = config.parallel
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **(kwargs | {"backend": None}))  # Megatron asks for some groups on gloo

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with mock.patch.object(dist, "new_group", fake_group):
            initialize_model_parallel(
                tensor=parallel.tensor,
                pipeline=parallel.pipeline,
                virtual_pipeline=parallel.virtual_pipeline,
                context=parallel.context,
                seed=config.run.seed,
            )
        yield
    finally:
        shut_down()


def rank_of_stage(config: RunConfig, stage: int, world_size: int) -> int:
    """The first rank of a pipeline stage."""
    return stage * (world_size // config.parallel.pipeline)
