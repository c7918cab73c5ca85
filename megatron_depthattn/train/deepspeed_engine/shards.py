"""Which part of every parameter's gradient and optimizer state this rank holds, the same questions at every ZeRO stage.

A `Shard` is a range of the parameter's flattened elements. Stage 0 holds all of them on every data-parallel rank.
Stages 1 and 2 cut the parameters of a group, laid end to end, into equal parts: a rank may hold a piece of a parameter,
or none. Stage 3 cuts every parameter by itself. The private names of DeepSpeed that this needs are in this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import utils
from torch import Tensor
from torch.nn import Parameter

from megatron_depthattn.train.megatron_state import MASTER


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
            optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }
        self.held = list(self._shards())

    def gradient(self, shard: Shard) -> Tensor:
        """Fp32 ``[size]``, reduced over data-parallel ranks; between the last backward and the step."""
        return shard.parameter.grad.view(-1)  # type: ignore[union-attr]

    def set_gradient(self, shard: Shard, value: Tensor) -> None:
        """Replace what `gradient` returned; that may have been it itself, or a copy."""
        _copy(self.gradient(shard), value)

    def read(self, shard: Shard, state: str) -> Tensor:
        """Fp32 ``[size]``: one of `STATES`."""
        return (shard.parameter.data if state == MASTER else self._state(shard.parameter)[state]).view(-1)

    def write(self, shard: Shard, state: str, value: Tensor) -> None:
        """Set what `read` reads."""
        _copy(self.read(shard, state), value)

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

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        return self._optimizer.state[flat]


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
        return self._state(flat)[state].narrow(0, mapping.hp_fragment_address.start, shard.size)

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
        whole = (
            utils.safe_get_local_fp32_param(shard.parameter)
            if state == MASTER
            else utils.safe_get_local_optimizer_state(shard.parameter, state)
        )
        return whole[: shard.size]

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


def _copy(target: Tensor, value: Tensor) -> None:
    if target.data_ptr() != value.data_ptr():
        target.copy_(value)


def _padded(shard: Shard, value: Tensor) -> Tensor:
    whole = value.new_zeros(shard.parameter.ds_tensor.numel())  # type: ignore[attr-defined]
    whole[: shard.size] = value
    return whole
