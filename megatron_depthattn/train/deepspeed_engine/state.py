"""The DeepSpeed engine's weights and optimizer as parts of a checkpoint: the Megatron engine's names, shapes and types.

What a data-parallel group holds in shards is put together one tensor at a time, in the host memory of its first rank,
which writes it. Loading goes the other way without communication: every rank reads whole tensors and keeps its shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_depthattn.train.deepspeed_engine.shards import MASTER, STATES, Shard, Shards
from megatron_depthattn.train.megatron_state import sharded_models
from megatron_depthattn.train.step_folders import SAVED_METADATA


class Template:
    """How the model's weights lie in the whole model; made before ZeRO takes the weights apart.

    Args:
        model: this rank's share of the model.
    """

    def __init__(self, model: GPTModel) -> None:
        self.tree = sharded_models([model])
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        parts = [part for part in nested_values(self.tree) if self._name(part)]
        self.parts = {self._name(part): part for part in parts}

    def weights(self, tensor: Callable[[str], Tensor]) -> dict[str, Any]:
        """The tree with ``tensor(name)`` for each parameter, in the type of the model's weights."""

        def fill(part: Any) -> Any:
            name = self._name(part)
            return replace(part, data=tensor(name).to(self._dtypes[name])) if name else part

        return dict_list_map_outplace(fill, self.tree)

    def optimizer(self, tensor: Callable[[str, str], Tensor]) -> dict[int, dict[str, Any]]:
        """For each parameter the three fp32 tensors ``tensor(name, state)``, in Megatron's form."""
        return {
            index: {state: _optimizer_part(part, state, tensor(name, state)) for state in STATES}
            for index, (name, part) in enumerate(self.parts.items())
        }

    def _name(self, part: Any) -> str:
        is_weight = isinstance(part, ShardedTensor | ShardedTensorFactory) and isinstance(part.data, Parameter)
        return self._names[id(part.data)] if is_weight else ""


def _optimizer_part(part: Any, state: str, tensor: Tensor) -> Any:
    changes: dict[str, Any] = {"key": f"optimizer.state.{state}.{part.key}", "data": tensor}
    if isinstance(part, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return replace(part, **changes)


class DeepSpeedState:
    """See `EngineState` in checkpoint.py."""

    def __init__(
        self, template: Template, shards: Shards, named: dict[str, Parameter], param_groups: list[Any]
    ) -> None:
        self._template, self._shards, self._named, self._param_groups = template, shards, named, param_groups
        self._held: dict[str, Shard] = {shard.name: shard for shard in shards.held}
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    @torch.no_grad()
    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        read = self._empty if is_loading else self._gathered
        masters = {name: read(name, MASTER) for name in self._named}
        state = self._template.weights(lambda name: masters[name])
        param_state = self._template.optimizer(
            lambda name, key: masters[name].clone() if key == MASTER else read(name, key)
        )
        if not is_loading and self._group.rank() > 0:
            param_state = {}
        state["optimizer"] = {
            "optimizer": {"param_groups": self._groups_without_parameters()},
            "param_state_sharding_type": SAVED_METADATA["distrib_optim_sharding_type"],
            "param_state": param_state,
        }
        return state

    def sharded_weights(self) -> dict[str, Any]:
        return self._template.weights(lambda name: self._empty(name, MASTER))

    @torch.no_grad()
    def take(self, loaded: dict[str, Any]) -> None:
        stored = loaded["optimizer"]["param_state"]
        for index, name in enumerate(self._template.parts):
            for state in STATES:
                self._write(name, state, stored[index][state])
        # Only the count of steps: learning rate, decay and betas stay those of this run's config.
        self._shards.num_steps = float(loaded["optimizer"]["optimizer"]["param_groups"][0]["step"])
        self._set_weights(loaded)

    @torch.no_grad()
    def take_weights(self, loaded: dict[str, Any]) -> None:
        for name, weight in self._loaded_weights(loaded).items():
            self._write(name, MASTER, weight.float())
        self._set_weights(loaded)

    def _set_weights(self, loaded: dict[str, Any]) -> None:
        for name, weight in self._loaded_weights(loaded).items():
            self._shards.set_weights(self._named[name], weight)

    def _loaded_weights(self, loaded: dict[str, Any]) -> dict[str, Tensor]:
        return {name: loaded["model0"][name] for name in self._named}

    def _write(self, name: str, state: str, whole: Tensor) -> None:
        shard = self._held.get(name)
        if shard is not None:
            self._shards.write(shard, state, whole.reshape(-1).narrow(0, shard.start, shard.size))

    def _empty(self, name: str, _: str) -> Tensor:
        return torch.empty(self._template.shapes[name], dtype=torch.float32)

    def _gathered(self, name: str, state: str) -> Tensor:
        """The whole fp32 tensor in host memory on the group's first rank; no data elsewhere."""
        shape, shard = self._template.shapes[name], self._held.get(name)
        is_writer = self._group.rank() == 0
        if self._shards.is_replicated:
            assert shard is not None
            return self._shards.read(shard, state).view(shape).cpu() if is_writer else torch.empty(shape, device="meta")
        whole = torch.zeros(torch.Size(shape).numel(), dtype=torch.float32, device=self._named[name].device)
        if shard is not None:
            whole.narrow(0, shard.start, shard.size).copy_(self._shards.read(shard, state))
        dist.reduce(whole, dst=dist.get_global_rank(self._group, 0), group=self._group)
        return whole.view(shape).cpu() if is_writer else torch.empty(shape, device="meta")

    def _groups_without_parameters(self) -> list[dict[str, Any]]:
        """The optimizer's settings, with the step where Megatron keeps it."""
        return [
            {key: value for key, value in group.items() if key != "params"} | {"step": self._shards.num_steps}
            for group in self._param_groups
        ]
