"""What follows from a config's model alone: weights, operations, and which layers read which. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from math import prod

from megatron_depthattn.config import ModelConfig, RunConfig
from megatron_depthattn.config.pipeline import chunk_layers, chunk_starts
from megatron_depthattn.methods.definition import CrossLayerMethod
from megatron_depthattn.methods.definitions import method_of
from megatron_depthattn.model.flops import DecoderShape, ForwardFlops
from megatron_depthattn.model.source_plan import CrossLayerPlan, ListedPlan, SourcePlan, default_stride, source_kinds
from megatron_depthattn.vocabulary import padded_vocab_size

PEAK_TFLOPS_BF16 = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 peak of a device by the name that CUDA gives it, from the vendor's data sheets; others have no MFU.
FP8 runs are measured against it as well, so that precisions can be compared: their MFU may exceed 1."""


def decoder_shape(config: RunConfig) -> DecoderShape:
    """The config's model as the counters see it."""
    model = config.model
    return DecoderShape(
        num_layers=model.num_layers,
        num_loops=model.num_loops,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_size=padded_vocab_size(model.vocab_size),
        tie_embeddings=model.tie_embeddings,
        method=cross_layer_method(config.model),
    )


@functools.lru_cache(64)
def cross_layer_method(model: ModelConfig) -> CrossLayerMethod | None:
    """The model's method beside Depth-Attention; None for that one and for vanilla."""
    return method_of(dataclasses.asdict(model))


def source_plan(config: RunConfig) -> CrossLayerPlan | None:
    """The sources of every layer under the config's pipeline layout; None for vanilla."""
    depth, num_layers = config.model.depth_attention, config.model.num_layers * config.model.num_loops
    starts = chunk_starts(config.model, config.parallel)
    if method := cross_layer_method(config.model):
        return ListedPlan(tuple(map(method.sources, range(num_layers))), starts, config.parallel.pipeline)
    if config.model.effective_method == "vanilla":
        return None
    per_loop = config.model.num_layers if depth.loop_sources == "same_layer" else num_layers
    stride = depth.stride or default_stride(config.model.num_layers, config.model.num_loops, depth.loop_sources)
    kinds = source_kinds(depth.weights, depth.mixes)
    return SourcePlan(num_layers, stride, depth.recent_window, starts, config.parallel.pipeline, per_loop, kinds)


def forward_flops(config: RunConfig) -> ForwardFlops:
    """Operations of one token's forward pass."""
    attends = config.model.effective_method == "depth_attention"
    plan = source_plan(config) if attends else None
    return decoder_shape(config).forward_flops(config.data.sequence_length, plan)


def layers_of_chunk(config: RunConfig, chunk: int) -> range:
    """Effective layers of a pipeline chunk, in model order."""
    start = chunk_starts(config.model, config.parallel)[chunk]
    return range(start, start + chunk_layers(config.model, config.parallel)[chunk])


def chunks_of_stage(config: RunConfig, stage: int) -> range:
    """Pipeline chunks that a stage runs, ascending."""
    return range(stage, config.parallel.pipeline * config.parallel.virtual_pipeline, config.parallel.pipeline)


def stage_layers(config: RunConfig, stage: int) -> list[int]:
    """Effective layers that a pipeline stage runs, all its chunks together, ascending."""
    return [layer for chunk in chunks_of_stage(config, stage) for layer in layers_of_chunk(config, chunk)]


@dataclasses.dataclass(frozen=True)
class RankWeights:
    """Elements of the weights that one tensor rank of a pipeline stage holds."""

    linear: int
    """Matrices of the decoder's layers, which FP8 recipes convert."""
    norms: int
    """Norms and a method's own weights, which every tensor rank holds whole."""
    head_norms: int
    """Norms of q and k, which are among ``norms``."""
    embeddings: int
    """Embedding and output layer."""

    @property
    def total(self) -> int:
        return self.linear + self.norms + self.embeddings


def rank_weights(config: RunConfig, stage: int) -> RankWeights:
    """Weights of one tensor rank of a pipeline stage."""
    layers = tuple(stage_layers(config, stage))
    return _weights(config.model, config.parallel.tensor, config.parallel.pipeline, stage, layers)


@functools.lru_cache(1024)
def _weights(model: ModelConfig, tensor: int, stages: int, stage: int, own: tuple[int, ...]) -> RankWeights:
    query, key = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    layers = len(own) // model.num_loops  # a stage has the same of every loop
    is_first, is_last = stage == 0, stage == stages - 1
    copies = is_first + is_last - (model.tie_embeddings and stages == 1)
    return RankWeights(
        linear=layers * (model.hidden_size * (2 * query + 2 * key + 3 * model.ffn_hidden_size) // tensor),
        norms=layers * 2 * (model.hidden_size + model.kv_channels)
        + is_last * model.hidden_size
        + _method_weights(cross_layer_method(model), own),
        head_norms=layers * 2 * model.kv_channels,
        embeddings=copies * (padded_vocab_size(model.vocab_size) // tensor) * model.hidden_size,
    )


def _method_weights(method: CrossLayerMethod | None, layers: Sequence[int]) -> int:
    if method is None:
        return 0
    tables = [method.layer_parameters(layer) for layer in layers]
    tables += [method.final_parameters() for layer in layers if method.is_last(layer)]
    return sum(prod(shape) for table in tables for shape in table.values())


def element_bytes(config: RunConfig) -> int:
    """Bytes of one element of weights and activations."""
    return 2 if config.precision.dtype == "bf16" else 4


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint: weights in their own type, and of each an fp32 copy and Adam's two averages, or Muon's."""
    model, states = config.model, decoder_shape(config).parameters * (element_bytes(config) + 12)
    if config.optimizer.name == "adamw":
        return states
    return states - 4 * _weights(model, 1, 1, 0, tuple(range(model.num_layers * model.num_loops))).linear


def rows(config: RunConfig) -> int:
    """Tokens of a micro-batch on one rank; under sequence parallel those inside attention and MLP."""
    return config.train.micro_batch_size * config.data.sequence_length // config.parallel.context


def hidden_rows(config: RunConfig) -> int:
    """Tokens whose hidden state one rank holds between layers."""
    return rows(config) // (config.parallel.tensor if config.parallel.sequence else 1)
