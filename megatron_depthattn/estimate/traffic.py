"""Bytes that each rank sends in one optimizer step, by axis: integers in, integers out.

A `Transfer` has the whole tensor of a collective (`size`: what is reduced, the gathered result, or what is scattered)
and the bytes that a rank sends if the ring algorithm does it; libraries may choose another that sends more.

Megatron's engine reduces fp32 gradients and gathers the new weights once a step (distributed optimizer); with Muon
tensor ranks gather the momentum of the matrices that they step. DeepSpeed's
(docs/deepspeed.md): ZeRO 0 all-reduces gradients once a step, 1 and 2 reduce them to the ranks that step with them
(2 after every micro-batch) and gather weights once, 3 gathers weights in every forward and backward. Context ranks
hold the same weights: they count as data-parallel ranks there.

Norms' gradients, the group means of query heads where tensor ranks share a key/value head, and scalars are small; the
first two are counted, scalars are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_depthattn.config import RunConfig, Sizes
from megatron_depthattn.estimate.counts import (
    RankWeights,
    chunks_of_stage,
    cross_layer_method,
    element_bytes,
    hidden_rows,
    layers_of_chunk,
    rank_weights,
    rows,
    source_plan,
    stage_layers,
)
from megatron_depthattn.estimate.muon import shares
from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.model.source_plan import hop_bytes
from megatron_depthattn.vocabulary import padded_vocab_size

Axis = Literal["data", "tensor", "context", "pipeline"]
FP32 = 4


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of one rank."""

    axis: Axis
    what: str
    kind: str
    """all_reduce, all_gather, reduce_scatter, or send: to one neighbour in the pipeline."""
    phase: Literal["forward", "backward", "step"]
    """When: in forward or backward passes, or once a step."""
    size: int
    """Bytes of the whole tensor."""
    ranks: int
    count: int
    """Of one optimizer step."""

    @property
    def sent(self) -> int:
        """Bytes that this rank sends each time."""
        if self.kind == "send":
            return self.size
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.size * (self.ranks - 1) // self.ranks


@dataclass(frozen=True)
class CrossLayer:
    """What the layers of a layout share, worked out once for all its micro-batch sizes and recompute modes."""

    method: CrossLayerMethod | None
    """None for vanilla and for Depth-Attention."""
    kinds: tuple[str, ...]
    """Of Depth-Attention's sources; empty for any other model."""
    num_sources: tuple[int, ...]
    """Of every effective layer."""
    message_widths: tuple[int, ...]
    """Elements per row of the message over every pipeline edge."""

    @classmethod
    def of(cls, config: RunConfig) -> CrossLayer:
        """From the run's config."""
        model, parallel, plan = config.model, config.parallel, source_plan(config)
        method = cross_layer_method(config.model)
        num_layers, edges = model.num_layers * model.num_loops, parallel.pipeline * parallel.virtual_pipeline - 1
        if plan is None:
            return cls(None, (), (0,) * num_layers, (model.hidden_size,) * edges)
        # As DepthAttentionConfig.message_into says, chunk by chunk; a test holds both equal.
        spread = parallel.tensor if parallel.sequence else 1
        keys = max(1, model.num_query_groups // parallel.tensor) * model.kv_channels
        widths = hop_bytes(
            plan,
            hidden_size=model.hidden_size,
            num_streams=method.num_streams if method else 1,
            source_size=model.hidden_size if method else len(plan.kinds) * keys * spread,
            tokens=1,
            bytes_per_element=1,
        )
        num_sources = tuple(len(plan.sources(layer)) for layer in range(num_layers))
        return cls(method, () if method else plan.kinds, num_sources, tuple(widths))


def hop_sizes(config: RunConfig, shared: CrossLayer) -> list[int]:
    """Bytes of one micro-batch's message over every pipeline edge in model order, one way."""
    return [hidden_rows(config) * element_bytes(config) * width for width in shared.message_widths]


def traffic(config: RunConfig, shared: CrossLayer, sizes: Sizes, pipeline_rank: int) -> list[Transfer]:
    """Everything that one rank of a pipeline stage sends in one optimizer step.

    Args:
        shared: what the layers of this layout share.
        sizes: what `validate` returned for both.
    """
    found = [
        *_pipeline(config, shared, sizes, pipeline_rank),
        *_tensor(config, shared, sizes, pipeline_rank),
        *_context(config, sizes, pipeline_rank),
        *_data(config, sizes, rank_weights(config, pipeline_rank)),
        *_muon(config, sizes, rank_weights(config, pipeline_rank)),
    ]
    return [transfer for transfer in found if transfer.size and transfer.count and transfer.ranks > 1]


def _pipeline(config: RunConfig, shared: CrossLayer, sizes: Sizes, pipeline_rank: int) -> Iterator[Transfer]:
    stages, m = config.parallel.pipeline, sizes.num_microbatches
    for edge, size in enumerate(hop_sizes(config, shared)):
        if edge % stages == pipeline_rank:
            yield Transfer("pipeline", f"hop {edge} -> {edge + 1}", "send", "forward", size, stages, m)
        if (edge + 1) % stages == pipeline_rank:
            yield Transfer("pipeline", f"hop {edge + 1} -> {edge}, gradient", "send", "backward", size, stages, m)
    if config.model.tie_embeddings and stages > 1 and pipeline_rank in (0, stages - 1):
        elements = padded_vocab_size(config.model.vocab_size) // config.parallel.tensor * config.model.hidden_size
        yield Transfer("pipeline", "tied embedding's gradient", "all_reduce", "step", FP32 * elements, 2, 1)


def _tensor(config: RunConfig, shared: CrossLayer, sizes: Sizes, pipeline_rank: int) -> Iterator[Transfer]:
    model, tensor, stages = config.model, config.parallel.tensor, config.parallel.pipeline
    sequence, m = config.parallel.sequence, sizes.num_microbatches
    layers, again = len(stage_layers(config, pipeline_rank)), recomputed_layers(config, pipeline_rank)
    hidden = rows(config) * model.hidden_size * element_bytes(config)

    def each(what: str, kind: str, phase: Literal["forward", "backward"], count: int, size: int = hidden) -> Transfer:
        return Transfer("tensor", what, kind, phase, size, tensor, m * count)

    if sequence:
        for kind, what in (("all_gather", "inputs of attention and MLP"), ("reduce_scatter", "outputs of both")):
            yield each(what, kind, "forward", 2 * layers)
            yield each(f"{what}, recomputed", kind, "backward", 2 * again)
        yield each("inputs and gradients of outputs", "all_gather", "backward", 4 * layers)
        yield each("gradients of inputs", "reduce_scatter", "backward", 2 * layers)
    else:
        yield each("outputs of attention and MLP", "all_reduce", "forward", 2 * layers)
        yield each("outputs of both, recomputed", "all_reduce", "backward", 2 * again)
        yield each("gradients of inputs", "all_reduce", "backward", 2 * layers)
    if model.num_query_groups < tensor:
        query, key = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
        qkv = rows(config) * (query + 2 * key) * element_bytes(config)
        yield each("QKV where ranks share a head", "all_gather", "forward", layers, qkv)
        yield each("QKV where ranks share a head, recomputed", "all_gather", "backward", again, qkv)
        yield each("gradient of the shared QKV", "reduce_scatter", "backward", layers, qkv)
        if "key" in shared.kinds:
            mixing = sum(shared.num_sources[layer] > 0 for layer in stage_layers(config, pipeline_rank))
            means = rows(config) * tensor * model.kv_channels * FP32
            yield each("group means of the query", "all_gather", "forward", mixing, means)
            yield each("gradients of the means", "reduce_scatter", "backward", mixing, means)
    if pipeline_rank == 0:
        yield each("embedding", "reduce_scatter" if sequence else "all_reduce", "forward", 1)
        yield each("gradient of the embedding", "all_gather", "backward", int(sequence))
    if pipeline_rank == stages - 1:
        yield each("input of the output layer", "all_gather", "forward", int(sequence))
        yield each("input of the output layer, again", "all_gather", "backward", int(sequence))
        yield each("its gradient", "reduce_scatter" if sequence else "all_reduce", "backward", 1)
        yield each("cross entropy: maximum", "all_reduce", "forward", 1, rows(config) * FP32)
        yield each("cross entropy: label and sum", "all_reduce", "forward", 1, 2 * rows(config) * FP32)
    weights = rank_weights(config, pipeline_rank)
    partial = weights.norms if sequence else weights.head_norms
    yield Transfer("tensor", "norms' gradients", "all_reduce", "step", FP32 * partial, tensor, 1)


def _context(config: RunConfig, sizes: Sizes, pipeline_rank: int) -> Iterator[Transfer]:
    """Keys and values: gathered by the local core attention, sent round the ring by TransformerEngine's."""
    model, ranks = config.model, config.parallel.context
    layers = len(stage_layers(config, pipeline_rank))
    width = max(1, model.num_query_groups // config.parallel.tensor) * model.kv_channels
    whole = ranks * rows(config) * width * element_bytes(config)
    count = 2 * sizes.num_microbatches  # of keys and of values
    ring = " (ring)" if model.spec == "te" else ""
    again = layers if config.recompute.granularity == "selective" else recomputed_layers(config, pipeline_rank)
    yield Transfer("context", f"keys, values{ring}", "all_gather", "forward", whole, ranks, count * layers)
    yield Transfer("context", f"keys, values{ring}, recomputed", "all_gather", "backward", whole, ranks, count * again)
    if ring:
        yield Transfer("context", "keys, values (ring)", "all_gather", "backward", whole, ranks, count * layers)
    yield Transfer("context", f"their gradients{ring}", "reduce_scatter", "backward", whole, ranks, count * layers)


def _data(config: RunConfig, sizes: Sizes, weights: RankWeights) -> Iterator[Transfer]:
    ranks, stage, m = sizes.data_parallel_size * config.parallel.context, config.engine.zero_stage, 1
    elements = shares(config, weights, ranks).buffers if config.engine.name == "megatron" else weights.total
    gradients, values = FP32 * elements, element_bytes(config) * elements
    if config.engine.name == "deepspeed" and stage == 0:
        yield Transfer("data", "gradients", "all_reduce", "step", gradients, ranks, 1)
        return
    if config.engine.name == "deepspeed":
        m = sizes.num_microbatches if stage >= 2 else 1
    yield Transfer("data", "gradients", "reduce_scatter", "step" if m == 1 else "backward", gradients, ranks, m)
    if stage == 3:
        yield Transfer("data", "weights", "all_gather", "forward", values, ranks, sizes.num_microbatches)
        yield Transfer("data", "weights", "all_gather", "backward", values, ranks, sizes.num_microbatches)
    else:
        yield Transfer("data", "weights", "all_gather", "step", values, ranks, 1)


def _muon(config: RunConfig, sizes: Sizes, weights: RankWeights) -> Iterator[Transfer]:
    own = shares(config, weights, sizes.data_parallel_size * config.parallel.context).muon
    tensor = config.parallel.tensor
    yield Transfer("tensor", "momentum of matrices", "all_gather", "step", FP32 * own * tensor, tensor, 1)


def recomputed_layers(config: RunConfig, stage: int) -> int:
    """How many of a stage's layers are those whose whole forward is run again in backward."""
    recompute = config.recompute
    if recompute.granularity != "full":
        return 0
    sizes = [len(layers_of_chunk(config, chunk)) for chunk in chunks_of_stage(config, stage)]
    return sum(sizes if recompute.method == "uniform" else (min(size, recompute.num_layers or 0) for size in sizes))
