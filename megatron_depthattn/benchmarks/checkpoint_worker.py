"""One rank of a world that saves its state in two ways: torchrun ... checkpoint_worker WORK.json FOUND.json."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_depthattn.benchmarks.timing import taking_turns
from megatron_depthattn.config import from_dict, validate
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.build import Chunks, build_model, build_optimizer
from megatron_depthattn.train.megatron_state import MegatronState, sharded_models
from megatron_depthattn.train.save import CheckpointSaver
from megatron_depthattn.train.step import train_step
from megatron_depthattn.train.step_folders import SAVED_METADATA, Progress

MODEL = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
    "ffn_hidden_size": 1536,
    "vocab_size": 8192,
    "max_position_embeddings": 128,
}


def gathered_state(chunks: Chunks, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Weights and optimizer as Megatron's any-layout format has them: gathered over gloo on one rank, whole tensors."""
    state = sharded_models(unwrap_model(chunks))
    metadata = SAVED_METADATA | {
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return state | {"optimizer": optimizer.sharded_state_dict(dict(state), metadata=metadata)}


def main(work: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "model": MODEL | {"num_layers": work["layers"]},
        "parallel": {"tensor": work["tensor"]},
        "data": {"sequence_length": 128},
        "train": {"micro_batch_size": 1, "global_batch_size": dist.get_world_size() // work["tensor"]},
    }
    config = from_dict(settings, "the benchmark")
    validate(config, dist.get_world_size(), needs_data=False)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    chunks = build_model(config, device)
    optimizer, scheduler = build_optimizer(config, chunks)
    tokens = torch.randint(0, MODEL["vocab_size"], (1, 129), device=device)
    scheduler.step(1)
    train_step(chunks, optimizer, [{"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}], (1, 128))

    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "gathered": lambda: gathered_state(chunks, optimizer),
        "shares": lambda: MegatronState(chunks, optimizer).sharded(is_loading=False),
    }
    savers = {way: CheckpointSaver(Path(work["folder"]) / way, keep=1, is_async=True) for way in ways}
    found: dict[str, Any] = {way: {"waits": [], "durable": []} for way in ways}
    for run in range(work["runs"] + 1):
        for way in taking_turns(tuple(ways), run):
            before = _start_memory()
            waited, durable, num_bytes = _save(savers[way], ways[way])
            if run == 0:  # it also allocates the buffers that are kept
                found[way] |= {"memory": _all(_memory("VmHWM") - before), "bytes": num_bytes}
            else:
                found[way]["waits"].append(max(_all(waited)))
                found[way]["durable"].append(max(_all(durable)))
    return found


def _save(saver: CheckpointSaver, state: Callable[[], dict[str, Any]]) -> tuple[float, float, int]:
    """Seconds that the loop waited, seconds until the checkpoint was published, and its size."""
    dist.barrier()
    begun = time.perf_counter()
    saver.save(Progress(step=1), state() | {"config": {}})
    waited = time.perf_counter() - begun
    saver.wait()
    durable = time.perf_counter() - begun
    outcome = saver.take_outcome()
    assert outcome is not None and outcome.error is None, outcome
    return waited, durable, outcome.num_bytes


def _start_memory() -> int:
    """What this process holds, with what it has freed given back; its peak is counted from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _all(value: float) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    initialize_distributed(launch_environment())
    initialize_model_parallel(tensor=work["tensor"])
    result = main(work)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    shut_down()
