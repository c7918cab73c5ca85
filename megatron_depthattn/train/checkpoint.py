"""Checkpoints in Megatron's distributed format: weights, optimizer, schedule and position, loadable under any layout.

Every tensor is stored under its name in the whole model, so tensor, pipeline, virtual pipeline and data-parallel sizes
may all differ between saving and loading. `save.py` writes, `start.py` decides which folder a run starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import FileSystemReader

from megatron_depthattn.model.source_plan import default_stride
from megatron_depthattn.train.build import Chunks
from megatron_depthattn.train.rng_state import RNG, restore_generators, sharded_rng_state
from megatron_depthattn.train.save import CheckpointSaver
from megatron_depthattn.train.step_folders import SAVED_METADATA, Progress

_MIXING = ("model.num_loops", *(f"model.depth_attention.{key}" for key in ("enabled", "stride", "recent_window")))


def save_checkpoint(
    directory: Path,
    progress: Progress,
    chunks: Chunks,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    config: dict[str, Any],
) -> Path:
    """Write one checkpoint, outside of a run's loop; call on all ranks. Arguments as `checkpoint_state`.

    Raises:
        OSError: it could not be written.
    """
    saver = CheckpointSaver(directory)
    saver.save(progress, checkpoint_state(chunks, optimizer, scheduler, config=config))
    outcome = saver.take_outcome()
    assert outcome is not None
    if outcome.error:
        raise OSError(f"{outcome.folder} could not be written: {outcome.error}")
    return outcome.folder


def checkpoint_state(
    chunks: Chunks,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    config: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """What a checkpoint holds, for `CheckpointSaver.save`; call on all ranks.

    Args:
        optimizer: None writes weights only, with ``scheduler`` None as well.
        config: the resolved run config, kept in the checkpoint for tools.
        more: further plain values that tell about the run, equal on all ranks.
    """
    state = _sharded_state(unwrap_model(chunks), optimizer, is_loading=False)
    state |= {"config": config, **more}
    if scheduler is not None:
        state |= {"scheduler": scheduler.state_dict(), RNG: sharded_rng_state()}
    return state


class Loaded(NamedTuple):
    """What a checkpoint says about the run that saved it."""

    progress: Progress
    run_id: str | None = None
    """Identity of the run that saved, for one that goes on."""
    corpus: str | None = None
    """Digest of the corpus that it read."""
    notes: Sequence[str] = ()
    """How this run mixes otherwise than the model whose weights it starts from, one line a setting."""


def load_checkpoint(
    folder: Path,
    chunks: Chunks,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    *,
    config: dict[str, Any] | None = None,
) -> Loaded:
    """Load a step folder that was saved under any layout into this one's chunks, optimizer and scheduler.

    A folder without optimizer state (an imported model) gives its weights to a new run, which starts at step 0; that
    run may choose its own data, seed and Depth-Attention.

    Args:
        config: this run's config, to be compared with the one that saved: the weights of two models that compute
            different functions can have the same names and shapes.

    Raises:
        ValueError: the checkpoint is of another model or of other data.
        RuntimeError: a weight is missing or has another shape (Megatron names it).
    """
    common = dist_checkpointing.load_common_state_dict(str(folder))
    has_run = "scheduler" in common
    if config is not None:
        settings = _fixed_in_a_run if has_run else _fixed_by_weights
        _check_same(folder, settings(common["config"]), settings(config))
    if not has_run:
        load_weights(folder, unwrap_model(chunks))
        if optimizer is not None:
            optimizer.reload_model_params()
        return Loaded(Progress(), notes=changed_function(common["config"], config) if config else ())
    if optimizer is not None:
        _allocate_state(optimizer)
    state = _sharded_state(unwrap_model(chunks), optimizer, is_loading=True)
    loaded = _load(folder, state | {RNG: sharded_rng_state()})
    _set_weights(unwrap_model(chunks), loaded)
    if RNG in loaded:  # saved under these tensor and pipeline sizes
        restore_generators(loaded[RNG])
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(common["scheduler"])
    return Loaded(Progress(**common["progress"]), run_id=common.get("run_id"), corpus=common.get("corpus"))


def changed_function(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How a run mixes otherwise than the model whose weights alone it starts from, by their configs; one line each."""
    before, now = _fixed_in_a_run(before), _fixed_in_a_run(now)
    return [
        f"note: {key} is {now.get(key)}; the weights come from a model with {before.get(key)}"
        for key in _MIXING
        if before.get(key) != now.get(key)
    ]


def load_weights(folder: Path, models: Sequence[torch.nn.Module]) -> None:
    """Load the weights alone, of a step folder that was saved under any layout, into this rank's bare models."""
    _set_weights(models, _load(folder, _sharded_state(models, None, is_loading=True)))


def _load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill ``state`` from the folder, but for FP8 scaling state that it does not hold: the modules keep their own."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    _, state = extract_matching_values(
        state, lambda value: isinstance(value, ShardedObject) and value.unique_key not in stored
    )
    return dist_checkpointing.load(state, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED)


def _set_weights(models: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, model in enumerate(models):
        keys = model.load_state_dict(loaded[f"model{index}"], strict=False)
        lost = [key for key in keys.missing_keys if not key.endswith("_extra_state")] + keys.unexpected_keys
        assert not lost, f"Megatron loaded other weights than it asked for: {lost}"


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with another function of the same weights, or with positions of another order of samples."""
    differences = [
        f"{key} (was {before.get(key)}, is {value})" for key, value in now.items() if before.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} belongs to a run with other settings: {', '.join(differences)}. Set them as they were, "
            "or start a new run: another run.dir with checkpoint.load=null."
        )


def _fixed_by_weights(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without which the weights are of another model, by their keys."""
    free = ("spec", "max_position_embeddings", "init_std", "num_loops", "depth_attention")
    return {f"model.{key}": value for key, value in config["model"].items() if key not in free}


def _fixed_in_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run may not change, by their keys; how things are computed may change."""
    model, depth = config["model"], config["model"]["depth_attention"]
    fixed = _fixed_by_weights(config)
    fixed |= {f"model.{key}": model[key] for key in ("init_std", "num_loops")}
    fixed["model.depth_attention.enabled"] = depth["enabled"]
    if depth["enabled"]:
        stride = depth["stride"] or default_stride(model["num_layers"] * model["num_loops"])
        fixed["model.depth_attention.stride"] = stride
        fixed["model.depth_attention.recent_window"] = depth["recent_window"]
    for section, key in (("run", "seed"), ("data", "sequence_length"), ("data", "shuffle")):
        fixed[f"{section}.{key}"] = config[section][key]
    streams = config["data"].get("streams") or []
    fixed["data.streams' proportions"] = [stream["proportion"] for stream in streams]
    return fixed


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


def _sharded_state(
    models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    metadata = SAVED_METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        f"model{index}": model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for index, model in enumerate(models)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state
