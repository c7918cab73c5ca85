"""The Megatron engine's weights and optimizer as parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config, unwrap_model

from megatron_depthattn.parallel.launch_env import pickled_fp8_scales_allowed
from megatron_depthattn.train.build import Chunks, finish_param_gather
from megatron_depthattn.train.step_folders import SAVED_METADATA
from megatron_depthattn.train.step_reader import check_fp8_state

FP8_STATE = "_extra_state"
"""How names of FP8 scaling state end."""


class MegatronState:
    """See `EngineState` in checkpoint.py.

    Args:
        chunks: this rank's pipeline chunks.
        optimizer: None for the weights alone.
    """

    def __init__(self, chunks: Chunks, optimizer: MegatronOptimizer | None) -> None:
        self._chunks, self._models, self._optimizer = chunks, unwrap_model(chunks), optimizer

    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        finish_param_gather(self._chunks)
        state = sharded_models(self._models)
        if self._optimizer is not None:
            if is_loading:
                _allocate_state(self._optimizer)
            state["optimizer"] = self._optimizer.sharded_state_dict(
                dict(state), is_loading=is_loading, metadata=_metadata()
            )
        if not is_loading:  # Megatron does it by itself where it loads
            # A checkpoint holds weights in a plain dtype. Only now: the optimizer knows its weights by identity.
            force_all_tensors_to_non_fp8(state)
        return state

    def sharded_weights(self) -> dict[str, Any]:
        finish_param_gather(self._chunks)
        return sharded_models(self._models)

    def take(self, loaded: dict[str, Any]) -> None:
        set_weights(self._models, loaded)
        if self._optimizer is not None:
            _load_optimizer(self._optimizer, loaded["optimizer"])

    def take_weights(self, loaded: dict[str, Any]) -> None:
        set_weights(self._models, loaded)
        if self._optimizer is not None:
            self._optimizer.reload_model_params()


def sharded_models(models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Each chunk's weights under their names in the whole model."""
    return {
        f"model{index}": model.sharded_state_dict(metadata=_metadata())  # type: ignore[operator]
        for index, model in enumerate(models)
    }


def set_weights(models: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Load what `sharded_models` was filled with.

    FP8 scaling state is loaded where it is used, by delayed scaling; elsewhere modules keep their own, which is empty.
    """
    for index, model in enumerate(models):
        state, megatron = loaded[f"model{index}"], get_model_config(model)
        if not (megatron.fp8 and megatron.fp8_recipe == "delayed"):
            state = {key: value for key, value in state.items() if not key.endswith(FP8_STATE)}
        for key, value in state.items():
            if key.endswith(FP8_STATE):
                check_fp8_state(key, value)
        with pickled_fp8_scales_allowed():
            keys = model.load_state_dict(state, strict=False)
        lost = [key for key in keys.missing_keys if not key.endswith(FP8_STATE)] + keys.unexpected_keys
        assert not lost, f"Megatron loaded other weights than it asked for: {lost}"


def _metadata() -> dict[str, Any]:
    return SAVED_METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


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
        if group.get("step") is not None:  # torch's Adam saves a float, TransformerEngine's takes an integer only
            group["step"] = int(group["step"])
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
