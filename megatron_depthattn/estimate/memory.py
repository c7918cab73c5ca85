"""Memory of one rank, by part, from the run's config: nothing is built.

Weights, gradients and the optimizer's state are what Megatron's data-parallel wrapper and distributed optimizer, or
DeepSpeed, allocate, padding included. Activations are counted in activations.py. The sum is what tensors need at the
peak of a step; the allocator's own losses, CUDA's context and NCCL's buffers come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from megatron_depthattn.backends import CPU, GPU, resolve
from megatron_depthattn.config import RunConfig, validate
from megatron_depthattn.estimate.activations import ChunkActivations, Recompute
from megatron_depthattn.estimate.in_flight import in_flight
from megatron_depthattn.estimate.parameters import LayerSizes, Weight, chunk_weights
from megatron_depthattn.estimate.shapes import RankShape
from megatron_depthattn.estimate.states import model_states
from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.methods.definitions import method_of
from megatron_depthattn.model.source_plan import CrossLayerPlan, ListedPlan, SourcePlan, default_stride
from megatron_depthattn.switches import Kernels, resolved_switches
from megatron_depthattn.vocabulary import padded_vocab_size

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank at the peak of a training step, but for ``parameters``."""

    parameters: int
    """Numbers that the rank's model has."""
    weights: int
    gradients: int
    """Sums over micro-batches, fp32."""
    optimizer: int
    """fp32 copies of the weights and two moments, of the data-parallel rank that has most."""
    activations: int
    """What a vanilla model keeps for backward, of all micro-batches in flight."""
    sources: int
    """What Depth-Attention or another method keeps above that."""
    payload_buffers: int
    """Pipeline messages that are being sent or received."""
    working: int
    """The largest temporary: what is recomputed at once, or what the output layer's backward takes."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.parameters


def rank_memory(
    config: RunConfig,
    world_size: int,
    *,
    pipeline_rank: int,
    device: Device = "cuda",
    data_rank: int | None = None,
) -> RankMemory:
    """Memory of the ranks of one pipeline stage.

    Args:
        config: of the run.
        world_size: ranks.
        pipeline_rank: the stage.
        device: torch's RMSNorm keeps more on a CPU.
        data_rank: place among the data-parallel times context-parallel ranks, which share the optimizer; None: that of
            the one that has most of it.

    Raises:
        ValueError: the config cannot run on so many ranks, or has no such stage.
    """
    sizes = validate(config, world_size, needs_data=False)
    parallel = config.parallel
    if not 0 <= pipeline_rank < parallel.pipeline:
        raise ValueError(
            f"pipeline_rank is {pipeline_rank}, but parallel.pipeline={parallel.pipeline}: give 0 to "
            f"{parallel.pipeline - 1}."
        )
    buffers = [_weights(config, chunk) for chunk in _chunks(config, pipeline_rank)]
    ranks = sizes.data_parallel_size * parallel.context
    states = model_states(config, buffers, ranks=ranks, data_rank=data_rank)
    own = [chunk_activations(config, chunk, device=device) for chunk in _chunks(config, pipeline_rank)]
    kept = [chunk.kept().total for chunk in own]
    vanilla = [chunk.vanilla().kept().total for chunk in own]
    alive = in_flight(kept, rank=pipeline_rank, num_ranks=parallel.pipeline, num_microbatches=sizes.num_microbatches)
    activations = _times(alive, vanilla)
    return RankMemory(
        parameters=sum(weight.numel for weights in buffers for weight in weights),
        **states._asdict(),
        activations=activations,
        sources=_times(alive, kept) - activations,
        payload_buffers=_payload_buffers(own, alive),
        working=max(chunk.working() for chunk in own),
    )


def chunk_activations(config: RunConfig, chunk: int, *, device: Device = "cuda") -> ChunkActivations:
    """What one pipeline chunk, in model order, keeps for one micro-batch."""
    model, recompute = config.model, config.recompute
    num_layers = model.num_layers * model.num_loops
    method = method_of(asdict(model))
    return ChunkActivations(
        shape=rank_shape(config, device=device),
        layers=_layers(config, chunk),
        num_layers=num_layers,
        plan=source_plan(config, method),
        method=method,
        recompute=Recompute(
            granularity=recompute.granularity, method=recompute.method, num_layers=recompute.num_layers
        ),
    )


def rank_shape(config: RunConfig, *, device: Device = "cuda") -> RankShape:
    """One micro-batch's sizes on one rank."""
    on_gpu = device == "cuda"
    resolved = resolve(config, GPU if on_gpu else CPU).config
    model = resolved_switches(resolved, 1, Kernels(on_gpu, None, adds_gradients=True)).model
    parallel = config.parallel
    tensor, batch = parallel.tensor, config.train.micro_batch_size
    length = config.data.sequence_length
    mine = length // parallel.context
    projection = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    is_gathered = model.num_query_groups < tensor
    return RankShape(
        batch=batch,
        query_length=mine,
        key_length=length,
        rows=batch * mine // (tensor if parallel.sequence else 1),
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads // tensor,
        num_groups=max(1, model.num_query_groups // tensor),
        group_heads=model.num_attention_heads // model.num_query_groups,
        projection_size=projection if is_gathered else projection // tensor,
        head_size=model.kv_channels,
        ffn_size=model.ffn_hidden_size // tensor,
        vocab_size=padded_vocab_size(model.vocab_size) // tensor,
        element=2 if config.precision.dtype == "bf16" else 4,
        tensor=tensor,
        on_cpu=not on_gpu,
        spec=model.spec,
        fused_swiglu=bool(model.fused_swiglu),
        fused_loss=bool(model.fused_cross_entropy),
        fp8=config.precision.fp8,
    )


def source_plan(config: RunConfig, method: CrossLayerMethod | None) -> CrossLayerPlan | None:
    """Who reads whom, as `DepthAttentionConfig.source_plan`; None for vanilla."""
    depth, num_layers = config.model.depth_attention, config.model.num_layers * config.model.num_loops
    num_chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    starts = tuple(range(0, num_layers, num_layers // num_chunks))
    if method:
        return ListedPlan(tuple(map(method.sources, range(num_layers))), starts, config.parallel.pipeline)
    if config.model.effective_method == "vanilla":
        return None
    stride = depth.stride or default_stride(num_layers)
    return SourcePlan(num_layers, stride, depth.recent_window, starts, config.parallel.pipeline)


def _chunks(config: RunConfig, pipeline_rank: int) -> range:
    parallel = config.parallel
    return range(pipeline_rank, parallel.pipeline * parallel.virtual_pipeline, parallel.pipeline)


def _layers(config: RunConfig, chunk: int) -> range:
    num_chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    each = config.model.num_layers * config.model.num_loops // num_chunks
    return range(chunk * each, (chunk + 1) * each)


def _weights(config: RunConfig, chunk: int) -> list[Weight]:
    model, parallel = config.model, config.parallel
    sizes = LayerSizes(
        hidden_size=model.hidden_size,
        query_size=model.num_attention_heads * model.kv_channels,
        key_size=model.num_query_groups * model.kv_channels,
        head_size=model.kv_channels,
        ffn_size=model.ffn_hidden_size,
        vocab_size=padded_vocab_size(config.model.vocab_size),
        tensor=parallel.tensor,
    )
    return chunk_weights(
        sizes,
        [layer for layer in _layers(config, chunk) if layer < model.num_layers],
        method=method_of(asdict(model)),
        is_first=chunk == 0,
        is_last=chunk + 1 == parallel.pipeline * parallel.virtual_pipeline,
        tie_embeddings=model.tie_embeddings,
    )


def _payload_buffers(chunks: list[ChunkActivations], alive: tuple[int, ...]) -> int:
    into = [chunk.message_bytes(chunk.chunk) for chunk in chunks]
    out_of = [chunk.message_bytes(chunk.chunk + 1) for chunk in chunks]
    waiting = _times(alive, out_of) if len(chunks) > 1 else 0  # interleaved schedules keep what they have sent
    return waiting + 2 * (max(out_of) + max(into))  # of this step and the one before, messages or their gradients


def _times(numbers: tuple[int, ...], sizes: list[int]) -> int:
    return sum(number * size for number, size in zip(numbers, sizes, strict=True))
