"""The DeepSpeed engine's weights and optimizer as parts of a checkpoint: the Megatron engine's names, shapes and types.

Every data-parallel rank writes the ranges of parameters that it holds, and reads them, as the Megatron engine does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_depthattn.train.deepspeed_engine.shards import Shard, Shards
from megatron_depthattn.train.megatron_state import MASTER, STATES, sharded_models
from megatron_depthattn.train.rectangles import range_parts
from megatron_depthattn.train.step_folders import SAVED_METADATA


class Template:
    """How the model's weights lie in the whole model; made before ZeRO takes the weights apart.

    Args:
        model: this rank's share of the model.
    """

    def __init__(self, model: GPTModel) -> None:
        tree = sharded_models([model])["model0"]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._others = {key: part for key, part in tree.items() if id(part.data) not in names}
        self.weights = {
            names[id(part.data)]: replace(part, data=part.data.detach().to("meta"))
            for part in tree.values()
            if id(part.data) in names
        }
        """What Megatron says of each parameter; without its values."""

    def tree(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The model's part of a checkpoint with these weights: whole ones, or this rank's shares of some."""
        return {"model0": self._others | weights}


class DeepSpeedState:
    """See `EngineState` in checkpoint.py."""

    def __init__(
        self, template: Template, shards: Shards, named: dict[str, Parameter], param_groups: list[Any]
    ) -> None:
        self._template, self._shards, self._named, self._param_groups = template, shards, named, param_groups
        self._held: dict[str, Shard] = {shard.name: shard for shard in shards.held}
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._loading: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        weights: dict[str, list[ShardedTensor]] = {}
        parts: list[ShardedTensor] = []
        for name, shard in self._held.items():
            whole = self._template.weights[name]
            first, last = (0, shard.size) if is_loading else self._share(shard.size)
            for state in STATES:
                if is_loading:
                    values = self._loading[name, state] = torch.empty(shard.size, dtype=torch.float32)
                else:
                    values = self._shards.read(shard, state)[first:last]
                parts += range_parts(whole, shard.start + first, values, f"optimizer.state.{state}.")
                if not is_loading and state == MASTER and first < last:
                    weights[name] = range_parts(whole, shard.start + first, values.to(whole.data.dtype))
        if is_loading:
            return self.sharded_weights() | {"optimizer": {"param_state": parts}}
        groups = [
            # The optimizer's settings, with the step where Megatron keeps it.
            {key: value for key, value in group.items() if key != "params"} | {"step": self._shards.num_steps}
            for group in self._param_groups
        ]
        optimizer = {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": SAVED_METADATA["distrib_optim_sharding_type"],
            "param_state": parts,
        }
        return self._template.tree(weights) | {"optimizer": optimizer}

    def sharded_weights(self) -> dict[str, Any]:
        return self._template.tree(
            {
                name: replace(whole, data=torch.empty_like(whole.data, device="cpu"))
                for name, whole in self._template.weights.items()
            }
        )

    @torch.no_grad()
    def take(self, loaded: dict[str, Any]) -> None:
        for (name, state), values in self._loading.items():
            self._shards.write(self._held[name], state, values)
        self._loading = {}
        # Only the count of steps: learning rate, decay and betas stay those of this run's config.
        self._shards.num_steps = float(loaded["optimizer"]["optimizer"]["param_groups"][0]["step"])
        self._set_weights(loaded)

    @torch.no_grad()
    def take_weights(self, loaded: dict[str, Any]) -> None:
        for name, shard in self._held.items():
            whole = loaded["model0"][name].float()
            self._shards.write(shard, MASTER, whole.reshape(-1).narrow(0, shard.start, shard.size))
        self._set_weights(loaded)

    def _set_weights(self, loaded: dict[str, Any]) -> None:
        for name, parameter in self._named.items():
            self._shards.set_weights(parameter, loaded["model0"][name])

    def _share(self, size: int) -> tuple[int, int]:
        """Which of a shard's elements this rank writes: all, but for an even share of what every rank holds."""
        if not self._shards.is_replicated:
            return 0, size
        rank, ranks = self._group.rank(), self._group.size()
        return size * rank // ranks, size * (rank + 1) // ranks
