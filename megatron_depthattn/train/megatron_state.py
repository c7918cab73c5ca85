"""The Megatron engine's weights and optimizer as parts of a checkpoint.

Sharded optimizers cut parameters without regard to their rows. A range of a flattened matrix is at most three
rectangles: the end of a row, whole rows, and the beginning of one. Rectangles of any size and place are ordinary parts
of a checkpoint, so each data-parallel rank writes and reads its own range, under the names and shapes that every other
layout uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_depthattn.parallel.launch_env import pickled_fp8_scales_allowed
from megatron_depthattn.train.build import Chunks, finish_param_gather, torch_adams
from megatron_depthattn.train.muon import MOMENTUM, distributed_parts, matrix_states
from megatron_depthattn.train.step_folders import SAVED_METADATA
from megatron_depthattn.train.step_reader import check_fp8_state

FP8_STATE = "_extra_state"
"""How names of FP8 scaling state end."""
MASTER = "param"
"""Megatron's name for the fp32 weights that the optimizer steps."""
Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, an entry for each dimension."""
STATES = (MASTER, "exp_avg", "exp_avg_sq")


class MegatronState:
    """See `EngineState` in checkpoint.py.

    Args:
        chunks: this rank's pipeline chunks.
        optimizer: None for the weights alone.
    """

    def __init__(self, chunks: Chunks, optimizer: MegatronOptimizer | None) -> None:
        self._chunks, self._models, self._optimizer = chunks, unwrap_model(chunks), optimizer
        self._masters: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        """Every data-parallel rank writes and reads the ranges of parameters that it steps."""
        finish_param_gather(self._chunks)
        state = sharded_models(self._models)
        wholes = {id(part.data): part for part in nested_values(state) if isinstance(part.data, torch.nn.Parameter)}
        # A checkpoint holds weights in a plain dtype. Only now: the optimizer knows its weights by identity.
        force_all_tensors_to_non_fp8(state)
        if self._optimizer is None:
            return state
        _allocate_state(self._optimizer)
        weights: dict[int, list[ShardedTensor]] = {id(whole): [] for whole in wholes.values()}
        states: list[ShardedTensor] = []
        for parameter, start, tensors in _ranges(self._optimizer):
            whole, master = wholes[id(parameter)], tensors[MASTER]
            if not is_loading:
                weights[id(whole)] = range_parts(whole, start, whole.data.reshape(-1).narrow(0, start, master.numel()))
            elif parameter.dtype == torch.float32:  # the master is a view of the weight, which is loaded as well
                tensors[MASTER] = torch.empty_like(master)
                self._masters.append((master, tensors[MASTER]))
            for name, values in tensors.items():
                states += range_parts(whole, start, values, f"optimizer.state.{name}.")
        if is_loading:
            return state | {"optimizer": {"param_state": states}}
        shares = {
            model: {name: weights.get(id(part), part) for name, part in parts.items() if weights.get(id(part)) != []}
            for model, parts in state.items()
        }
        kind = {"param_state_sharding_type": SAVED_METADATA["distrib_optim_sharding_type"]}
        (adamw,) = distributed_parts(self._optimizer)  # Muon has nothing to count
        progress = adamw.state_dict()
        for group in progress["optimizer"]["param_groups"]:
            group.setdefault("step", 0)  # TransformerEngine's Adam before its first step
        return shares | {"optimizer": progress | kind | {"param_state": states}}

    def sharded_weights(self) -> dict[str, Any]:
        finish_param_gather(self._chunks)
        state = sharded_models(self._models)
        force_all_tensors_to_non_fp8(state)  # Megatron-Core 0.19 would round halves of an FP8 weight by themselves
        return state

    def take(self, loaded: dict[str, Any]) -> None:
        set_weights(self._models, loaded)
        for master, values in self._masters:
            master.data.copy_(values)
        self._masters.clear()
        if self._optimizer is not None:
            _set_progress(self._optimizer, loaded["optimizer"])

    def take_weights(self, loaded: dict[str, Any]) -> None:
        set_weights(self._models, loaded)
        if self._optimizer is not None:
            # Its fp32 weights begin as they were loaded: the model's, if they are FP8, are rounded already.
            is_fp8 = get_model_config(self._models[0]).fp8_param
            self._optimizer.reload_model_params(loaded if is_fp8 else None)


def sharded_models(models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Each chunk's weights under their names in the whole model."""
    metadata = SAVED_METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}  # type: ignore[operator]


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


def _allocate_state(optimizer: MegatronOptimizer) -> None:
    """Adam allocates its state in its first step; a checkpoint may come before."""
    for adam in torch_adams(optimizer):
        for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
            adam.state[parameter] = fresh_adam_state(parameter)
    for part in distributed_parts(optimizer):
        if not part.optimizer.state:  # TransformerEngine's Adam: Megatron knows how, but leaves the moments unset
            part.load_state_dict(part.state_dict())
            for state in part.optimizer.state.values():
                torch._foreach_zero_(list(state.values()))


def fresh_adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """What torch's Adam allocates for a parameter in its first step."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter.data), "exp_avg_sq": torch.zeros_like(parameter.data)}


def _ranges(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, Tensor]]]:
    """What this data-parallel rank steps: a parameter, the first of its flattened elements, and their flat states."""
    for part in distributed_parts(optimizer):
        for parameter in part.model_param_gbuf_map:
            start = part._get_model_param_range_map(parameter)["param"].start
            tensors = part._get_main_param_and_optimizer_states(parameter)
            yield parameter, start, {name: tensors[name] for name in STATES}
    for weight, master, momentum in matrix_states(optimizer):
        yield weight, 0, {MASTER: master.view(-1), MOMENTUM: momentum.view(-1)}


def _set_progress(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Set the step counts; learning rate, decay and betas stay those of this run's config.

    Megatron keeps the step in the parameter groups, and torch's Adam beside each moment.
    """
    (adamw,) = distributed_parts(optimizer)
    saved = [group["step"] for group in state["optimizer"]["param_groups"] if group.get("step") is not None]
    step = {"step": int(saved[0])} if saved else {}  # torch's Adam saves a float, TransformerEngine's takes an integer
    # This run's groups, before the load: Megatron finds a parameter group by its settings.
    state["optimizer"]["param_groups"] = [
        {key: value for key, value in group.items() if key not in ("params", "step")} | step
        for group in adamw.param_groups
    ]
    adamw.load_state_dict({key: value for key, value in state.items() if not key.startswith("param_state")})
    for adam in torch_adams(optimizer):
        for parameter, parameter_state in adam.state.items():
            parameter_state["step"] = torch.full((), float(adam.param_groups[0]["step"]), device=parameter.device)


# ---- ranges of flattened elements


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[Rectangle]:
    """The rectangles that elements ``start`` to ``stop`` of a flattened tensor consist of, in their order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        yield from _in_row(last, start, stop, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, last * row, stop, shape)


def _in_row(index: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Rectangle]:
    begin = index * prod(shape[1:])
    for offsets, sizes in rectangles(start - begin, stop - begin, shape[1:]):
        yield (index, *offsets), (1, *sizes)


def range_parts(
    whole: ShardedTensor | ShardedTensorFactory, start: int, values: Tensor, prefix: str = ""
) -> list[ShardedTensor]:
    """Parts of a checkpoint for some flattened elements of a rank's tensor.

    Args:
        whole: what Megatron says of this rank's tensor: its name, and its place in the whole model's tensor.
        start: the first of the elements.
        values: ``[number of elements]``; the parts are views of it.
        prefix: goes before the tensor's name.
    """
    parts = []
    for begin, piece in _pieces(whole):
        shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        first, last = max(start, begin), min(start + values.numel(), begin + prod(shape))
        for offsets, sizes in rectangles(first - begin, last - begin, shape):
            part = replace(
                piece,
                key=prefix + piece.key,
                data=values.narrow(0, first - start, prod(sizes)).view(sizes),
                dtype=values.dtype,
                local_shape=sizes,
                global_offset=tuple(map(sum, zip(piece.global_offset, offsets, strict=True))),
                axis_fragmentations=None,  # no regular grid
                prepend_axis_num=0,
                replica_id=(*piece.replica_id[:-1], 0),  # data-parallel ranks hold ranges, not copies
            )
            parts.append(part)
            first += prod(sizes)
    return parts


def _pieces(whole: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[int, ShardedTensor]]:
    """The tensors that Megatron stores a rank's tensor as (gate and up are two), each with its first element."""
    if isinstance(whole, ShardedTensor):
        yield 0, replace(whole, data=None)
        return
    for piece in nested_values(replace(whole, data=torch.empty(whole.data.shape, device="meta")).build()):
        assert piece.data.is_contiguous(), f"{piece.key} is no range of the tensor that {whole.key} is made of"
        yield piece.data.storage_offset(), replace(piece, data=None)
