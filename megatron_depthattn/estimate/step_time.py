"""Predicted seconds of an optimizer step: the model, which `MODEL` states for people.

    t(r)   = forward(r) + backward(r)                       of one micro-batch, all chunks of pipeline stage r
    step   = m · max t(r)  +  Σ over the other stages of t(r) / v  +  reduction  +  optimizer

Forward and backward are sums over operations: a matrix product costs by its operations, everything else by the bytes it
reads and writes, both by the hardware's `Cost`s; backward has twice the products of forward. What is recomputed is
added. Collectives of tensor and context parallel and inter-stage transfers are added: nothing is assumed to overlap
with arithmetic, except those transfers under the interleaved schedule. The time of a layer is at least the host's time
to issue it. Gradients are reduced and weights gathered once, after the last backward: that runs overlap them is left
out.

Not modelled: waiting for data, other ranks' jitter, checkpoints, clocks that depend on the load, kernels that lose
efficiency at odd shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_depthattn.config import RunConfig, Sizes
from megatron_depthattn.estimate.counts import element_bytes, hidden_rows, rank_weights, rows, stage_layers
from megatron_depthattn.estimate.hardware import Hardware
from megatron_depthattn.estimate.muon import newton_schulz, shares
from megatron_depthattn.estimate.traffic import FP32, CrossLayer, Transfer, recomputed_layers, traffic
from megatron_depthattn.vocabulary import LOSS_CHUNK, padded_vocab_size

MODEL = (
    "step = m * slowest stage + fill and drain by the other stages / v + gradient reduction + optimizer; a stage's "
    "micro-batch = matrix products by operations + other operations by bytes + tensor, context and pipeline messages",
    "not overlapped: tensor, context, data; inter-stage transfers only under the interleaved schedule",
    "not in it: the step in host memory and the transfers of engine.offload_optimizer",
)

# Bytes moved for each number of a tensor, in multiples of its size, of torch's unfused operations: read off the local
# layers' code (every operation reads its inputs and writes its output once); TransformerEngine's kernels are fused.
NORM = {"local": 7, "te": 2}
ROPE = {"local": 10, "te": 2}
ADAMW_BYTES = {"local": 80, "te": 30}
"""A weight: torch's AdamW, operation by operation, or one fused kernel (weight, moments, gradient, bf16 copy)."""
LEAN_PASSES = 3
"""The lean mix over the bytes that a mix must move, docs/performance.md; the Triton kernels move just these."""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Seconds of one micro-batch on one pipeline stage, by part."""

    products: float
    """Matrix products, core attention's included."""
    elementwise: float
    """Memory-bound operations: norms, RoPE, SwiGLU, residuals, cross entropy."""
    mix: float
    recompute: float
    host: float
    """Waiting for the host to issue operations."""
    tensor: float
    context: float
    data: float
    """Of a micro-batch: of ZeRO stages that reduce or gather in every one."""
    hops: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class StepTime(StageTime):
    """Seconds of one optimizer step, by part: all micro-batches of the slowest stage, and what comes beside them."""

    bubble: float
    optimizer: float


def step_time(config: RunConfig, shared: CrossLayer, sizes: Sizes, hardware: Hardware) -> StepTime:
    """What a step costs on the slowest stage, and what is spent waiting for the others; see above.

    Args:
        shared: what its layers share.
        sizes: what `validate` returned for it.
    """
    stages, m = config.parallel.pipeline, sizes.num_microbatches
    done: dict[tuple[Any, ...], tuple[StageTime, tuple[float, float]]] = {}
    found = []
    for stage in range(stages):
        reads = tuple(shared.num_sources[layer] for layer in stage_layers(config, stage))
        widths = shared.message_widths[(stage - 1) % stages :: stages], shared.message_widths[stage::stages]
        key = (stage == 0, stage == stages - 1, reads, *widths)  # most stages of a deep pipeline are alike
        if key not in done:
            done[key] = _stage_time(config, shared, sizes, hardware, stage)
        found.append(done[key])
    times, ends = zip(*found, strict=True)
    slowest = max(times, key=lambda time: time.total)
    others = sum(time.total for time in times) - slowest.total
    data, optimizer = max(ends, key=sum)
    parts = {part: m * seconds for part, seconds in vars(slowest).items()}
    parts["data"] += data
    return StepTime(**parts, bubble=others / config.parallel.virtual_pipeline, optimizer=optimizer)


def run_seconds(config: RunConfig, shared: CrossLayer, sizes: Sizes, hardware: Hardware) -> float:
    """What all train.steps cost, each with its own batch size."""
    at_once = config.train.global_batch_size // sizes.num_microbatches
    return sum(
        count * step_time(config, shared, replace(sizes, num_microbatches=size // at_once), hardware).total
        for size, count in config.train.batch_sizes.stretches(config.train.steps)
    )


def _stage_time(
    config: RunConfig, shared: CrossLayer, sizes: Sizes, hardware: Hardware, stage: int
) -> tuple[StageTime, tuple[float, float]]:
    """Of a micro-batch; and at the end of a step: reduction of gradients with gathering of weights, the optimizer."""
    transfers = traffic(config, shared, sizes, stage)
    world = sizes.data_parallel_size * config.parallel.tensor * config.parallel.context * config.parallel.pipeline

    def sending(axis: str, *, at_end: bool = False) -> float:
        chosen = [each for each in transfers if each.axis == axis and (each.phase == "step") == at_end]
        total = sum(each.count * transfer_seconds(config, hardware, each, world) for each in chosen)
        return total if at_end else total / sizes.num_microbatches

    layers = stage_layers(config, stage)
    count, again = len(layers), recomputed_layers(config, stage)
    products, attention, attention_passes = _layer_products(config, hardware)
    passes = sum(hardware.elementwise.seconds(moved) for moved in _layer_passes(config))
    mix_forward, mix_backward = _mix_seconds(config, shared, hardware, layers)
    device = products + attention + passes + attention_passes
    forward = max(0.0, hardware.host_seconds[0] - device)  # what the device waits for its host
    backward = max(0.0, hardware.host_seconds[1] - 2 * device)
    recompute = again * (device + forward) + mix_forward * again / max(count, 1)
    if config.recompute.granularity == "selective":
        recompute = count * (attention + attention_passes)
    end_products, end_passes = _ends(config, hardware, stage)
    of_rank, ranks = rank_weights(config, stage), sizes.data_parallel_size * config.parallel.context
    weights = of_rank.total
    accumulate = hardware.elementwise.seconds(weights * (2 * FP32 + element_bytes(config)))
    time = StageTime(
        products=3 * count * (products + attention) + end_products,
        elementwise=3 * count * (passes + attention_passes) + end_passes + accumulate,
        mix=mix_forward + mix_backward,
        recompute=recompute,
        host=count * (forward + backward),
        tensor=sending("tensor"),
        context=sending("context"),
        data=sending("data"),
        hops=sending("pipeline") if config.parallel.virtual_pipeline == 1 else 0.0,
    )
    sharded = config.engine.name == "megatron" or config.engine.zero_stage > 0
    own = weights / ranks if sharded else weights
    whole = weights * FP32 * 3  # zeroed, scaled by the number of tokens
    shard = own * (ADAMW_BYTES[config.model.spec] + 3 * FP32 + FP32 + element_bytes(config))  # norm, clip, copy
    optimizer = hardware.elementwise.seconds(whole) + hardware.elementwise.seconds(shard)
    if muon := shares(config, of_rank, ranks).muon:
        flops, calls = newton_schulz(config)
        share = count / config.model.num_loops * muon / of_rank.linear  # of the stage's layers
        cost = hardware.products[config.precision.dtype]
        optimizer += share * (calls * cost.start + flops / cost.rate)
    return time, (sum(sending(axis, at_end=True) for axis in ("data", "tensor", "pipeline")), optimizer)


def _sizes(config: RunConfig) -> tuple[int, int]:
    """Elements of all query heads and of all key heads."""
    model = config.model
    return model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels


def _layer_products(config: RunConfig, hardware: Hardware) -> tuple[float, float, float]:
    """Seconds of one layer's four matrix products in forward, and of its core attention's products and passes.

    Core attention is one causal kernel, which writes nothing but its output.
    """
    model, precision, tensor = config.model, config.precision, config.parallel.tensor
    query, key = _sizes(config)
    widths = (query + 2 * key, query, 2 * model.ffn_hidden_size, model.ffn_hidden_size)
    cost = hardware.products["fp8" if precision.fp8 else precision.dtype]
    products = sum(cost.seconds(2 * rows(config) * model.hidden_size * width / tensor) for width in widths)
    attention = hardware.attention[precision.dtype].seconds(
        2 * rows(config) * config.data.sequence_length * query / tensor
    )
    moved = 4 * rows(config) * query / tensor * element_bytes(config)
    return products, attention, hardware.elementwise.seconds(moved)


def _layer_passes(config: RunConfig) -> Iterator[float]:
    """Bytes moved by each other operation of a layer's forward."""
    model, tensor, spec = config.model, config.parallel.tensor, config.model.spec
    query, key = _sizes(config)
    hidden = hidden_rows(config) * model.hidden_size * element_bytes(config)
    heads = rows(config) * (query + key) / tensor * element_bytes(config)
    inner = rows(config) * model.ffn_hidden_size / tensor * element_bytes(config)
    yield from (NORM[spec] * hidden, NORM[spec] * hidden)
    yield from (3 * hidden, 3 * hidden)  # residuals
    yield NORM[spec] * heads
    yield ROPE[spec] * heads
    yield from (2 * inner, 3 * inner)  # SwiGLU


def _ends(config: RunConfig, hardware: Hardware, stage: int) -> tuple[float, float]:
    """Embedding, output layer and cross entropy of a micro-batch, both ways, on the stages that hold them."""
    model, tensor = config.model, config.parallel.tensor
    vocab = padded_vocab_size(model.vocab_size) / tensor
    products = passes = 0.0
    if stage == 0:  # its backward writes a dense gradient
        hidden = rows(config) * model.hidden_size * element_bytes(config)
        passes += hardware.elementwise.seconds(4 * hidden)
        passes += hardware.elementwise.seconds(vocab * model.hidden_size * element_bytes(config))
    if stage == config.parallel.pipeline - 1:
        cost = hardware.products[config.precision.dtype]
        products = 3 * cost.seconds(2 * rows(config) * model.hidden_size * vocab)
        logits = rows(config) * vocab
        times = 10 if config.precision.dtype == "fp32" else 18
        chunk = min(logits, LOSS_CHUNK["cuda"])
        passes += times * logits / chunk * hardware.elementwise.seconds(FP32 * chunk)
    return products, passes


def _mix_seconds(config: RunConfig, shared: CrossLayer, hardware: Hardware, layers: list[int]) -> tuple[float, float]:
    """What the method adds to these layers of one micro-batch, forward and backward: bound by memory."""
    size = element_bytes(config)
    if method := shared.method:  # each element is read once for a multiplication and an addition
        forward = sum(
            hardware.elementwise.seconds(method.flops(layer) * hidden_rows(config) * size) for layer in layers
        )
        return forward, 2 * forward
    if not shared.kinds:
        return 0.0, 0.0
    query, key = (width / min(config.parallel.tensor, width) for width in _sizes(config))
    is_scored = "key" in shared.kinds
    calls = len(shared.kinds) - is_scored  # one of each kind that is mixed
    factor = calls * (1 if config.model.depth_attention.op == "triton" else LEAN_PASSES) * rows(config) * size
    numbers = [number for layer in layers if (number := shared.num_sources[layer])]
    reads = [is_scored * query + (1 + is_scored) * key * (number + 1) for number in numbers]
    forward = sum(hardware.elementwise.seconds(factor * (read + key)) for read in reads)
    return forward, sum(hardware.elementwise.seconds(factor * (2 * read + key)) for read in reads)


def transfer_seconds(config: RunConfig, hardware: Hardware, transfer: Transfer, world_size: int) -> float:
    """Of one collective. Where its group spans nodes, the ranks of a node share their adapters, as NCCL's rings do.

    Megatron numbers ranks tensor first, then context, data, pipeline. Neighbours in the pipeline are as far apart as
    all ranks of a stage: in one node if the world is.
    """
    parallel, node = config.parallel, hardware.devices_per_node
    if transfer.axis == "pipeline":
        return (hardware.intra_node if world_size <= node else hardware.inter_node).seconds(transfer.sent)
    apart = 1 if transfer.axis == "tensor" else parallel.tensor  # the data group counts context ranks as well
    inside = hardware.intra_node.seconds(transfer.sent)
    if apart * transfer.ranks <= node:
        return inside
    share = max(1, node // apart)
    return max(inside, hardware.inter_node.seconds(transfer.sent / share))
