"""What a checkpoint costs: the loop's wait, the time until it is on disk, and host memory, of two ways to write it."""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_depthattn.benchmarks.models import Model
from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import taking_turns
from megatron_depthattn.benchmarks.world import run_world
from megatron_depthattn.config import from_dict, validate
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from megatron_depthattn.train.build import Chunks

LAYOUTS = {"single": (1, 1), "dp2": (2, 1), "dp4": (4, 1), "tp2xdp2": (4, 2)}
"""Processes and tensor ranks."""
WAYS = {"gathered": "Megatron's gather on one rank", "shares": "every rank its share"}
MODEL = {
    **{"hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 64},
    **{"ffn_hidden_size": 1536, "vocab_size": 8192, "max_position_embeddings": 128},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--layers", type=int, default=24, metavar="N", help="of hidden size 512 (default 24: 84 M)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="saves of each way, taking turns (default 5)")
    parser.add_argument("--directory", type=user_path, help="where to save; default: a temporary folder")


def measure(given: argparse.Namespace) -> Result:
    """Every layout in a world of its own, where both ways save the same state in turns, asynchronously."""
    result = Result(
        title=f"a checkpoint of {given.layers} layers in fp32, medians of {given.runs} saves (least to most)",
        columns=[
            *("layout", "written by", "GB", "the loop waits, s", "until it is on disk, s"),
            *("host memory added, busiest rank, GB", "all ranks, GB"),
        ],
        notes=["Host memory: most that a process held during its first save, above what it held before."],
    )
    for layout in given.layouts:
        processes, tensor = LAYOUTS[layout]
        settings = {
            "model": MODEL | {"num_layers": given.layers},
            "parallel": {"tensor": tensor},
            "data": {"sequence_length": 128},
            "train": {"micro_batch_size": 1, "global_batch_size": processes // tensor},
        }
        print(f"{layout} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=given.directory) as folder:
            share = {"settings": settings, "runs": given.runs, "folder": folder}
            found = result.figures[layout] = run_world("checkpoint", processes, {"tensor": tensor}, share)
        for way, text in WAYS.items():
            one = found[way]
            gigabytes = [f"{size / 1e9:.2f}" for size in (one["bytes"], max(one["memory"]), sum(one["memory"]))]
            times = [
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
                for seconds in (one["waits"], one["durable"])
            ]
            result.rows.append([layout, text, gigabytes[0], *times, *gigabytes[1:]])
    return result


def work(device: torch.device, *, settings: dict[str, Any], runs: int, folder: str) -> dict[str, Any]:
    """Seconds and bytes of both ways, on one rank of the world; the times are the slowest rank's."""
    from megatron_depthattn.train.megatron_state import MegatronState
    from megatron_depthattn.train.save import CheckpointSaver
    from megatron_depthattn.train.step_folders import Progress

    config = from_dict(settings, "the benchmark")
    validate(config, dist.get_world_size(), needs_data=False)
    model = Model(config, device)
    model.update()
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "gathered": lambda: gathered_state(model.chunks, model.optimizer),
        "shares": lambda: MegatronState(model.chunks, model.optimizer).sharded(is_loading=False),
    }
    savers = {way: CheckpointSaver(Path(folder) / way, keep=1, is_async=True) for way in ways}
    found: dict[str, Any] = {way: {"waits": [], "durable": []} for way in ways}
    for run in range(runs + 1):
        for way in taking_turns(tuple(ways), run):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is freed is given back
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that is held, is counted from here
            before = _memory("VmRSS")
            dist.barrier()
            begun = time.perf_counter()
            savers[way].save(Progress(step=1), ways[way]() | {"config": {}})
            waited = time.perf_counter() - begun
            savers[way].wait()
            durable = time.perf_counter() - begun
            outcome = savers[way].take_outcome()
            assert outcome is not None and outcome.error is None, outcome
            if run == 0:  # it also allocates the buffers that are kept
                found[way] |= {"memory": _all(_memory("VmHWM") - before), "bytes": outcome.num_bytes}
            else:
                found[way]["waits"].append(max(_all(waited)))
                found[way]["durable"].append(max(_all(durable)))
    return found


def gathered_state(chunks: Chunks, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Weights and optimizer as Megatron's any-layout format has them: gathered over gloo on one rank, whole tensors."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from megatron_depthattn.train.megatron_state import sharded_models
    from megatron_depthattn.train.step_folders import SAVED_METADATA

    state = sharded_models(unwrap_model(chunks))
    metadata = SAVED_METADATA | {
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    ranks = dist.get_process_group_ranks(metadata["dp_cp_group"])
    gloo = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    for part in optimizer.chained_optimizers:
        part.data_parallel_group_gloo = gloo
    return state | {"optimizer": optimizer.sharded_state_dict(dict(state), metadata=metadata)}


def _memory(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _all(value: float) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
