"""Muon for the matrices of the decoder's layers, AdamW for the rest, through Megatron-Core 0.19's own code.

An update is the momentum of a matrix's gradient with its singular values brought near 1 by a few Newton-Schulz steps
(https://kellerjordan.github.io/posts/muon/), times ``extra_scale_factor * sqrt(max(rows, columns))``: 0.2 gives it the
root mean square of AdamW's updates, so AdamW's learning rate and decay carry over (Moonlight, arXiv 2502.16982).

- A matrix is a weight of two dimensions that is neither the embedding, tied or not, nor the output layer, nor a
  method's own (mHC's projection: three small ones in one). Query, key and value are three matrices; gate and up, as in
  Megatron-Core, are one.
- Tensor ranks gather the momentum of a matrix and each computes all of it (``duplicated``; ``blockwise`` would
  orthogonalize each rank's share, another function). Rows that lie in another order, as those of gate and up do on
  several ranks, come out in that order.
- Every data-parallel rank steps whole matrices, those that a bucket of the gradient reduction leaves on it
  (`layout`); AdamW's parameters lie in buffers of their own, in Megatron's distributed optimizer.
- fp32 runs multiply in fp32; bf16 runs do these steps in bf16, as its authors do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_depthattn.config import OptimizerConfig

MOMENTUM = "momentum_buffer"
"""The package's name of a matrix's only state."""


def muon_fields(settings: OptimizerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The run's keys as fields of Megatron's ``OptimizerConfig``."""
    muon = settings.muon
    return {
        "optimizer": "muon",
        "use_layer_wise_distributed_optimizer": True,
        "muon_momentum": muon.momentum,
        "muon_nesterov": muon.nesterov,
        "muon_num_ns_steps": muon.ns_steps,
        "muon_coefficient_type": muon.coefficients,
        "muon_scale_mode": muon.scale_mode,
        "muon_extra_scale_factor": muon.extra_scale_factor,
        "muon_fp32_matmul_prec": "highest" if dtype == torch.float32 else "medium",
        "muon_split_qkv": True,
        "muon_tp_mode": "duplicated",
        # Or Megatron does not wrap Muon's optimizer at all. Weights that are fp32 are stepped themselves either way.
        "bf16": True,
    }


def layout(model: torch.nn.Module, ddp: DistributedDataParallelConfig, *, one_bucket: bool) -> Any:
    """Where ``model``'s weights lie in the buffers of its data-parallel wrapper: no matrix crosses a rank's share.

    Args:
        one_bucket: of each buffer, as where Megatron's wrapper does not overlap the reduction.
    """
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer as LayerWise
    from megatron.core.optimizer.layer_wise_optimizer import tag_params_for_buffer_routing

    tag_params_for_buffer_routing([model])
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    default = max(40_000_000, 1_000_000 * ranks)  # the wrapper's own
    bucket_size = None if one_bucket or not ddp.overlap_grad_reduce else ddp.bucket_size or default
    return LayerWise.compute_full_param_layout(list(model.parameters()), bucket_size, ranks, ddp)


def distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The parts of ``optimizer`` that are Megatron's distributed optimizer."""
    return [part for part in optimizer.chained_optimizers if not isinstance(part, ChainedOptimizer)]


def matrix_states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor, Tensor]]:
    """Of every matrix that this rank steps with Muon: the weight, its fp32 copy (or itself), and the momentum."""
    for layer_wise in optimizer.chained_optimizers:
        for part in layer_wise.chained_optimizers if isinstance(layer_wise, ChainedOptimizer) else ():
            part.init_state_fn(part.optimizer)
            weights = [*part.float16_groups, *part.fp32_from_fp32_groups]
            masters = [*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups]
            for group, copies in zip(weights, masters, strict=True):
                for weight, master in zip(group, copies, strict=True):
                    yield weight, master, part.optimizer.state[master][MOMENTUM]
