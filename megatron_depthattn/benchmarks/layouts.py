"""The planner's best layouts of a config, run for a few steps each on the machine at hand."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import spread, taking_turns
from megatron_depthattn.benchmarks.world import run_torchrun
from megatron_depthattn.config import load_config
from megatron_depthattn.estimate.hardware import find_gpu
from megatron_depthattn.estimate.layouts import best_layouts
from megatron_depthattn.paths import user_path

CONFIG = Path(__file__).parent / "layouts.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", type=user_path, default=CONFIG, metavar="YAML", help="default: a small one for CPUs"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="other keys of the config"
    )
    parser.add_argument("--world", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="what the planner ranks for (default H100)")
    parser.add_argument("--limit", type=int, default=5, metavar="N", help="layouts (default 5)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="runs of every layout (default 2)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of a run, the first not counted")


def measure(given: argparse.Namespace) -> Result:
    """Runs of the training loop in turns, beside the planner's prediction for ``--gpu``.

    Raises:
        ValueError: no layout fits, or the training processes failed.
    """
    config = load_config(given.config, given.set)
    best = {each.name: each for each in best_layouts(config, given.world, find_gpu(given.gpu), limit=given.limit)}
    seconds: dict[str, list[float]] = {name: [] for name in best}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.rounds):
            for name in taking_turns([*best], turn):
                keys = [f"{key}={'null' if value is None else value}" for key, value in best[name].overrides.items()]
                seconds[name] += _steps(given, keys, Path(folder) / "run")
            print(f"round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
    result = Result(
        title=f"Time of a step under {len(best)} layouts, {given.world} processes, {given.rounds} rounds of "
        f"{given.steps - 1} steps",
        columns=["layout", f"predicted on {given.gpu}, s", "measured here, s: median (quartiles)"],
        notes=["measured: step_seconds of training runs, each layout once a round, in another order every round"],
    )
    for name, times in seconds.items():
        result.rows.append([name, f"{best[name].step_seconds:.4f}", spread(times).text(1, 3)])
        result.figures[name] = {"predicted": best[name].step_seconds, "steps": times, "keys": best[name].overrides}
    return result


def _steps(given: argparse.Namespace, keys: list[str], run_dir: Path) -> list[float]:
    """Seconds of every counted step of one run."""
    settings = [*given.set, *keys, f"run.dir={run_dir}", "data.num_workers=0", "train.batch_ramp=null"]
    settings += [f"train.stop_after={given.steps}"]
    run_torchrun("megatron_depthattn.train", [str(given.config), *settings], given.world)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run_dir)
    return [record["step_seconds"] for record in records[1:]]
