"""One rank of the world whose traffic is counted: torchrun ... traffic_worker CASES.json FOUND.json."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_depthattn.config import RunConfig, Sizes, from_dict, validate
from megatron_depthattn.estimate.traffic import CrossLayer, traffic
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import build_model, build_optimizer, transformer_config
from megatron_depthattn.train.step import Microbatch, train_step

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "depth_attention": {"stride": 1},
}
KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter", "send": "send"}
SCALARS = 64
"""Bytes up to which a tensor is the loss, a norm or a count of tokens."""


class CountedTraffic(TorchDispatchMode):
    """Bytes that go into or come out of collectives (the larger of both) by axis and kind, below Megatron."""

    def __init__(self, axes: dict[str, str]) -> None:
        super().__init__()
        self._axes = axes
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), None)
            group = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
            size = max(_bytes(arg) for arg in args)
            axis = self._axes.get(dist.ProcessGroup.unbox(group).group_name) if group is not None else None
            if kind and axis and size > SCALARS:
                self.counted[f"{axis} {kind}"] += size
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _axes() -> dict[str, str]:
    """Names of the groups of more than one rank, by axis."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    groups |= {"embedding": parallel_state.get_embedding_group()}
    return {
        group.group_name: {"embedding": "pipeline"}.get(axis, axis)
        for axis, group in groups.items()
        if group.size() > 1
    }


def _count(config: RunConfig, sizes: Sizes, device: torch.device) -> Counter[str]:
    chunks = build_model(config, device)
    optimizer, _ = build_optimizer(config, chunks)
    shape = config.train.micro_batch_size, config.data.sequence_length
    batch = {"tokens": torch.zeros(shape, dtype=torch.long), "labels": torch.zeros(shape, dtype=torch.long)}
    batches: list[Microbatch] = [batch] * sizes.num_microbatches
    with CountedTraffic(_axes()) as traffic_counter:
        train_step(chunks, optimizer, batches, shape)
    return traffic_counter.counted


def main(cases: dict[str, dict[str, Any]], output: Path) -> None:
    """Every case in one world, its groups built anew."""
    device = initialize_distributed(launch_environment())
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, case in cases.items():
        settings = case | {"model": MODEL | case.get("model", {}), "data": {"sequence_length": 32}}
        settings |= {"train": {"global_batch_size": 8, "micro_batch_size": 2}}
        config = from_dict(settings, name)
        sizes = validate(config, dist.get_world_size(), needs_data=False)
        parallel = config.parallel
        initialize_model_parallel(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
        )
        counted = _count(config, sizes, device)
        estimated: Counter[str] = Counter()
        for each in traffic(config, CrossLayer.of(transformer_config(config)), sizes, 0):
            estimated[f"{each.axis} {each.kind}"] += each.size * each.count
        found[name] = {key: (counted[key], estimated[key]) for key in sorted({*counted, *estimated})}
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
