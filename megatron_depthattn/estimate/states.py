"""Bytes of weights, gradients and optimizer on one rank, under either engine. Pure.

Megatron's are its buffers to the byte. DeepSpeed's are counted from its sources (0.19, ``bf16_optimizer.py`` and
``zero/stage_1_and_2.py``, ``stage3.py``) without the padding of its partitions, and not measured; so are FP8 copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_depthattn.config import RunConfig
from megatron_depthattn.estimate.parameters import Buffer, Weight, buffer_of

REDUCE_BUCKET = 50_000_000
"""Numbers, as in train/deepspeed_engine/build.py."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_live_parameters``: numbers that stay gathered from forward to backward."""
MOMENTS = 8
"""Bytes of Adam's two, for one number."""


class ModelStates(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int


def model_states(
    config: RunConfig, chunks: Sequence[Sequence[Weight]], *, ranks: int, data_rank: int | None = None
) -> ModelStates:
    """What one rank holds between steps.

    Args:
        chunks: the parameters of each of the rank's pipeline chunks.
        ranks: data-parallel times context-parallel, which share the optimizer.
        data_rank: which of them; None: the one that has most.
    """
    element = 2 if config.precision.dtype == "bf16" else 4
    if config.engine.name == "megatron":
        asked = range(ranks) if data_rank is None else [data_rank]
        states = _megatron(chunks, ranks, element, asked)
    else:
        states = _deepspeed(config, chunks, ranks)
    if config.precision.fp8 is None:
        return states
    linear = sum(weight.numel for weights in chunks for weight in weights if weight.is_linear)
    # A copy to multiply with forward and one backward; with FP8 weights they take the place of the bf16 ones.
    return states._replace(weights=states.weights + linear * (2 - (element if config.precision.fp8_params else 0)))


def _megatron(chunks: Sequence[Sequence[Weight]], ranks: int, element: int, asked: Sequence[int]) -> ModelStates:
    """A flat buffer of each chunk's weights, one of its gradients, and the largest share in the optimizer."""
    buffers = [buffer_of(weights, ranks=ranks) for weights in chunks]
    numel = sum(buffer.numel for buffer in buffers)
    return ModelStates(element * numel, 4 * numel, max(_share(buffers, rank, ranks, element) for rank in asked))


def _share(buffers: Sequence[Buffer], rank: int, ranks: int, element: int) -> int:
    """Two moments and, unless the weights themselves are fp32, a copy; a step count for every piece (torch's AdamW)."""
    pieces = [piece for buffer in buffers for piece in buffer.shard(rank, ranks)]
    return sum(pieces) * (MOMENTS if element == 4 else MOMENTS + 4) + 4 * len(pieces)


def _deepspeed(config: RunConfig, chunks: Sequence[Sequence[Weight]], ranks: int) -> ModelStates:
    element, stage = 2 if config.precision.dtype == "bf16" else 4, config.engine.zero_stage
    numel = sum(weight.numel for weights in chunks for weight in weights)
    if stage == 0:
        return ModelStates(element * numel, 4 * numel, MOMENTS * numel)
    share = -(-numel // ranks)
    bucket = 4 * min(REDUCE_BUCKET, numel)
    gathered = min(numel, LIVE_PARAMETERS) if stage == 3 else 0
    return ModelStates(
        weights=element * ((share if stage == 3 else numel) + gathered),
        gradients=(4 * numel if stage == 1 else 4 * share) + bucket,
        optimizer=0 if config.engine.offload_optimizer else (MOMENTS + 4) * share,
    )
