"""Checkpoints in Megatron's distributed format: weights, optimizer, schedule and position, loadable under any layout.

A step folder is complete or not there: it is written beside its place and renamed, and only then does ``latest``
name it. Every tensor is stored under its name in the whole model, so tensor, pipeline, virtual pipeline and data-
parallel sizes may all differ between saving and loading. Training draws no random numbers after initialisation (no
dropout; the order of samples is a function of seed and position), so there is no generator state to keep.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from megatron_depthattn.model.source_plan import default_stride
from megatron_depthattn.train.build import Chunks

LATEST = "latest"


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


def save_checkpoint(
    directory: Path,
    progress: Progress,
    chunks: Chunks,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    config: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of ``progress.step``, let ``latest`` name it, and drop those older than the newest ``keep``.

    Call on all ranks. Saving without optimizer and scheduler writes weights only.

    Args:
        directory: the run's checkpoint folder, shared by all ranks.
        config: the resolved run config, kept in the checkpoint for tools.
        keep: complete checkpoints to leave in the folder; None: all.
    """
    final = step_folder(directory, progress.step)
    aside = directory / f".{final.name}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # what an interrupted save left
        aside.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["progress"] = asdict(progress)
    state["config"] = config
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    dist_checkpointing.save(state, str(aside), content_metadata=_saved_metadata())
    dist.barrier()
    if dist.get_rank() == 0:
        _publish(aside, final, keep)
    dist.barrier()
    return final


def _publish(aside: Path, final: Path, keep: int | None) -> None:
    """Give a complete folder its name, let ``latest`` name it, and drop what is old or was abandoned."""
    replaced = final.with_name(f".{final.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    pointer = final.with_name(f".{LATEST}.part")
    with pointer.open("w") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    pointer.rename(final.with_name(LATEST))
    shutil.rmtree(replaced, ignore_errors=True)
    folders = sorted(final.parent.glob("step_????????"))
    here = folders.index(final)
    # Steps beyond this one belong to a branch that a resume from an earlier step has left.
    for folder in folders[here + 1 :] + (folders[: max(0, here + 1 - keep)] if keep is not None else []):
        shutil.rmtree(folder)


def load_checkpoint(
    folder: Path,
    chunks: Chunks,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    *,
    config: dict[str, Any] | None = None,
) -> Progress:
    """Load a step folder that was saved under any layout into this one's chunks, optimizer and scheduler.

    Args:
        config: this run's config, to be compared with the one that saved: the weights of two models that compute
            different functions can have the same names and shapes.

    Raises:
        ValueError: the checkpoint is of another model or of other data, or holds no optimizer state to go on with.
        RuntimeError: a weight is missing or has another shape (Megatron names it).
    """
    common = dist_checkpointing.load_common_state_dict(str(folder))
    if config is not None:
        _check_same_run(folder, common["config"], config)
    if scheduler is not None and "scheduler" not in common:
        raise ValueError(
            f"{folder} holds weights only, no optimizer state: training can only go on from a checkpoint of a "
            "training run."
        )
    if optimizer is not None:
        _allocate_state(optimizer)
    state = _sharded_state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    for index, model in enumerate(unwrap_model(chunks)):
        model.load_state_dict(loaded[f"model{index}"])
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(common["scheduler"])
    return Progress(**common["progress"])


def _check_same_run(folder: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse to go on with another function of the same weights, or with positions of another order of samples."""
    before, now = _fixed_in_a_run(saved), _fixed_in_a_run(ours)
    differences = [
        f"{key} (was {before.get(key)}, is {value})" for key, value in now.items() if before.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} belongs to a run with other settings: {', '.join(differences)}. Set them as they were, "
            "or start a new run: another run.dir with checkpoint.load=null."
        )


def _fixed_in_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run may not change, by their keys; how things are computed may change."""
    model = dict(config["model"])
    depth = model.pop("depth_attention")
    stride = depth["stride"] or default_stride(model["num_layers"] * model["num_loops"])
    fixed = {f"model.{key}": value for key, value in model.items() if key not in ("spec", "max_position_embeddings")}
    fixed["model.depth_attention.enabled"] = depth["enabled"]
    if depth["enabled"]:
        fixed["model.depth_attention.stride"] = stride
        fixed["model.depth_attention.recent_window"] = depth["recent_window"]
    for section, key in (("run", "seed"), ("data", "sequence_length"), ("data", "shuffle")):
        fixed[f"{section}.{key}"] = config[section][key]
    return fixed


def _saved_metadata() -> dict[str, Any]:
    """How Megatron lays tensors out: per-parameter optimizer state, and layers by their number in the whole model."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "non_homogeneous_layers": True,
        "chained_optim_avoid_prefix": True,
    }


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The inner optimizers that are torch's own; others keep their step in the parameter group."""
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]


def _allocate_state(optimizer: MegatronOptimizer) -> None:
    """Torch's Adam allocates its state in its first step; Megatron's loader wants it to be there before."""
    for adam in _torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts; learning rate, decay and betas stay those of this run's config.

    Megatron's loader copies every state tensor of a parameter, but does not store torch Adam's step among them.
    So the step leaves the state between the two halves of the load, and comes back from the parameter group, where
    Megatron does store it.
    """
    settings = {
        group["wd_mult"]: {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    }
    # Before the load: megatron-core 0.19 finds a parameter group by its learning rates, among other settings.
    for group in state["optimizer"]["param_groups"]:
        group.update(settings[group["wd_mult"]])
    adams = _torch_adams(optimizer)
    hooks = [adam.register_load_state_dict_post_hook(_drop_step) for adam in adams]
    optimizer.load_state_dict(state)
    for hook in hooks:
        hook.remove()
    for adam in adams:
        for parameter_state in adam.state.values():
            parameter_state["step"] = torch.tensor(float(adam.param_groups[0]["step"]))


def _drop_step(adam: torch.optim.Optimizer) -> None:
    for parameter_state in adam.state.values():
        parameter_state.pop("step", None)


def _sharded_state(chunks: Chunks, optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = _saved_metadata() | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(unwrap_model(chunks))
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state
