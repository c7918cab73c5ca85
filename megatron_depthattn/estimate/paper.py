"""Table 2 of arXiv:2606.05014: what each method adds to a token's forward pass, by the paper's counting.

A multiplication with its addition is two operations; softmax, norms and sigmoids are left out. The paper counts a score
and a weighted sum; `model/flops.py` counts more, see `flops_difference`. The counts follow from the source plan and
the methods' definitions, so they hold for any config. Of torch only `show_table` makes use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from operator import sub
from typing import Any, NamedTuple

from megatron_depthattn.cli.common import print_table
from megatron_depthattn.config import RunConfig
from megatron_depthattn.config.pipeline import EVEN
from megatron_depthattn.estimate.counts import (
    cross_layer_method,
    decoder_shape,
    element_bytes,
    forward_flops,
    source_plan,
)
from megatron_depthattn.methods.attnres.definition import AttentionResiduals
from megatron_depthattn.methods.definitions import DEFINITIONS
from megatron_depthattn.methods.denseformer.definition import DenseFormer
from megatron_depthattn.methods.mhc.definition import SINKHORN_ITERATIONS, HyperConnections
from megatron_depthattn.model.source_plan import CrossLayerPlan, SourcePlan

TITLES = {"depth_attention": "Depth-Attention"} | {name: method.title for name, method in DEFINITIONS.items()}
"""The methods of the paper's tables 2 and 3 by name, in its order."""
PREFILL_TOKENS = 128 * 1024


class Added(NamedTuple):
    """What a method adds to vanilla."""

    flops: int
    """Operations of a token."""
    io: int
    """Bytes of activations that a token's forward pass reads and writes."""
    memory: int
    """Bytes that prefill keeps of a token beside the key/value cache."""


def with_method(config: RunConfig, method: str) -> RunConfig:
    """The config with one of the methods, or ``vanilla``, on one rank.

    Raises:
        ValueError: its model is looped, which the paper's table does not count.
    """
    model = config.model
    if model.num_loops > 1:
        raise ValueError(
            f"model.num_loops is {model.num_loops}: the paper's methods run each layer once, set model.num_loops=1"
        )
    depth = dataclasses.replace(model.depth_attention, enabled=True)
    alone = dataclasses.replace(
        config.parallel, **EVEN, tensor=1, pipeline=1, virtual_pipeline=1, context=1, sequence=False
    )
    model = dataclasses.replace(model, method=method, depth_attention=depth)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=model, parallel=alone)


def candidates(plan: CrossLayerPlan) -> list[int]:
    """Of every layer that mixes, its sources and itself."""
    return [len(plan.sources(layer)) + 1 for layer in range(plan.num_layers) if plan.sources(layer)]


def _candidates(config: RunConfig) -> list[int]:
    """Those of Depth-Attention."""
    plan = source_plan(config)
    return candidates(plan) if isinstance(plan, SourcePlan) else []


def by_the_paper(config: RunConfig) -> Added:
    """What the config's method adds, as the paper counts."""
    model, method, element = config.model, cross_layer_method(config.model), element_bytes(config)
    size, layers = model.hidden_size, model.num_layers
    vectors = kept = 0
    match method:
        case None:  # Depth-Attention: key and value of every candidate read; its sources are in the cache
            size, read = model.num_query_groups * model.kv_channels, sum(_candidates(config))
            flops, vectors = 4 * read, 2 * read + (layers if read else 0)
        case DenseFormer():
            averages = [states for state in range(layers + 1) if (states := method.averaged(state))]
            read = sum(map(len, averages))
            flops, vectors, kept = 2 * read, read + len(averages), len(set().union(*averages)) - 1
        case AttentionResiduals():  # once where the stream equals the newest snapshot; without the final aggregator
            found = [method.snapshots(layer) for layer in range(layers)]
            read = sum(len({*own, layer}) + len(own) + 1 for layer, own in enumerate(found))
            flops, vectors, kept = 4 * read, 2 * read + 2 * layers, len(found[-1])
        case HyperConnections(num_streams=n):
            # Norm 2n, projection n, read n + 1, mix and write 2n + 1, less the 3 of a plain residual: 23, which the
            # paper's sum was found to be for 4 streams; it does not list them.
            flops, vectors, kept = 2 * layers * 2 * (n * n + 2 * n) * (n + 1), 2 * layers * (6 * n - 1), n - 1
        case _:
            raise ValueError(f"the paper does not count {method.title}")
    return Added(flops * size, element * vectors * size, element * kept * size)


def kernel_io(config: RunConfig) -> int:
    """Bytes of a token that a kernel of the mix moves, reading q, keys and values once: what the Triton kernel does."""
    model, mixed = config.model, _candidates(config)
    query, key = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    return element_bytes(config) * sum(query + (2 * number + 1) * key for number in mixed)


def flops_difference(config: RunConfig) -> str:
    """Why `forward_flops` counts other operations than the paper; the parts add up to the difference."""
    method, model = cross_layer_method(config.model), config.model
    parts: dict[str, int] = {}
    match method:
        case None:
            query = model.num_attention_heads * model.kv_channels
            parts["means of the queries of a group"] = len(_candidates(config)) * query
        case AttentionResiduals():
            sources = range(0, model.num_layers, method.block_layers)
            parts["the final aggregator"] = 4 * model.hidden_size * (len(method.snapshots(model.num_layers)) + 1)
            parts["the stream beside the snapshot that it equals"] = 4 * model.hidden_size * len(sources)
        case HyperConnections(num_streams=n):
            parts["Sinkhorn's sums and divisions"] = 2 * model.num_layers * SINKHORN_ITERATIONS * 4 * n * n
            parts["the streams' final mean"] = 2 * n * model.hidden_size
    more = forward_flops(config).mix - by_the_paper(config).flops
    if rest := more - sum(parts.values()):  # of settings that the paper's table does not have
        parts["settings that the paper does not count"] = rest
    return "; ".join(f"{number:+,} for {what}" for what, number in parts.items()) or "equal"


def show_table(name: str, config: RunConfig) -> dict[str, Any]:
    """Print the paper's table 2 for a config's shape, ours beside it, and a line for each difference.

    Args:
        name: of the config, for the title.

    Returns:
        By method what was printed, in operations and bytes.

    Raises:
        ValueError: the config's model is looped, or an ablation.
    """
    from megatron_depthattn.estimate.prefill import fake_prefill

    depth = config.model.depth_attention
    if (depth.weights, depth.mixes) != ("softmax", "value"):
        raise ValueError(
            f"model.depth_attention.weights is {depth.weights} and mixes is {depth.mixes}: the table counts the "
            "paper's method, set model.depth_attention.weights=softmax model.depth_attention.mixes=value"
        )
    vanilla = fake_prefill(with_method(config, "vanilla"), PREFILL_TOKENS)
    twice_the_weights = 2 * decoder_shape(with_method(config, "vanilla")).parameters
    rows, lines, values = [], [], {}
    for method, title in TITLES.items():
        own = with_method(config, method)
        paper, found = by_the_paper(own), fake_prefill(own, PREFILL_TOKENS)
        moved = (found.moved - vanilla.moved) // PREFILL_TOKENS
        ours = Added(forward_flops(own).mix, moved, (found.peak - vanilla.peak) // PREFILL_TOKENS)
        kept = PREFILL_TOKENS * (max(map(sub, found.kept, vanilla.kept)) // PREFILL_TOKENS)
        cells = [title]
        for paper_value, our_value, text in zip(paper, ours, _TEXTS, strict=True):
            cells += [text(paper_value), text(our_value)]
        cells[1] += f" ({100 * paper.flops / twice_the_weights:.3f} %)"
        rows.append(cells)
        kernel = f"I/O: {binary(kernel_io(own))} in the Triton kernel that trains; " if kernel_io(own) else ""
        lines.append(
            f"{title}: FLOPs: {flops_difference(own)}; {kernel}memory: {binary(kept)} kept between layers, the rest "
            "temporaries of a layer"
        )
        values[title] = {"paper": paper._asdict(), "ours": ours._asdict(), "kept": kept}
    heads = [f"{what}: {whose}" for what in _HEADS for whose in ("paper", "ours")]
    print_table(["above vanilla", *heads], rows, title=f"table 2 of arXiv:2606.05014 for {name}")
    print("\n".join([*lines, *_NOTES]))
    return values


def binary(num_bytes: int) -> str:
    """A number of bytes as the table prints it; halves are rounded up."""
    for unit, power, digits in (("GiB", 30, "0.1"), ("MiB", 20, "0.01"), ("KiB", 10, "1")):
        if num_bytes >= 1 << power:
            return f"{(Decimal(num_bytes) / (1 << power)).quantize(Decimal(digits), ROUND_HALF_UP)} {unit}"
    return f"{num_bytes}"


_HEADS = ("FLOPs a token (of 2N)", "activation I/O a token", "memory for 128K tokens")
_TEXTS: tuple[Callable[[int], str], ...] = (
    lambda number: f"{number:.2e}".replace("e+0", "e"),
    binary,
    lambda number: binary(number * PREFILL_TOKENS),
)
_NOTES = (
    "paper: its counting for this shape, each vector read or written once; N: weights of the vanilla model. Neither "
    "counts softmax, norms or sigmoids as operations",
    "ours: FLOPs as `depthattn estimate` counts them; I/O (what plain PyTorch operations read and write, most in fp32) "
    "and peak memory of the exported models in transformers, above vanilla's, in one prefill with a cache, run with "
    "fake tensors; weights are left out of both",
    "kept: where a layer begins, above vanilla, which holds the embedding and the current hidden state too",
)
