"""Whole runs and commands on small models, in one process: `python -m tests.cuda.runs DEVICE CORPUS FOLDER [NAME ...]`.

On "cuda" the process has entered the rehearsal and is rank 1 of its host, on "cpu" it computes with the CPU runtime.
What every run came to is written to FOLDER/results.json.
"""

from __future__ import annotations

import contextlib
import gc
import json
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.cuda import rehearsal
from tests.cuda.budget import Step, count_steps, line
from tests.cuda.harness_checks import CHECKS
from tests.cuda.planted import COUNTED, FAULTS, SAVE, Planted, place, planted

MODEL = {
    **{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8},
    **{"ffn_hidden_size": 64, "vocab_size": 384, "max_position_embeddings": 32, "spec": "local"},
    # kernels that Inductor would write, and Apex's, are no part of a rehearsal
    **{"compile": False, "fused_swiglu": False, "fused_cross_entropy": False, "fused_gradient_accumulation": False},
    "depth_attention": {"stride": 2, "recent_window": 1, "op": "lean"},
}
FULL = ("recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1")
BF16 = "precision.dtype=bf16"
RESUMED = (
    *("checkpoint.async_save=true", "checkpoint.interval=1", "train.steps=4", "train.eval_interval=2"),
    *("train.stop_after=2", "checkpoint.load=latest", "train.depth_interval=1", "data.num_workers=1"),
)
NOT_FINITE = ("optimizer.lr=1e18", "optimizer.warmup_ratio=0", "train.on_non_finite=skip", "data.log_samples=true")
RUNS: dict[str, tuple[str, ...]] = {
    "half": RESUMED,
    "resumed": RESUMED,
    "vanilla bf16": ("model.method=vanilla", BF16),
    "every layer, reference, selective, bf16": (
        *("model.depth_attention.stride=1", "model.depth_attention.op=reference", BF16),
        *("recompute.granularity=selective", "train.eval_interval=1"),
    ),
    "documents": ("data.document_mask=true", "train.eval_interval=1"),
    "documents bf16": ("data.document_mask=true", "train.eval_interval=1", BF16, *FULL),
    "denseformer": ("model.method=denseformer", *FULL),
    "attnres block bf16": (
        *("model.method=attnres", "model.attnres.block_size=2", BF16),
        *("recompute.granularity=full", "recompute.method=block", "recompute.num_layers=2"),
    ),
    "mhc bf16": ("model.method=mhc", BF16, *FULL),
    "loops, tied, mean weights of keys and values": (
        *("model.num_loops=2", "model.num_layers=2", "model.tie_embeddings=true"),
        *("model.depth_attention.weights=uniform", "model.depth_attention.mixes=key_value"),
    ),
    "not finite, bf16, full": (*NOT_FINITE, "train.stop_after=3", BF16, *FULL),
}
"""Overrides by name; `half` and `resumed` are one run."""


def write_config(folder: Path, corpus: Path) -> Path:
    """The runs' config."""
    config = {
        "model": MODEL,
        "data": {"path": str(corpus), "sequence_length": 32, "num_workers": 0},
        "train": {"steps": 3, "stop_after": 2, "log_interval": 1}  # the second is a step like most
        | {"global_batch_size": 4, "micro_batch_size": 2, "eval_batches": 1},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    return path


def train(config: Path, folder: Path, *overrides: str) -> int:
    """One run, or its continuation, as rank 1 of a host would have it."""
    from megatron_depthattn.config import load_config
    from megatron_depthattn.parallel.groups import shut_down
    from megatron_depthattn.parallel.launch_env import LaunchEnvironment
    from megatron_depthattn.train import loop
    from megatron_depthattn.train.stop_signals import StopSignals

    environment = LaunchEnvironment(rank=0, world_size=1, local_rank=1, launched=False)
    try:
        return loop.train(load_config(config, [*overrides, f"run.dir={folder}"]), environment, StopSignals())
    finally:
        shut_down()
        gc.unfreeze()
        gc.collect()  # a run's folder is locked as long as the run is there


def records(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says that does not depend on the clock or the machine."""
    kept = ("step", "loss", "grad_norm", "lr", "eval_loss", "depth", "skipped_steps")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in kept} for line in lines]


@contextlib.contextmanager
def output(file: Path) -> Iterator[None]:
    """Standard output into a file."""
    with file.open("w") as stream, contextlib.redirect_stdout(stream):
        yield


class Results:
    """What each run came to, and what its ``steps`` waited for; of those that are named in ``only``, if any are."""

    def __init__(self, only: tuple[str, ...], steps: list[Step]) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._only, self._steps = only, steps

    def add(self, name: str, function: Callable[[], Any]) -> None:
        """``function``'s result, or what it raised; and what the rehearsal objected to."""
        if self._only and name not in self._only:
            return
        rehearsal.FAULTS.clear()
        started, error, value = time.perf_counter(), None, None
        self._steps.clear()
        try:
            value = function()
        except BaseException as problem:
            error = "".join(traceback.format_exception(problem))
        seconds = round(time.perf_counter() - started, 1)
        self.found[name] = {
            "value": value,
            "error": error,
            "faults": [*rehearsal.FAULTS],
            "steps": [*self._steps],
            "seconds": seconds,
        }
        print(f"{name}: {seconds} s {(error or '')[-300:]}", file=sys.stderr, flush=True)


def run(results: Results, config: Path, folder: Path) -> None:
    """Every entry of `RUNS`."""
    for name, overrides in RUNS.items():
        own = folder / ("half" if name == "resumed" else name)

        def one(own: Path = own, overrides: tuple[str, ...] = overrides) -> Any:
            assert train(config, own, *overrides) == 0
            return records(own)

        results.add(name, one)


COMMANDS = (
    *("to-hf", "verify", "from-hf, and a run from it", "evaluate", "generate", "generate, sampled", "estimate"),
    *("benchmark memory", "benchmark step", "benchmark generate"),
)
TINY = (
    *("--layers", "2", "--set", "model.hidden_size=32", "model.num_attention_heads=4", "model.num_query_groups=2"),
    *("model.kv_channels=8", "model.vocab_size=64", "data.sequence_length=16", "model.spec=local"),
    *("model.fused_swiglu=false", "model.fused_cross_entropy=false"),
)
LEAN = "model.depth_attention.op=lean"


def run_commands(results: Results, config: Path, folder: Path) -> None:
    """Conversion of a run, and what reads the exported model; measurements, tiny."""
    from safetensors.torch import load_file

    from megatron_depthattn.cli import main as depthattn

    checkpoints, model, back = (
        str(folder / "half" / "checkpoints"),
        str(folder / "hf"),
        folder / "back" / "step_00000000",
    )
    figures = folder / "figures.json"

    def command(*arguments: str) -> str:
        file = folder / "command.txt"
        with output(file):
            assert depthattn(list(arguments)) == 0, arguments
        return file.read_text().replace(str(folder), "FOLDER")

    def exported() -> str:
        command("convert", "to-hf", "--checkpoint", checkpoints, "--output", model)
        weights = load_file(folder / "hf" / "model.safetensors")
        return {name: weight.norm().item() for name, weight in weights.items()}

    def imported() -> Any:
        command("convert", "from-hf", "--model", model, "--output", str(back))
        assert train(config, folder / "imported", f"checkpoint.load={back}", "train.steps=1") == 0
        return records(folder / "imported")

    def evaluated() -> Any:
        data = json.loads(config.read_text())["data"]["path"]
        command(*("evaluate", "--model", model, "--data", data, "--max-samples", "8", "--json", str(figures)))
        return {
            key: value for key, value in json.loads(figures.read_text()).items() if key in ("loss", "bits_per_byte")
        }

    def benchmark(*arguments: str) -> dict[str, Any]:
        command("benchmark", "--json", str(figures), *arguments)
        return json.loads(figures.read_text())["figures"]

    def verified() -> bool:
        return "FAILED" not in command("convert", "verify", "--checkpoint", checkpoints, "--model", model)

    prompt = ("generate", "--model", model, "--prompt", "def f", "--max-new-tokens", "4")
    rounds = ("--rounds", "1", "--warm-up", "1")
    sizes = ("--batch-size", "2", "--prompt-length", "5", "--new-tokens", "3", "--rounds", "1")
    functions: dict[str, Callable[[], Any]] = {
        "to-hf": exported,
        "verify": verified,
        "from-hf, and a run from it": imported,
        "evaluate": evaluated,
        "generate": lambda: command(*prompt, "--show-depth"),
        "generate, sampled": lambda: command(*prompt, "--temperature", "1"),
        "estimate": lambda: command("estimate", str(config)),
        "benchmark memory": lambda: sorted(benchmark("memory", "--shape", "cpu", *TINY, LEAN)),
        "benchmark step": lambda: sorted(benchmark("step", "--shape", "cpu", *TINY, "--ops", "lean", *rounds)),
        "benchmark generate": lambda: sorted(benchmark("generate", "3b", *sizes, *TINY[2:], "model.num_layers=2")),
    }
    for name in COMMANDS:
        results.add(name, functions[name])


def resolved(config: Path) -> list[str]:
    """What `auto` becomes here, why, and what a run that insists on TransformerEngine is answered."""
    from megatron_depthattn.config import load_config
    from megatron_depthattn.train.hardware import require_hardware, resolve_here

    found = resolve_here(load_config(config, ["model.spec=auto", "model.depth_attention.op=auto", BF16]))
    try:
        require_hardware(load_config(config, ["model.spec=te", BF16]))
    except ValueError as error:
        return [found.config.model.spec, found.config.model.depth_attention.op, found.reasons["model.spec"], str(error)]
    raise AssertionError("TransformerEngine is here")


def run_planted(results: Results, config: Path, folder: Path) -> None:
    """A step with each fault that stops one, and with all that are counted; on the CPU with all of them."""
    pkgutil.resolve_name(SAVE).PAUSE_SECONDS = 0  # before the last checkpoint is tried again
    latest = f"checkpoint.load={folder / 'half' / 'checkpoints' / 'step_00000004'}"

    alone = {name: [fault] for name, fault in FAULTS.items() if not fault.counted}
    on_gpu = alone | {"counted faults": COUNTED}
    for name, faults in on_gpu.items() if torch.cuda.is_available() else [("all faults", [*FAULTS.values()])]:

        def one(name: str = name, faults: list[Planted] = faults) -> int:
            begins = (latest, "train.steps=5") if any(fault.resumes for fault in faults) else ("train.steps=1",)
            with planted(*faults):
                return train(config, folder / name, *begins, "train.depth_interval=1", "optimizer.grad_clip=0.1")

        results.add(name, one)
    results.add("places", lambda: [line(fault.found, place(fault)) for fault in COUNTED])


def main(device: str, corpus: str, out: str, *only: str) -> None:
    if device == "cuda":
        import tests.cuda.eight_gpus  # noqa: F401  # the rehearsal begins, unless it has
    import warnings

    warnings.simplefilter("ignore")
    folder = Path(out)
    results = Results(only, count_steps() if device == "cuda" else [])
    with output(folder / "output.txt"):
        config = write_config(folder, Path(corpus))
        if device == "cuda":
            for check in CHECKS:
                results.add(check.__name__, check)
            results.add("auto", lambda: resolved(config))
        for part in (run, run_commands, run_planted):
            part(results, config, folder)
    (folder / "results.json").write_text(json.dumps(results.found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
