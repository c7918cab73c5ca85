"""What DeepSpeed leaves undone between the last backward and the optimizer's step: tensor ranks.

DeepSpeed sums gradients over data-parallel ranks. Three things are left, each silent when it is forgotten:

- The weight of a norm that works on a rank's own positions (sequence parallel) or own heads (q and k norms) has on each
  tensor rank a part of its gradient. Megatron sums them in `finalize_model_grads`, which DeepSpeed does not call.
- The norm of the whole gradient counts a weight that is cut over tensor ranks on all of them, any other on one.
- Whether it is finite must be known before the step, and on all ranks alike.

All of it works on the shards that a rank holds anyway: tensor ranks cut their gradients at the same places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_depthattn.train.step import clip_factor, squared_norm

if TYPE_CHECKING:
    from megatron_depthattn.train.deepspeed_engine.shards import Shards

_HEAD_NORMS = ("q_layernorm", "k_layernorm")


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
