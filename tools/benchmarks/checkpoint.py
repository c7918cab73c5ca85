"""What a checkpoint costs the training loop: written while the loop waits, and written beside it."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_depthattn.paths import user_path
from tools.benchmarks.result import Result
from tools.benchmarks.timing import taking_turns

MODES = ("no save", "synchronous", "asynchronous")


def add_checkpoint(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("checkpoint", help="what saving costs the training loop, synchronous and asynchronous")
    parser.add_argument("--layers", type=int, default=24, metavar="N", help="of hidden size 512 (default 24: 84 M)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="of a run, the save after the first")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each mode, taking turns (default 5)")
    parser.add_argument("--directory", type=user_path, help="where to save; default: a temporary folder")
    parser.set_defaults(measure=measure_checkpoint)


def measure_checkpoint(given: argparse.Namespace) -> Result:
    """Seconds that the loop waits in the save, and by which the save lengthens the steps; the modes take turns."""
    loop = _Loop(given.layers)
    root = Path(tempfile.mkdtemp(dir=given.directory))
    waits: dict[str, list[float]] = {mode: [] for mode in MODES}
    totals: dict[str, list[float]] = {mode: [] for mode in MODES}
    writes: dict[str, list[float]] = {mode: [] for mode in MODES}
    num_bytes = 0
    try:
        savers = loop.savers(root)
        for saver in savers.values():  # the first save also allocates the buffers
            loop.save(saver)
        for run in range(given.runs):
            for mode in taking_turns(MODES, run):
                wait, total, outcome = loop.run(savers.get(mode), given.steps)
                totals[mode].append(total)
                waits[mode].append(wait)
                if outcome:
                    writes[mode].append(outcome.seconds)
                    num_bytes = outcome.num_bytes
                print(f"run {run + 1}: {mode} {wait:.2f} s of {total:.1f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(root)
    result = Result(
        title=f"a checkpoint of {num_bytes / 1e9:.2f} GB, {given.steps} steps, {given.runs} runs each, medians",
        columns=["", "the loop waits, s", "longer than without a save, s", "until it is published, s"],
    )
    plain = statistics.median(totals["no save"])
    for mode in MODES:
        longer = statistics.median(totals[mode]) - plain
        published = f"{statistics.median(writes[mode]):.2f}" if writes[mode] else ""
        waited = f"{statistics.median(waits[mode]):.2f} ({min(waits[mode]):.2f} to {max(waits[mode]):.2f})"
        result.rows.append([mode, waited, f"{longer:+.2f} of {plain:.1f}", published])
        result.figures[mode] = {"wait": waits[mode], "total": totals[mode], "write": writes[mode]}
    result.figures |= {"bytes": num_bytes, "steps": given.steps}
    return result


class _Loop:
    """Training steps on this process alone, on random tokens, with nothing else around them."""

    def __init__(self, num_layers: int) -> None:
        from megatron_depthattn.config import from_dict, to_dict
        from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel
        from megatron_depthattn.parallel.launch_env import launch_environment
        from megatron_depthattn.train.build import build_model, build_optimizer

        model = {
            "num_layers": num_layers,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "kv_channels": 64,
            "ffn_hidden_size": 1536,
            "vocab_size": 8192,
            "max_position_embeddings": 128,
        }
        config = from_dict({"model": model, "data": {"sequence_length": 128}}, "the benchmark")
        device = initialize_distributed(launch_environment())
        initialize_model_parallel()
        self._config = to_dict(config)
        self._chunks = build_model(config, device)
        self._optimizer, self._scheduler = build_optimizer(config, self._chunks)
        tokens = torch.randint(0, 8192, (1, 129), device=device)
        self._batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        self._step()

    def savers(self, root: Path) -> dict[str, Any]:
        from megatron_depthattn.train.save import CheckpointSaver

        return {
            mode: CheckpointSaver(root / mode, keep=1, is_async=mode == "asynchronous")
            for mode in ("synchronous", "asynchronous")
        }

    def run(self, saver: Any, steps: int) -> tuple[float, float, Any]:
        """Seconds in the save, seconds of all steps with it, and what became of it."""
        started, wait, outcome = time.perf_counter(), 0.0, None
        for step in range(steps):
            self._step()
            if saver and step == 0:
                begun = time.perf_counter()
                self._begin(saver)
                wait = time.perf_counter() - begun
        total = time.perf_counter() - started
        if saver:
            begun = time.perf_counter()
            saver.wait()
            outcome = saver.take_outcome()
            if outcome.error:
                raise ValueError(outcome.error)
            total += time.perf_counter() - begun
        return wait, total, outcome

    def save(self, saver: Any) -> None:
        self._begin(saver)
        saver.wait()
        saver.take_outcome()

    def _begin(self, saver: Any) -> None:
        from megatron_depthattn.train.checkpoint import checkpoint_state
        from megatron_depthattn.train.step_folders import Progress

        saver.save(Progress(step=1), checkpoint_state(self._chunks, self._optimizer, self._scheduler, config={}))

    def _step(self) -> None:
        from megatron_depthattn.train.step import train_step

        self._scheduler.step(increment=1)
        train_step(self._chunks, self._optimizer, [self._batch], (1, 128))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
