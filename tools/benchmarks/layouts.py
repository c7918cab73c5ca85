"""Predicted and measured time of a step under several layouts, on the machine at hand."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_depthattn.paths import user_path
from tools.benchmarks.result import Result
from tools.benchmarks.timing import spread

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).parent / "layouts.yaml"
FULL = ["recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1"]
LAYOUTS = {
    "dp": [],
    "dp, full recompute": FULL,
    "tp": ["parallel.tensor={world}"],
    "tp+sp, micro-batch 1, full recompute": [
        *("parallel.tensor={world}", "parallel.sequence=true", "train.micro_batch_size=1"),
        *FULL,
    ],
    "tp+sp": ["parallel.tensor={world}", "parallel.sequence=true"],
    "cp": ["parallel.context={world}"],
    "pp": ["parallel.pipeline={world}"],
    "pp x vpp 2": ["parallel.pipeline={world}", "parallel.virtual_pipeline=2"],
    "pp, two micro-batches": ["parallel.pipeline={world}", "train.micro_batch_size={half}"],
    "pp, two micro-batches, full recompute": ["parallel.pipeline={world}", "train.micro_batch_size={half}", *FULL],
    "pp, one micro-batch, full recompute": ["parallel.pipeline={world}", "train.micro_batch_size={whole}", *FULL],
}
FIVE = [
    *("dp", "tp", "pp, two micro-batches, full recompute", "pp, one micro-batch, full recompute"),
    "tp+sp, micro-batch 1, full recompute",
]
"""Of different axes, and a quarter or more apart in their predictions, so that noise need not decide their order."""


def add_layouts(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("layouts", help="predicted and measured time of a step under several layouts")
    parser.add_argument(
        "--config", type=user_path, default=CONFIG, metavar="YAML", help="default: layouts.yaml, for CPUs"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="other keys of the config")
    parser.add_argument("--world", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=FIVE, metavar="NAME", help="default: five")
    parser.add_argument("--all", action="store_const", const=list(LAYOUTS), dest="layouts", help="all that are known")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="runs of every layout (default 4)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="of a run, the first not counted (default 5)")
    parser.add_argument(
        "--machine", type=user_path, metavar="FILE", help="of estimate.py --calibrate; default: measure now"
    )
    parser.set_defaults(measure=measure_layouts)


def measure_layouts(given: argparse.Namespace) -> Result:
    """Runs of the training loop in turns, layout after layout, round after round; beside them the prediction.

    Raises:
        ValueError: a layout cannot run, or the world of processes failed.
    """
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.estimate.machine import check_calibration, load_machine, resolve_for
    from megatron_depthattn.estimate.step_time import step_time
    from megatron_depthattn.estimate.traffic import CrossLayer
    from megatron_depthattn.train.build import transformer_config
    from tools.calibration import calibrate_world

    whole = load_config(given.config, given.set).train.global_batch_size
    settings = {
        name: [*given.set, *(each.format(world=given.world, half=whole // 2, whole=whole) for each in LAYOUTS[name])]
        for name in given.layouts
    }
    configs = {name: load_config(given.config, settings[name]) for name in given.layouts}
    sizes = {name: validate(config, given.world, needs_data=False) for name, config in configs.items()}
    with tempfile.TemporaryDirectory() as folder:
        machine_file = given.machine
        if machine_file is None:
            machine_file = Path(folder) / "machine.json"
            calibrate_world(configs[given.layouts[0]], given.world, machine_file)
        machine = load_machine(machine_file)
        configs = {name: resolve_for(machine, config).config for name, config in configs.items()}
        check_calibration(machine, configs[given.layouts[0]], given.world)
        predicted = {
            name: step_time(config, CrossLayer.of(transformer_config(config)), sizes[name], machine)
            for name, config in configs.items()
        }
        steps = _run(given, settings, Path(folder))
    expected = {name: time.total for name, time in predicted.items()}
    measured = {name: spread(seconds) for name, seconds in steps.items()}
    medians = {name: each.median for name, each in measured.items()}
    result = Result(
        title=f"Time of a step under {len(settings)} layouts, {given.world} processes, {given.rounds} rounds of "
        f"{given.steps - 1} steps",
        columns=["layout", "predicted, s", "rank", "measured, s: median (quartiles)", "rank", "measured / predicted"],
        notes=[
            "measured: step_seconds of training runs, each layout once a round, in another order every round",
            f"predicted from {', '.join(machine.measured)}",
            "Spearman's rank correlation: "
            f"{spearmanr([expected[name] for name in steps], [medians[name] for name in steps]).statistic:.2f}",
        ],
    )
    for name in given.layouts:
        ranks = (str(_ranks(each)[name]) for each in (expected, medians))
        figures = (f"{expected[name]:.3f}", measured[name].text(1, 3))
        cells = [text for pair in zip(figures, ranks, strict=True) for text in pair]
        result.rows.append([name, *cells, f"{medians[name] / expected[name]:.2f}"])
        result.figures[name] = {"predicted": vars(predicted[name]), "steps": steps[name]}
    return result


def _ranks(values: dict[str, float]) -> dict[str, int]:
    return {name: place for place, name in enumerate(sorted(values, key=values.__getitem__), start=1)}


def _run(given: argparse.Namespace, settings: dict[str, list[str]], folder: Path) -> dict[str, list[float]]:
    """Seconds of every counted step by layout; each run is a world of its own."""
    order = random.Random(0)
    steps: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(given.rounds):
        for name in order.sample(list(settings), len(settings)):
            run_dir = folder / f"{turn}-{list(settings).index(name)}"
            steps[name] += _steps_of_a_run(given, settings[name], run_dir)
            shutil.rmtree(run_dir)
        print(f"round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
    return steps


def _steps_of_a_run(given: argparse.Namespace, settings: list[str], run_dir: Path) -> list[float]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={given.world}"]
    train = ["-m", "megatron_depthattn.train", str(given.config), *settings]
    train += [f"run.dir={run_dir}", "data.num_workers=0", f"train.stop_after={given.steps}"]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    done = subprocess.run([*torchrun, *train], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(settings)} failed: {done.stderr[-1500:]}")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["step_seconds"] for record in records[1:]]
