"""Predicted seconds of an optimizer step: the model, which `MODEL` states for people.

    t(r)   = forward(r) + backward(r)                       of one micro-batch, all chunks of pipeline stage r
    step   = m · max t(r)  +  Σ over the other stages of t(r) / v  +  reduction  +  optimizer

On a machine that was measured, forward and backward are those of its layers and of what stands around them, by the
positions of the micro-batch (`Machine.layers`). From vendors' figures they are sums over operations: a matrix product
costs by its operations, everything else by the bytes it reads and writes, both by the machine's `Cost`s; backward has
twice the products of forward. What is recomputed is added. Collectives of tensor and context parallel and pipeline hops
are added: nothing is assumed to overlap with arithmetic, except hops under the interleaved schedule on devices that
have a host (Megatron overlaps them there). On a device the time of a layer is at least the host's time to issue it.
Gradients are reduced and weights gathered once, after the last backward: that runs on GPUs overlap them is left out.

Not modelled: waiting for data, other ranks' jitter, checkpoints, clocks that depend on the load, kernels that lose
efficiency at odd shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_depthattn.config import RunConfig, Sizes
from megatron_depthattn.estimate.machine import Machine, resolve_for
from megatron_depthattn.estimate.traffic import (
    FP32,
    CrossLayer,
    Transfer,
    element_bytes,
    hidden_rows,
    rank_weights,
    recomputed_layers,
    rows,
    stage_layers,
    traffic,
)
from megatron_depthattn.vocabulary import LOSS_CHUNK, padded_vocab_size

MODEL = (
    "step = m * slowest stage + fill and drain by the other stages / v + gradient reduction + optimizer; a stage's "
    "micro-batch = matrix products by operations + other operations by bytes + tensor, context and pipeline messages",
    "not overlapped: tensor, context, data; hops only where the interleaved schedule overlaps them on a GPU",
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

    layers: float = 0.0
    """Measured as a whole; else they are products, passes, mix and host."""
    products: float = 0.0
    passes: float = 0.0
    mix: float = 0.0
    recompute: float
    host: float = 0.0
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


def step_time(config: RunConfig, shared: CrossLayer, sizes: Sizes, machine: Machine) -> StepTime:
    """What a step costs on the slowest stage, and what is spent waiting for the others; see above.

    Args:
        shared: what its layers share.
        sizes: what `validate` returned for it.

    Raises:
        ValueError: the machine has no figure for the config's precision.
    """
    config = resolve_for(machine, config).config
    if missing := {_type(config), config.precision.dtype} - machine.products.keys():
        raise ValueError(
            f"{machine.name} has no figures for {', '.join(sorted(missing))}: set precision.dtype and precision.fp8 to "
            f"one of {', '.join(sorted(machine.products))}, or another machine"
        )
    stages, m = range(config.parallel.pipeline), sizes.num_microbatches
    done: dict[tuple[Any, ...], tuple[StageTime, tuple[float, float]]] = {}
    found = []
    for stage in stages:  # most stages of a deep pipeline are alike
        key = _kind_of_stage(config, shared, stage)
        if key not in done:
            transfers = traffic(config, shared, sizes, stage)
            done[key] = (
                _stage_time(config, shared, sizes, machine, stage, transfers),
                _end_of_step(config, shared, sizes, machine, stage, transfers),
            )
        found.append(done[key])
    times, ends = zip(*found, strict=True)
    slowest = max(times, key=lambda time: time.total)
    others = sum(time.total for time in times) - slowest.total
    data, optimizer = max(ends, key=sum)
    parts = {part: m * seconds for part, seconds in vars(slowest).items()}
    parts["data"] += data
    return StepTime(**parts, bubble=others / config.parallel.virtual_pipeline, optimizer=optimizer)


def _kind_of_stage(config: RunConfig, shared: CrossLayer, stage: int) -> tuple[Any, ...]:
    """Stages of which this is equal have the same work and messages."""
    stages = config.parallel.pipeline
    reads = tuple(shared.num_sources[layer] for layer in stage_layers(config, stage))
    before, after = (stage - 1) % stages, stage % stages
    return (
        stage == 0,
        stage == stages - 1,
        reads,
        shared.message_widths[before::stages],
        shared.message_widths[after::stages],
    )


def _stage_time(
    config: RunConfig,
    shared: CrossLayer,
    sizes: Sizes,
    machine: Machine,
    stage: int,
    transfers: list[Transfer],
) -> StageTime:
    layers = stage_layers(config, stage)
    count, again = len(layers), recomputed_layers(config, len(layers))
    messages = {
        "tensor": _seconds(config, machine, sizes, transfers, "tensor"),
        "context": _seconds(config, machine, sizes, transfers, "context"),
        "data": _seconds(config, machine, sizes, transfers, "data"),
        "hops": _hop_seconds(config, machine, sizes, transfers),
    }
    products, attention = layer_products(config, machine), attention_seconds(config, machine)
    if measured := machine.layers.get(str(config.parallel.tensor)):
        one = measured.forward.in_proportion(rows(config))
        ends_of_model = measured.ends.in_proportion(rows(config)) if stage == config.parallel.pipeline - 1 else 0.0
        recompute = again * one
        if config.recompute.granularity == "selective":
            recompute = count * (attention.products + attention.passes)
        whole = count * (one + measured.backward.in_proportion(rows(config))) + ends_of_model
        return StageTime(layers=whole, recompute=recompute, **messages)
    passes = sum(machine.passes.seconds(moved) for moved in _layer_passes(config)) + _exponentials(config, machine)
    mix_forward, mix_backward = _mix_seconds(config, shared, machine, layers)
    forward, backward = (x * (1 if machine.is_host else 0) for x in machine.host_seconds)
    device = products + attention.products + passes + attention.passes
    if not machine.is_host:  # what the device waits for its host, beyond what it computes
        forward = max(0.0, machine.host_seconds[0] - device)
        backward = max(0.0, machine.host_seconds[1] - 2 * device)
    recompute = again * (device + forward) + mix_forward * again / count
    if config.recompute.granularity == "selective":
        recompute = count * (attention.products + attention.passes)
    ends = _ends(config, machine, stage)
    weights = rank_weights(config, shared.megatron, stage)
    accumulate = machine.passes.seconds(weights.total * (2 * FP32 + element_bytes(config)))
    return StageTime(
        products=3 * count * (products + attention.products) + ends.products,
        passes=3 * count * (passes + attention.passes) + ends.passes + accumulate,
        mix=mix_forward + mix_backward,
        recompute=recompute,
        host=count * (forward + backward),
        **messages,
    )


@dataclass(frozen=True)
class _Part:
    products: float
    passes: float


def _type(config: RunConfig) -> str:
    return "fp8" if config.precision.fp8 else config.precision.dtype


def _sizes(config: RunConfig) -> tuple[int, int]:
    """Numbers of all query heads and of all key heads."""
    model = config.model
    return model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels


def layer_products(config: RunConfig, machine: Machine) -> float:
    """Seconds of one layer's four matrix products in forward."""
    model, tensor = config.model, config.parallel.tensor
    query, key = _sizes(config)
    widths = (query + 2 * key, query, 2 * model.ffn_hidden_size, model.ffn_hidden_size)
    cost = machine.products[_type(config)]
    return sum(cost.seconds(2 * rows(config) * model.hidden_size * width / tensor) for width in widths)


def attention_seconds(config: RunConfig, machine: Machine) -> _Part:
    """Of one layer's core attention in forward: one causal kernel, which writes nothing but its output."""
    query, _ = _sizes(config)
    operations = 2 * rows(config) * config.data.sequence_length * query / config.parallel.tensor
    moved = 4 * rows(config) * query / config.parallel.tensor * element_bytes(config)
    return _Part(machine.attention[config.precision.dtype].seconds(operations), machine.passes.seconds(moved))


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


def _exponentials(config: RunConfig, machine: Machine) -> float:
    return rows(config) * config.model.ffn_hidden_size / config.parallel.tensor * machine.exponential_seconds


def _ends(config: RunConfig, machine: Machine, stage: int) -> _Part:
    """Embedding, output layer and cross entropy of a micro-batch, both ways, on the stages that hold them."""
    model, tensor = config.model, config.parallel.tensor
    vocab = padded_vocab_size(model.vocab_size) / tensor
    products = passes = 0.0
    if stage == 0:  # its backward writes a dense gradient
        hidden = rows(config) * model.hidden_size * element_bytes(config)
        passes += machine.passes.seconds(4 * hidden)
        passes += machine.passes.seconds(vocab * model.hidden_size * element_bytes(config))
    if stage == config.parallel.pipeline - 1:
        cost = machine.products[config.precision.dtype]
        products = 3 * cost.seconds(2 * rows(config) * model.hidden_size * vocab)
        logits = rows(config) * vocab
        times, exponentials = (10, 1) if config.precision.dtype == "fp32" else (18, 2)
        chunk = min(logits, LOSS_CHUNK["cpu" if machine.is_host else "cuda"])
        passes += times * logits / chunk * machine.passes.seconds(FP32 * chunk)
        passes += exponentials * logits * machine.exponential_seconds
    return _Part(products, passes)


def _mix_seconds(config: RunConfig, shared: CrossLayer, machine: Machine, layers: list[int]) -> tuple[float, float]:
    """What the method adds to these layers of one micro-batch, forward and backward: bound by memory."""
    megatron = shared.megatron
    if not megatron.shares_over_layers:
        return 0.0, 0.0
    size = element_bytes(config)
    if method := megatron.method_definition:  # each number is read once for a multiplication and an addition
        forward = sum(machine.passes.seconds(method.flops(layer) * hidden_rows(config) * size) for layer in layers)
        return forward, 2 * forward
    query, key = (width / min(config.parallel.tensor, width) for width in _sizes(config))
    factor = (1 if config.model.depth_attention.op == "triton" else LEAN_PASSES) * rows(config) * size
    reads = [query + 2 * key * (number + 1) for layer in layers if (number := shared.num_sources[layer])]
    forward = sum(machine.passes.seconds(factor * (read + key)) for read in reads)
    return forward, sum(machine.passes.seconds(factor * (2 * read + key)) for read in reads)


def _seconds(
    config: RunConfig, machine: Machine, sizes: Sizes, transfers: list[Transfer], axis: str, *, at_end: bool = False
) -> float:
    """Of one axis: a micro-batch's share, or what comes once a step."""
    parallel = config.parallel
    world = sizes.data_parallel_size * parallel.tensor * parallel.context * parallel.pipeline
    chosen = [each for each in transfers if each.axis == axis and (each.phase == "step") == at_end]
    total = sum(each.count * transfer_seconds(config, machine, each, world) for each in chosen)
    return total if at_end else total / sizes.num_microbatches


def transfer_seconds(config: RunConfig, machine: Machine, transfer: Transfer, world_size: int) -> float:
    """Of one collective. Where its group spans nodes, the ranks of a node share their adapters, as NCCL's rings do.

    Megatron numbers ranks tensor first, then context, data, pipeline. Neighbours in the pipeline are as far apart as
    all ranks of a stage: in one node if the world is.
    """
    parallel, node = config.parallel, machine.devices_per_node
    if transfer.axis == "pipeline":
        return (machine.intra_node if world_size <= node else machine.inter_node)[transfer.kind].seconds(transfer.sent)
    apart = 1 if transfer.axis == "tensor" else parallel.tensor  # the data group counts context ranks as well
    inside = machine.intra_node[transfer.kind].seconds(transfer.sent)
    if apart * transfer.ranks <= node:
        return inside
    share = max(1, node // apart)
    return max(inside, machine.inter_node[transfer.kind].seconds(transfer.sent / share))


def _hop_seconds(config: RunConfig, machine: Machine, sizes: Sizes, transfers: list[Transfer]) -> float:
    if config.parallel.virtual_pipeline > 1 and not machine.is_host:
        return 0.0
    return _seconds(config, machine, sizes, transfers, "pipeline")


def _end_of_step(
    config: RunConfig,
    shared: CrossLayer,
    sizes: Sizes,
    machine: Machine,
    stage: int,
    transfers: list[Transfer],
) -> tuple[float, float]:
    """Reduction of gradients with gathering of weights, and the optimizer with what it does to whole gradients."""
    weights = rank_weights(config, shared.megatron, stage).total
    sharded = config.engine.name == "megatron" or config.engine.zero_stage > 0
    own = weights / (sizes.data_parallel_size * config.parallel.context) if sharded else weights
    axes = ("data", "tensor", "pipeline")
    data = sum(_seconds(config, machine, sizes, transfers, axis, at_end=True) for axis in axes)
    whole = weights * FP32 * 3  # zeroed, scaled by the number of tokens
    shard = own * (ADAMW_BYTES[config.model.spec] + 3 * FP32 + FP32 + element_bytes(config))  # norm, clip, copy
    return data, machine.passes.seconds(whole) + machine.passes.seconds(shard)
