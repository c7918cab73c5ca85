"""What a rank steps, by optimizer: AdamW's weights are shared out element by element, Muon's by whole matrices.

As train/muon.py builds it: the matrices of a chunk go, largest first, to the data-parallel rank that has the least, and
buffers are as long as if all had as much as the fullest. Imports no torch.
"""

from __future__ import annotations

import functools
import heapq
from typing import NamedTuple

from megatron_depthattn.config import ModelConfig, RunConfig
from megatron_depthattn.estimate.counts import RankWeights

PRODUCTS_A_STEP = 3
"""Matrix products of a Newton-Schulz step."""


class Shares(NamedTuple):
    """Elements on the fullest data-parallel rank."""

    buffers: int
    """Of its weights, padding included."""
    adamw: int
    """Stepped by AdamW."""
    muon: int
    """Stepped by Muon."""


def shares(config: RunConfig, weights: RankWeights, ranks: int) -> Shares:
    """``weights`` over so many data- and context-parallel ranks of Megatron's engine."""
    if config.optimizer.name == "adamw":
        return Shares(weights.total, -(-weights.total // ranks), 0)
    sizes = tuple(rows * columns // config.parallel.tensor for rows, columns in fused_matrices(config.model))
    chunks = max(1, config.parallel.virtual_pipeline // config.model.num_loops)  # a later loop's hold no weights
    fullest = chunks * _fullest(sizes, -(-weights.linear // sum(sizes) // chunks), ranks)
    rest = weights.total - weights.linear
    return Shares(ranks * fullest + rest, -(-rest // ranks), fullest)


def fused_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of a layer's weights."""
    query, key, hidden = *_heads(model), model.hidden_size
    return [
        (query + 2 * key, hidden),
        (hidden, query),
        (2 * model.ffn_hidden_size, hidden),
        (hidden, model.ffn_hidden_size),
    ]


def newton_schulz(config: RunConfig) -> tuple[int, int]:
    """Operations of the updates of one layer's matrices, and the matrix products that they consist of."""
    query, key = _heads(config.model)
    hidden, steps = config.model.hidden_size, config.optimizer.muon.ns_steps
    matrices = [(query, hidden), (key, hidden), (key, hidden), *fused_matrices(config.model)[1:]]
    sides = [(min(matrix), max(matrix)) for matrix in matrices]
    flops = sum(4 * short * short * long + 2 * short**3 for short, long in sides)  # X X', its square, their sum times X
    return steps * flops, steps * PRODUCTS_A_STEP * len(matrices)


def _heads(model: ModelConfig) -> tuple[int, int]:
    return model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels


@functools.lru_cache(4096)
def _fullest(sizes: tuple[int, ...], layers: int, ranks: int) -> int:
    loads = [0] * ranks
    for size in sorted(sizes * layers, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(loads)
