"""Whether a config fits the GPUs and the data that it is meant for, before it is queued. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_depthattn.config import RunConfig, validate
from megatron_depthattn.estimate.hardware import find_gpu, resolve_for
from megatron_depthattn.estimate.layouts import MEMORY_RESERVE, RECOMPUTE, Layout, fullest_rank
from megatron_depthattn.estimate.step_time import run_seconds, step_time
from megatron_depthattn.estimate.traffic import CrossLayer


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a run needs of the GPUs that it is given."""

    gpu: str
    world_size: int
    needed_gb: float
    """Of the fullest rank, by the planner's analytic count."""
    room_gb: float
    """Memory of one GPU less what the framework and fragmentation take."""
    step_seconds: float
    run_hours: float
    """Of all train.steps, those of a batch ramp shorter; checkpoints, evaluation and restarts not counted."""

    @property
    def fits(self) -> bool:
        return self.needed_gb <= self.room_gb

    @property
    def line(self) -> str:
        """Ranks, memory and time for a log."""
        return (
            f"{self.world_size} x {self.gpu}: {self.needed_gb:.1f} of {self.room_gb:.1f} GB on the fullest rank, about "
            f"{self.step_seconds:.2f} s a step, {self.run_hours:,.1f} hours for the run (predicted)"
        )


def check_fit(config: RunConfig, world_size: int, gpu: str = "H100") -> tuple[Fit, str | None]:
    """Memory and time on so many GPUs, and what does not fit with what to set; None: it fits.

    Args:
        gpu: a name in `hardware.GPUS`, or one with its memory behind a dash, such as H100-80GB.

    Raises:
        ValueError: no figures for this GPU, or the config cannot run on so many ranks.
    """
    hardware = find_gpu(gpu)
    config = resolve_for(hardware, config).config
    sizes = validate(config, world_size, needs_data=False)
    layout = Layout(config, CrossLayer.of(config), sizes)
    seconds = step_time(config, layout.shared, sizes, hardware).total
    fit = Fit(
        gpu=hardware.name,
        world_size=world_size,
        needed_gb=fullest_rank(layout, world_size).total / 1e9,
        room_gb=hardware.memory_gb * (1 - MEMORY_RESERVE),
        step_seconds=seconds,
        run_hours=run_seconds(config, layout.shared, sizes, hardware) / 3600,
    )
    if fit.fits:
        return fit, None
    ways = ["more parallel.tensor or parallel.pipeline", "or let `depthattn estimate --layouts` choose a layout"]
    if config.train.micro_batch_size > 1:
        ways.insert(0, "train.micro_batch_size=1")
    if config.recompute.granularity != "full":
        keys = RECOMPUTE["full"]
        ways.insert(0, " ".join(f"recompute.{key}={value}" for key, value in keys.items()))
    return fit, (
        f"a rank needs {fit.needed_gb:.1f} GB and {hardware.name} has {hardware.memory_gb:.0f} GB less "
        f"{MEMORY_RESERVE:.0%}: set {', '.join(ways)}; for other GPUs --gpu NAME-MEMORY, such as H200-141GB"
    )


def check_data(config: RunConfig) -> list[str]:
    """Where local data was prepared for another sequence length or a larger vocabulary, with what to set."""
    problems = []
    for path in config.data.paths.values():
        manifest = Path(path, "manifest.json")
        if "://" in path or not manifest.is_file():
            continue
        try:
            stored = json.loads(manifest.read_text(encoding="utf-8"))
            length, wanted = stored.get("sequence_length"), config.data.sequence_length
            vocabulary, rows = int(stored.get("vocab_size") or 0), config.model.vocab_size
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{manifest} is no manifest of a corpus ({error}): copy or prepare the corpus again")
            continue
        if length not in (None, wanted):
            problems.append(f"data.sequence_length is {wanted} and {path} has samples of {length}: set {length}")
        if vocabulary > rows:
            problems.append(f"model.vocab_size is {rows} and the tokenizer of {path} has {vocabulary}: set more")
    return problems
