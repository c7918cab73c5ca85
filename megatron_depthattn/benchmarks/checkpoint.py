"""What a checkpoint costs: the loop's wait, the time until it is on disk, loading it, and host memory, of two ways to
write it."""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_depthattn.benchmarks.models import SHAPES, Model
from megatron_depthattn.benchmarks.result import Result, progress
from megatron_depthattn.benchmarks.timing import taking_turns
from megatron_depthattn.benchmarks.world import run_world
from megatron_depthattn.cli.common import check
from megatron_depthattn.config import from_dict, load_config, to_dict, validate
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from megatron_depthattn.train.build import Chunks

LAYOUTS = {"single": (1, 1), "dp2": (2, 1), "dp4": (4, 1), "tp2xdp2": (4, 2)}
"""Processes and tensor ranks."""
WAYS = {"gathered": "Megatron's gather on one rank", "shares": "every rank its share"}
CLEAR_REFS = Path("/proc/self/clear_refs")
"""Linux counts the most that a process holds, VmHWM, anew when 5 is written here. Some sandboxes have no such file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--shape", choices=SHAPES, default="84m", help="default: 84m, 24 layers of hidden size 512")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the depth to N layers")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="other keys of the config"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="saves of each way, taking turns (default 5)")
    parser.add_argument("--directory", type=user_path, help="where to save; default: a temporary folder")


def measure(given: argparse.Namespace) -> Result:
    """Every layout in a world of its own, where both ways save the same state in turns, asynchronously."""
    result = Result(
        title=f"A checkpoint: {given.shape}{f' in {given.layers} layers' if given.layers else ''}, medians of "
        f"{given.runs} saves (least to most)",
        columns=[
            *("layout", "written by", "GB", "the loop waits, s", "until it is on disk, s"),
            *("loading, s", "host memory added, busiest rank, GB", "all ranks, GB"),
        ],
    )
    for layout in given.layouts:
        processes, tensor = LAYOUTS[layout]
        keys = [f"model.num_layers={given.layers}"] if given.layers else []
        keys += [f"parallel.tensor={tensor}", "train.micro_batch_size=1"]
        keys += [f"train.global_batch_size={processes // tensor}"]
        settings = to_dict(load_config(SHAPES[given.shape], [*keys, *given.set]))
        is_muon = settings["optimizer"]["name"] == "muon"
        check((is_muon, "optimizer.name=muon: Megatron gathers AdamW's state alone; set optimizer.name=adamw"))
        progress(given, f"{layout} ...", lambda: result)
        with tempfile.TemporaryDirectory(dir=given.directory) as folder:
            share = {"settings": settings, "runs": given.runs, "folder": folder}
            found = result.figures[layout] = run_world("checkpoint", processes, {"tensor": tensor}, share)
        for way, text in WAYS.items():
            one = found[way]
            is_known = None not in one["memory"]
            held = [f"{size / 1e9:.2f}" for size in (max(one["memory"]), sum(one["memory"]))] if is_known else ["", ""]
            how = "most that a process held during its first save, above what it held before"
            result.notes = [f"Host memory: {how if is_known else f'not measured, {CLEAR_REFS} cannot be written'}."]
            times = [
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
                for seconds in (one["waits"], one["durable"])
            ]
            loading = f"{found['loading']:.2f}" if way == "shares" else ""
            result.rows.append([layout, text, f"{one['bytes'] / 1e9:.2f}", *times, loading, *held])
    return result


def work(device: torch.device, *, settings: dict[str, Any], runs: int, folder: str) -> dict[str, Any]:
    """Seconds and bytes of both ways, on one rank of the world; the times are the slowest rank's."""
    from megatron_depthattn.train.checkpoint import checkpoint_state, load_checkpoint
    from megatron_depthattn.train.hardware import for_this_machine
    from megatron_depthattn.train.megatron_state import MegatronState
    from megatron_depthattn.train.save import CheckpointSaver
    from megatron_depthattn.train.step_folders import Progress, complete_folders

    given = from_dict(settings, "the benchmark")
    config = for_this_machine(given, validate(given, dist.get_world_size(), needs_data=False)).config
    model = Model(config, device)
    model.update()
    state = MegatronState(model.chunks, model.optimizer)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "gathered": lambda: gathered_state(model.chunks, model.optimizer) | {"config": {}},
        "shares": lambda: checkpoint_state(state, model.schedule, config=to_dict(config)),
    }
    savers = {way: CheckpointSaver(Path(folder) / way, keep=1, is_async=True) for way in ways}
    found: dict[str, Any] = {way: {"waits": [], "durable": []} for way in ways}
    for run in range(runs + 1):
        for way in taking_turns(tuple(ways), run):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is freed is given back
            before = resident_bytes("VmRSS") if counts_most_memory() else None
            dist.barrier()
            begun = time.perf_counter()
            savers[way].save(Progress(step=1), ways[way]())
            waited = time.perf_counter() - begun
            savers[way].wait()
            durable = time.perf_counter() - begun
            outcome = savers[way].take_outcome()
            assert outcome is not None and outcome.error is None, outcome
            if run == 0:  # it also allocates the buffers that are kept
                added = None if before is None else resident_bytes("VmHWM") - before
                found[way] |= {"memory": _all(added), "bytes": outcome.num_bytes}
            else:
                found[way]["waits"].append(max(_all(waited)))
                found[way]["durable"].append(max(_all(durable)))
    (saved,) = complete_folders(Path(folder) / "shares")
    dist.barrier()
    begun = time.perf_counter()
    load_checkpoint(saved, state, model.schedule, config=to_dict(config))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found | {"loading": max(_all(time.perf_counter() - begun))}


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
    for part in optimizer.chained_optimizers:  # those of a run do without
        part.data_parallel_group_gloo = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    return state | {"optimizer": optimizer.sharded_state_dict(dict(state), metadata=metadata)}


def counts_most_memory() -> bool:
    """Whether VmHWM is counted from here."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _all(value: float | None) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
