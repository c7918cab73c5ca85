"""What a checkpoint costs: the loop's wait, the time until it is on disk, and host memory, of two ways to write it."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.world import run_world
from megatron_depthattn.paths import user_path

LAYOUTS = {"single": (1, 1), "dp2": (2, 1), "dp4": (4, 1), "tp2xdp2": (4, 2)}
"""Processes and tensor ranks."""
WAYS = {"gathered": "Megatron's gather on one rank", "shares": "every rank its share"}


def add_checkpoint(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("checkpoint", help="what saving costs the training loop, in time and host memory")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--layers", type=int, default=24, metavar="N", help="of hidden size 512 (default 24: 84 M)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="saves of each way, taking turns (default 5)")
    parser.add_argument("--directory", type=user_path, help="where to save; default: a temporary folder")
    parser.set_defaults(measure=measure_checkpoint)


def measure_checkpoint(given: argparse.Namespace) -> Result:
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
        folder = Path(tempfile.mkdtemp(dir=given.directory))
        work = {"tensor": tensor, "layers": given.layers, "runs": given.runs, "folder": str(folder)}
        print(f"{layout} ...", file=sys.stderr, flush=True)
        try:
            found = run_world("megatron_depthattn.benchmarks.checkpoint_worker", work, processes)
        finally:
            shutil.rmtree(folder)
        result.figures[layout] = found
        result.rows += [[layout, text, *_columns(found[way])] for way, text in WAYS.items()]
    return result


def _columns(found: dict[str, Any]) -> list[str]:
    memory = [added / 1e9 for added in found["memory"]]
    return [
        f"{found['bytes'] / 1e9:.2f}",
        _spread(found["waits"]),
        _spread(found["durable"]),
        f"{max(memory):.2f}",
        f"{sum(memory):.2f}",
    ]


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
