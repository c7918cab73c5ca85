"""Operations counted from the modules that the ranks of a layout hold, and from the config's integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.config import RunConfig
from megatron_depthattn.estimate.counts import forward_flops
from megatron_depthattn.model.module_flops import module_flops
from megatron_depthattn.train.build import Chunks


def counted_flops(config: RunConfig, chunks: Chunks) -> dict[str, dict[str, int]] | None:
    """On rank 0, by line: the sum over one rank of every pipeline stage, and the formula."""
    others = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    counted = Counter() if any(others) else module_flops(chunks, config.data.sequence_length)
    gathered: list[Counter[str]] = [Counter()] * dist.get_world_size()
    dist.gather_object(counted, gathered if dist.get_rank() == 0 else None)
    if dist.get_rank() > 0:
        return None
    formula = asdict(forward_flops(config))
    modules = sum(gathered, Counter())
    return {"modules": {line: modules[line] for line in {*modules, *formula}}, "formula": formula}
