"""Memory of one rank, by part, from the run's config. Imports no torch, builds nothing.

Weights, gradients and optimizer follow Megatron's distributed optimizer or DeepSpeed 0.19's stages, without the padding
of flat buffers but for that of Muon's matrices; activations are those of activations.py. The sum is what tensors need
at the peak of a step; the allocator's own losses, CUDA's context and NCCL's buffers come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megatron_depthattn.config import RunConfig, validate
from megatron_depthattn.estimate.activations import ChunkMemory, chunk_memory
from megatron_depthattn.estimate.counts import RankWeights, chunks_of_stage, element_bytes, rank_weights
from megatron_depthattn.estimate.muon import shares

REDUCE_BUCKET = 50_000_000
"""Elements, as in train/deepspeed_engine/engine.py."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_live_parameters``: elements that stay gathered from forward to backward."""
MOMENTS = 8
"""Bytes of Adam's two moments of one element."""
MOMENTUM = 4
"""Of Muon's one."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank at the peak of a training step, but for ``parameters``."""

    parameters: int
    """Elements of the rank's weights."""
    weights: int
    gradients: int
    """Sums over micro-batches, fp32."""
    optimizer: int
    """fp32 copies of the weights, and two moments (of a matrix that Muon steps, one)."""
    activations: int
    """What layers keep for backward, of all micro-batches in flight."""
    sources: int
    """What Depth-Attention or another method keeps above that."""
    payload_buffers: int
    """Pipeline messages that are being sent or received."""
    working: int
    """The largest temporary: what is recomputed at once, or what the output layer's backward takes."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.parameters


def rank_memory(config: RunConfig, world_size: int, *, pipeline_rank: int, on_gpu: bool = True) -> RankMemory:
    """Memory of the ranks of one pipeline stage.

    Args:
        on_gpu: torch's RMSNorm keeps more on a CPU.

    Raises:
        ValueError: the config cannot run on so many ranks, or has no such stage.
    """
    sizes = validate(config, world_size, needs_data=False)
    stages = config.parallel.pipeline
    if not 0 <= pipeline_rank < stages:
        raise ValueError(f"pipeline_rank is {pipeline_rank}, but parallel.pipeline={stages}: give 0 to {stages - 1}.")
    weights = rank_weights(config, pipeline_rank)
    states = _model_states(config, weights, sizes.data_parallel_size * config.parallel.context)
    if config.precision.fp8:  # copies to multiply with forward and backward, of every loop's own
        loops = config.model.num_loops
        copies = 2 - element_bytes(config) if config.precision.fp8_params else 2 * loops  # or they are the weights
        states = states._replace(weights=states.weights + copies * weights.linear)
    own = [chunk_memory(config, chunk, on_gpu=on_gpu) for chunk in chunks_of_stage(config, pipeline_rank)]
    alive = in_flight(
        [chunk.activations + chunk.sources for chunk in own],
        rank=pipeline_rank,
        num_ranks=stages,
        num_microbatches=sizes.num_microbatches,
    )
    return RankMemory(
        parameters=weights.total,
        **states._asdict(),
        activations=_times(alive, [chunk.activations for chunk in own]),
        sources=_times(alive, [chunk.sources for chunk in own]),
        payload_buffers=_payload_buffers(own, alive),
        working=max(chunk.working for chunk in own),
    )


class ModelStates(NamedTuple):
    """Bytes that one rank holds between steps."""

    weights: int
    gradients: int
    optimizer: int


def _model_states(config: RunConfig, of_rank: RankWeights, ranks: int) -> ModelStates:
    """Weights, gradients and optimizer, which ``ranks`` data- and context-parallel ranks share."""
    element, stage = element_bytes(config), config.engine.zero_stage
    elements, share = of_rank.total, -(-of_rank.total // ranks)
    copy = 0 if element == 4 else 4
    if config.engine.name == "megatron":
        own = shares(config, of_rank, ranks)
        states = (MOMENTS + copy) * own.adamw + (MOMENTUM + copy) * own.muon
        return ModelStates(element * own.buffers, 4 * own.buffers, states)
    if stage == 0:
        return ModelStates(element * elements, 4 * elements, MOMENTS * elements)
    gathered = min(elements, LIVE_PARAMETERS) if stage == 3 else 0
    return ModelStates(
        weights=element * ((share if stage == 3 else elements) + gathered),
        gradients=4 * (elements if stage == 1 else share) + 4 * min(REDUCE_BUCKET, elements),
        optimizer=0 if config.engine.offload_optimizer else (MOMENTS + 4) * share,
    )


def _payload_buffers(chunks: list[ChunkMemory], alive: tuple[int, ...]) -> int:
    into, out_of = [chunk.message_in for chunk in chunks], [chunk.message_out for chunk in chunks]
    waiting = _times(alive, out_of) if len(chunks) > 1 else 0  # interleaved schedules keep what they have sent
    return waiting + 2 * (max(out_of) + max(into))  # of this step and the one before, messages or their gradients


def _times(counts: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def in_flight(chunk_bytes: Sequence[int], *, rank: int, num_ranks: int, num_microbatches: int) -> tuple[int, ...]:
    """Of every chunk of a pipeline rank, the micro-batches that are between forward and backward at the peak.

    Forward and backward of (chunk, micro-batch) pairs run in the order of ``get_schedule_table`` in Megatron's
    ``pipeline_parallel/schedules.py``, backward with the chunks mirrored: first as many forwards as that file's
    ``get_pp_rank_microbatches`` says, then one forward and one backward in turn.

    Args:
        chunk_bytes: what one micro-batch leaves in each of the rank's chunks; one chunk: plain 1F1B.
        rank, num_ranks: of the pipeline.
        num_microbatches: of a step on one replica.
    """
    num_chunks = len(chunk_bytes)
    # Peaks repeat once the pipeline is full, so a few rounds give the peak of any number of them.
    rounds = min(num_microbatches, 4 * num_ranks * num_chunks)
    if num_chunks == 1:
        return (min(num_ranks - rank, rounds),)
    order = [
        chunk
        for first in range(0, rounds, num_ranks)
        for chunk in range(num_chunks)
        for _ in range(min(num_ranks, rounds - first))
    ]
    ahead = min(len(order), 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks)
    alive = [0] * num_chunks
    best, most = tuple(alive), -1
    for step, chunk in enumerate(order):
        alive[chunk] += 1
        size = sum(number * bytes_ for number, bytes_ in zip(alive, chunk_bytes, strict=True))
        if size > most:
            best, most = tuple(alive), size
        if step >= ahead:
            alive[num_chunks - 1 - order[step - ahead]] -= 1
    return best
