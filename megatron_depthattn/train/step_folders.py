"""Where checkpoints lie and what is in them besides tensors; needs no Megatron."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

LATEST = "latest"
"""The file that names the newest complete step folder."""
COMMON = "common.pt"
"""What is no tensor: progress, config, schedule."""
SAVED_METADATA: dict[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}
"""How Megatron lays tensors out: per-parameter optimizer state, and layers by their number in the whole model."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come; everything about data order follows from it."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return directory / f"step_{step:08d}"


def resolve_checkpoint(load: str | None, directory: Path) -> Path | None:
    """The step folder that ``checkpoint.load`` means; None: start fresh.

    Raises:
        ValueError: a folder was named that holds no checkpoint, or ``latest`` names one that is gone.
    """
    if load is None:
        return None
    if load == LATEST:
        pointer = directory / LATEST
        if not pointer.exists():
            return None
        folder = directory / pointer.read_text().strip()
    else:
        folder = Path(load) if Path(load).exists() else directory / load
    if not (folder / "metadata.json").exists():
        raise ValueError(
            f"checkpoint.load={load}: {folder} holds no complete checkpoint. Name a step folder "
            "(step_00000100), or set checkpoint.load=latest or null."
        )
    return folder
