"""One rank of a world of two whose steps are replayed: ``python -m tests.parallel.cuda_graph_worker RESULTS.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.config import ParallelConfig, RecomputeConfig
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import build_model, build_optimizer
from megatron_depthattn.train.step import train_step
from tests.cuda_graph import train
from tests.parallel.cases import group_sizes
from tests.parallel.non_finite_worker import FULL_RECOMPUTE, SHAPE, config_of, microbatches

NONE = RecomputeConfig()
LAYOUTS = {
    "pp2": (ParallelConfig(pipeline=2), NONE),
    "pp2xvpp2+recompute": (ParallelConfig(pipeline=2, virtual_pipeline=2), FULL_RECOMPUTE),
    "tp2+sp": (ParallelConfig(tensor=2, sequence=True), NONE),
    "cp2": (ParallelConfig(context=2), NONE),
    "dp2+overlap": (ParallelConfig(overlap_grad_reduce=True), NONE),
}
BATCHES = 3


def run(parallel: ParallelConfig, recompute: RecomputeConfig) -> dict[str, Any]:
    """What this rank saw of steps in Python and of the same as replays."""
    initialize_model_parallel(**group_sizes(parallel))
    batches = [microbatches(number) for number in range(BATCHES)]
    found: dict[str, Any] = {}
    weights = []
    for is_replayed in (False, True):
        chunks = build_model(config_of(parallel, recompute), torch.device("cpu"))
        optimizer, schedule = build_optimizer(config_of(parallel, recompute), chunks)
        schedule.step(1)
        if is_replayed:
            results, captured = train(chunks, optimizer, batches, SHAPE)
            found |= {"stops": sorted(captured.graph.stops), "reads": sorted(captured.reads())}
            found["communication"] = sorted({o.name for o in captured.graph.operations if o.name.startswith("c10d")})
        else:
            results = [train_step(chunks, optimizer, batch, SHAPE) for batch in batches]
        found["replayed" if is_replayed else "eager"] = [[result.loss, result.grad_norm] for result in results]
        weights.append([parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()])
    found["same weights"] = all(map(torch.equal, *weights))
    parallel_state.destroy_model_parallel()
    return found


def main(file: Path) -> None:
    initialize_distributed(launch_environment())
    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        found[name] = [None] * dist.get_world_size()
        dist.all_gather_object(found[name], run(*layout))
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
