"""Checkpoints in Megatron's distributed format: weights, optimizer, schedule and position, loadable under any layout
and by any engine.

Every tensor is stored under its name in the whole model, so tensor, pipeline, virtual pipeline and data-parallel sizes
may all differ between saving and loading. `save.py` writes, `start.py` decides which folder a run starts from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_depthattn.hf.model_config import CHOICES, effective_method
from megatron_depthattn.methods.definitions import DEFINITIONS
from megatron_depthattn.model.source_plan import default_stride
from megatron_depthattn.switches import MODEL_SWITCHES
from megatron_depthattn.train.megatron_state import set_weights, sharded_models
from megatron_depthattn.train.parent import Parent, parent_of, stages_passed_over, takeover_lines
from megatron_depthattn.train.step_folders import GENERATION, Progress
from megatron_depthattn.train.step_reader import StepReader, read_common

RNG = "rng_state"
_MIXING = (
    "model.num_loops",
    *(f"model.depth_attention.{key}" for key in ("enabled", *CHOICES, "stride", "recent_window")),
)


def checkpoint_state(
    state: EngineState, scheduler: OptimizerParamScheduler | None, *, config: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """What a checkpoint holds, for `CheckpointSaver.save`; call on all ranks.

    Args:
        config: the resolved run config, kept in the checkpoint for tools.
        more: further plain values that describe the run, equal on all ranks.
    """
    parts = state.sharded(is_loading=False) | {"config": config, **more}
    if scheduler is not None:
        parts |= {"scheduler": scheduler.state_dict(), RNG: sharded_rng_state()}
    return parts


class EngineState(Protocol):
    """An engine's weights and optimizer, as parts of a checkpoint under the names that every engine uses."""

    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        """What ``dist_checkpointing`` saves, or fills: ``model0``, ... and ``optimizer``. Call on all ranks."""

    def sharded_weights(self) -> dict[str, Any]:
        """The weights alone, to be filled."""

    def take(self, loaded: dict[str, Any]) -> None:
        """Resume from what was loaded into `sharded`."""

    def take_weights(self, loaded: dict[str, Any]) -> None:
        """Begin with what was loaded into `sharded_weights`, and an optimizer that has not stepped."""


class Loaded(NamedTuple):
    """What a checkpoint says about the run that saved it, or about the one that begins with it."""

    progress: Progress
    corpus: str | None = None
    """Digest of the corpus that it read."""
    generation: dict[str, Any] | None = None
    """Generation config of the imported model that it started from."""
    notes: Sequence[str] = ()
    """What a new run takes over, what it begins anew, and how it mixes otherwise than the model that it starts from."""
    parent: Parent | None = None
    """What the run has begun with, if not with initial weights."""
    stages: Sequence[Sequence[Any]] | None = None
    """In which proportions its streams were read: each a `config.stages.Stage`. None: in their own alone."""
    common: dict[str, Any] | None = None
    """All that the parent says, where a new run begins."""


def load_checkpoint(
    folder: Path,
    state: EngineState,
    scheduler: OptimizerParamScheduler | None = None,
    *,
    config: dict[str, Any] | None = None,
    is_parent: bool = False,
) -> Loaded:
    """Load a step folder that was saved under any layout, by any engine, into this one's weights and optimizer.

    A parent, or a folder without optimizer state (an imported model), gives its weights to a new run, which starts at
    step 0; that run may choose its own data, seed and Depth-Attention.

    Args:
        config: this run's config, to be compared with the one that saved: the weights of two models that compute
            different functions can have the same names and shapes.
        is_parent: begin a new run, with the optimizer's state as ``checkpoint.start_optimizer`` says.

    Raises:
        ValueError: the checkpoint is of another model or of other data, or has no optimizer's state to be taken.
        CheckpointException: torch's, which is no `Exception`: a weight is missing or has another shape; it is named.
    """
    common = read_common(folder)
    if not isinstance(common.get("config"), dict):
        raise ValueError(f"{folder} does not say which model it holds: it was not written by this package")
    has_run = "scheduler" in common
    resumes = has_run and not is_parent
    takes_optimizer = resumes or (is_parent and config is not None and config["checkpoint"]["start_optimizer"])
    if takes_optimizer and not has_run:
        raise ValueError(
            f"checkpoint.start_optimizer=true, but {folder} holds weights alone (it was imported or averaged): set "
            "checkpoint.start_optimizer=false"
        )
    if config is not None:
        settings = _fixed_in_a_run if resumes else _fixed_by_weights
        before, now = settings(common["config"]), settings(config)
        if is_parent and takes_optimizer:
            name = "optimizer.name"  # it decides which state there is
            before[name], now[name] = (_fixed_in_a_run(of)[name] for of in (common["config"], config))
        changed = [
            f"{key} (was {before.get(key)}, is {value})"
            for key, value in now.items()
            if before.get(key) != value and (key in before or key not in _MIXING)  # what it mixed before, if it did
        ]
        if changed:
            mixing = [key for key in _MIXING if key in before and before[key] != now.get(key)]
            again = f" ({' '.join(f'{key}={before[key]}'.lower() for key in mixing)})" if mixing else ""
            other = "checkpoint.start_from=null" if is_parent else "another run.dir with checkpoint.load=null"
            if (
                takes_optimizer
                and is_parent
                and len(changed) == 1
                and before["optimizer.name"] != now["optimizer.name"]
            ):
                other = "checkpoint.start_optimizer=false, with the weights alone"
            raise ValueError(
                f"{folder} belongs to a run with other settings: {', '.join(changed)}. Set them as they were{again}, "
                f"or start a new run: {other}."
            )
    loaded: dict[str, Any] = {}
    if takes_optimizer:
        generators = {RNG: sharded_rng_state()} if resumes else {}
        loaded = _load(folder, state.sharded(is_loading=True) | generators)
        state.take(loaded)
    else:
        state.take_weights(_load(folder, state.sharded_weights()))
    generation = common.get(GENERATION)
    if not resumes:
        if config is None:
            return Loaded(Progress(), None, generation)
        parent = parent_of(folder, common, config, takes_optimizer=takes_optimizer)
        lines = takeover_lines(parent, common, config) + changed_function(common["config"], config)
        return Loaded(Progress(), None, generation, lines, parent, stages_passed_over(common, config), common)
    if RNG in loaded:  # saved under these tensor and pipeline sizes
        restore_generators(loaded[RNG])
    if scheduler is not None:
        scheduler.load_state_dict(common["scheduler"])
    known = common.get("parent")
    return Loaded(
        Progress(**common["progress"]),
        common.get("corpus"),
        generation,
        parent=Parent(**known) if known else None,
        stages=common.get("stages"),
    )


def changed_function(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How a run mixes otherwise than the model whose weights alone it starts from, by their configs; one line each."""
    before, now = _fixed_in_a_run(before), _fixed_in_a_run(now)
    return [
        f"note: {key} is {now.get(key)}; the weights were trained with {before.get(key)}"
        for key in _MIXING
        if before.get(key) != now.get(key) and None not in (before.get(key), now.get(key))
    ]


def load_weights(folder: Path, models: Sequence[torch.nn.Module]) -> None:
    """Load the weights alone, of a step folder that was saved under any layout, into this rank's bare models."""
    set_weights(models, _load(folder, sharded_models(models)))


def _load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill ``state`` from the folder, but for FP8 scaling state that it does not hold: the modules keep their own.

    Megatron unpickles what it finds, with whatever code that names. So everything that it will unpickle is read here
    before, by a reader that runs none: `.metadata`, the common state, and the objects that this rank wants.

    Raises:
        ValueError: the folder holds what no checkpoint does.
    """
    reader = StepReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    _, state = extract_matching_values(
        state, lambda value: isinstance(value, ShardedObject) and value.unique_key not in stored
    )
    read_common(folder)
    reader.read_objects({value.unique_key for value in nested_values(state) if isinstance(value, ShardedObject)})
    return dist_checkpointing.load(state, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED)


def _fixed_by_weights(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without which the weights are of another model, by their keys."""
    free = ("spec", "max_position_embeddings", "init_std", "num_loops", "depth_attention", "method", *DEFINITIONS)
    free += MODEL_SWITCHES
    fixed = {f"model.{key}": value for key, value in config["model"].items() if key not in free}
    shared = effective_method(config["model"])
    if shared not in DEFINITIONS:
        return fixed | {"model.method": "vanilla or depth_attention"}  # the same weights
    settings = {f"model.{shared}.{key}": value for key, value in config["model"][shared].items()}
    return fixed | {"model.method": shared} | settings


def _fixed_in_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run may not change, by their keys; how things are computed may change."""
    model, depth = config["model"], config["model"]["depth_attention"]
    fixed = _fixed_by_weights(config)
    fixed |= {f"model.{key}": model[key] for key in ("init_std", "num_loops")}
    fixed["model.depth_attention.enabled"] = effective_method(model) == "depth_attention"
    if fixed["model.depth_attention.enabled"]:
        mixing = {key: depth[key] for key in (*CHOICES, "recent_window")}
        half = default_stride(model["num_layers"], model["num_loops"], depth["loop_sources"])
        mixing["stride"] = depth["stride"] or half
        if model["num_loops"] == 1:
            del mixing["loop_sources"]  # either rule says the same
        fixed |= {f"model.depth_attention.{key}": value for key, value in mixing.items()}
    for section, key in (("run", "seed"), ("data", "sequence_length"), ("data", "shuffle")):
        fixed[f"{section}.{key}"] = config[section][key]
    fixed["data.document_mask"] = config["data"].get("document_mask", False)
    fixed["data.skip_samples"] = config["data"].get("skip_samples", 0)
    train = config.get("train", {})
    fixed["train.batch_ramp"] = train.get("batch_ramp")
    if fixed["train.batch_ramp"]:  # a schedule of samples, all of whose batch sizes must stay as they were
        fixed["train.global_batch_size"] = train["global_batch_size"]
    fixed["optimizer.mup"] = config.get("optimizer", {}).get("mup")
    streams = config["data"].get("streams") or []
    fixed["optimizer.name"] = config.get("optimizer", {}).get("name", "adamw")
    fixed["data.streams' proportions"] = [stream["proportion"] for stream in streams]
    return fixed


# ---- random number generators: nothing in training draws from them today (no dropout; the order of samples is a
# function of seed and position). They are kept so that what is added later, by us or by a user, resumes where it was.


def sharded_rng_state() -> ShardedObject:
    """This rank's generators, one set per tensor and pipeline rank; data-parallel ranks share rank 0's.

    Another tensor or pipeline size has no such entry: there the generators stay as they were seeded.
    """
    groups = (parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_tensor_model_parallel_group())
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    sizes, place = tuple(group.size() for group in groups), tuple(group.rank() for group in groups)
    return ShardedObject(RNG, _generators(), sizes, place, replica_id=replica)


def _generators() -> dict[str, Any]:
    """Plain numbers, lists and tensors: nothing that needs code to be loaded."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "device": _device(),
        "python": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Set this process's generators to what `sharded_rng_state` held."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["device"] == _device():  # a GPU's generators and a CPU's have states of different kinds
        torch.cuda.set_rng_state(state["cuda"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
