"""Which part of every parameter's gradient and optimizer state this rank holds, the same questions at every ZeRO stage;
what is done with the gradients, and the parts as those of a checkpoint.

A `Shard` is a range of the parameter's flattened elements. Stage 0 holds all of them on every data-parallel rank.
Stages 1 and 2 cut the parameters of a group, laid end to end, into equal parts: a rank may hold a piece of a parameter,
or none. Stage 3 cuts every parameter by itself. The private names of DeepSpeed that this needs are in this file.

DeepSpeed sums gradients over data-parallel ranks. Three things are left, each silent when it is forgotten:

- The weight of a norm that works on a rank's own positions (sequence parallel) or own heads (q and k norms) has on each
  tensor rank a part of its gradient. Megatron sums them in `finalize_model_grads`, which DeepSpeed does not call.
- The norm of the whole gradient counts a weight that is cut over tensor ranks on all of them, any other on one.
- Whether it is finite must be known before the step, and on all ranks alike.

In a checkpoint the names, shapes and types are those of the Megatron engine. Every data-parallel rank writes the ranges
of parameters that it holds, and reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import utils
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import Parameter

from megatron_depthattn.train.megatron_state import MASTER, STATES, fresh_adam_state, range_parts, sharded_models
from megatron_depthattn.train.step import clip_factor, squared_norm
from megatron_depthattn.train.step_folders import SAVED_METADATA

_HEAD_NORMS = ("q_layernorm", "k_layernorm")


class Shard(NamedTuple):
    """Elements ``start`` to ``start + size`` of a parameter's flattened elements, in the whole parameter's order."""

    name: str
    parameter: Parameter
    start: int
    size: int


class Shards:
    """Stage 0: everything, on every data-parallel rank."""

    is_replicated = True

    def __init__(self, named: dict[str, Parameter], optimizer: torch.optim.Optimizer, engine: Any) -> None:
        self._named, self._optimizer, self._engine = named, optimizer, engine
        for flat in self._flat_parameters():  # torch allocates in its first step; checkpoints may come before
            optimizer.state[flat] = fresh_adam_state(flat)
        self.held = list(self._shards())

    def gradient(self, shard: Shard) -> Tensor:
        """Fp32 ``[size]``, reduced over data-parallel ranks; between the last backward and the step."""
        return shard.parameter.grad.view(-1)  # type: ignore[union-attr]

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """Replace what `gradient` returned; that may have been it itself, or a copy."""
        self.gradient(shard).copy_(value)

    def read(self, shard: Shard, state: str) -> Tensor:
        """Fp32 ``[size]``: one of `STATES`."""
        return (shard.parameter.data if state == MASTER else self._optimizer.state[shard.parameter][state]).view(-1)

    def write(self, shard: Shard, state: str, value: Tensor) -> None:
        """Set what `read` reads."""
        self.read(shard, state).copy_(value)

    def set_weights(self, parameter: Parameter, value: Tensor) -> None:
        """Set a whole weight as the model computes with it, from a value that is the same on all ranks."""
        parameter.data.copy_(value)

    @property
    def num_steps(self) -> float:
        """Steps that the optimizer has taken."""
        return float(next(iter(self._optimizer.state.values()))["step"])

    @num_steps.setter
    def num_steps(self, value: float) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(value)

    def _flat_parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _shards(self) -> Iterator[Shard]:
        for name, parameter in self._named.items():
            yield Shard(name, parameter, 0, parameter.numel())


class FlatShards(Shards):
    """Stages 1 and 2, also with the separate optimizer class that DeepSpeed takes for bf16 at stage 1."""

    is_replicated = False

    def gradient(self, shard: Shard) -> Tensor:
        parameter: Any = shard.parameter
        gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        if gradient.numel() != shard.size:  # bf16 at stage 1: the whole gradient, of which this rank steps a part
            gradient = gradient.narrow(0, shard.start, shard.size)
        return gradient

    def read(self, shard: Shard, state: str) -> Tensor:
        parameter: Any = shard.parameter
        mapping = parameter._hp_mapping
        if state == MASTER:
            return mapping.hp_fragment
        (flat,) = self._optimizer.param_groups[mapping.param_group_index]["params"]
        return self._optimizer.state[flat][state].narrow(0, mapping.hp_fragment_address.start, shard.size)

    def _shards(self) -> Iterator[Shard]:
        for name, parameter in self._named.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                address = mapping.lp_fragment_address
                yield Shard(name, parameter, address.start, address.numel)


class PartitionShards(Shards):
    """Stage 3. DeepSpeed's getters may return copies, and its setters want the padding at a partition's end as well."""

    is_replicated = False

    def gradient(self, shard: Shard) -> Tensor:
        return utils.safe_get_local_grad(shard.parameter)[: shard.size]

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        utils.safe_set_local_grad(shard.parameter, _padded(shard, value))

    def read(self, shard: Shard, state: str) -> Tensor:
        if state == MASTER:
            return utils.safe_get_local_fp32_param(shard.parameter)[: shard.size]
        return utils.safe_get_local_optimizer_state(shard.parameter, state)[: shard.size]

    def write(self, shard: Shard, state: str, value: Tensor) -> None:
        if state == MASTER:
            utils.safe_set_local_fp32_param(shard.parameter, _padded(shard, value))
        else:
            utils.safe_set_local_optimizer_state(shard.parameter, _padded(shard, value), state)

    def set_weights(self, parameter: Parameter, value: Tensor) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def _flat_parameters(self) -> Iterator[Tensor]:
        yield from self._engine.optimizer.fp32_partitioned_groups_flat

    def _shards(self) -> Iterator[Shard]:
        for name, whole in self._named.items():
            parameter: Any = whole
            size = parameter.ds_tensor.numel()
            start = size * torch.distributed.get_rank(parameter.ds_process_group)
            if start < parameter.ds_numel:
                yield Shard(name, parameter, start, min(size, parameter.ds_numel - start))


STAGES = {0: Shards, 1: FlatShards, 2: FlatShards, 3: PartitionShards}


def _padded(shard: Shard, value: Tensor) -> Tensor:
    whole = value.new_zeros(shard.parameter.ds_tensor.numel())  # type: ignore[attr-defined]
    whole[: shard.size] = value
    return whole


# ---- gradients


@torch.no_grad()
def sum_over_tensor_ranks(shards: Shards, device: torch.device) -> None:
    """Complete the gradients of which every tensor rank has a part.

    They are summed on ``device``, where the backend takes them; those of an offloaded optimizer lie in host memory.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    partial = [
        shard
        for shard in shards.held
        if getattr(shard.parameter, "sequence_parallel", False) or any(name in shard.name for name in _HEAD_NORMS)
    ]
    gradients = [shards.gradient(shard) for shard in partial]
    if not gradients:
        return
    flat = _flatten_dense_tensors(gradients).to(device)
    dist.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())
    flat = flat.to(gradients[0].device)
    for shard, summed in zip(partial, _unflatten_dense_tensors(flat, gradients), strict=True):
        shards.set_gradient(shard, summed)


def squared_gradient_norm(shards: Shards, device: torch.device) -> Tensor:
    """What this rank adds to the squared norm of the whole gradient, fp64 []."""
    counts_here = not shards.is_replicated or parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    held = [shard for shard in shards.held if counts_here and param_is_not_tensor_parallel_duplicate(shard.parameter)]
    return squared_norm([shards.gradient(shard) for shard in held], device)


@torch.no_grad()
def clip(shards: Shards, grad_norm: float, largest: float) -> None:
    """Scale the gradient down to the norm ``largest``."""
    factor = clip_factor(grad_norm, largest)
    if factor < 1.0:
        for shard in shards.held:
            shards.set_gradient(shard, shards.gradient(shard).mul_(factor))


# ---- checkpoints


class Template:
    """How a model's weights lie in the whole model; made before ZeRO takes the weights apart."""

    def __init__(self, model: GPTModel) -> None:
        tree = sharded_models([model])["model0"]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._others = {key: part for key, part in tree.items() if id(part.data) not in names}
        parts = {names[id(part.data)]: part for part in tree.values() if id(part.data) in names}
        self.weights = {name: replace(part, data=part.data.detach().to("meta")) for name, part in parts.items()}
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
        step = {"step": self._shards.num_steps}  # where Megatron keeps it, among the optimizer's settings
        groups = [{key: group[key] for key in group if key != "params"} | step for group in self._param_groups]
        optimizer = {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": SAVED_METADATA["distrib_optim_sharding_type"],
            "param_state": parts,
        }
        return self._template.tree(weights) | {"optimizer": optimizer}

    def sharded_weights(self) -> dict[str, Any]:
        wholes = self._template.weights.items()
        return self._template.tree(
            {name: replace(x, data=torch.empty_like(x.data, device="cpu")) for name, x in wholes}
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
