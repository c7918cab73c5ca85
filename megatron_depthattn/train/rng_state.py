"""The random number generators of a rank, kept in checkpoints.

Nothing in training draws from them today (no dropout; the order of samples is a function of seed and position). They
are kept so that what is added later, by us or by a user, resumes where it was.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

RNG = "rng_state"


def sharded_rng_state() -> ShardedObject:
    """This rank's generators, one set per tensor and pipeline rank; data-parallel ranks share rank 0's.

    Another tensor or pipeline size has no such entry: there the generators stay as they were seeded.
    """
    tensor, pipeline = (
        (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()),
    )
    return ShardedObject(
        RNG,
        _generators(),
        (pipeline[1], tensor[1]),
        (pipeline[0], tensor[0]),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


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
