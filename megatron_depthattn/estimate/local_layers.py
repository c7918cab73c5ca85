"""What the operations of ``spec="local"`` keep for backward: torch's, as Megatron-Core's modules call them. Pure."""

from __future__ import annotations

from megatron_depthattn.estimate.shapes import RankShape
from megatron_depthattn.estimate.storages import Storages


def norm(kept: Storages, shape: RankShape, given: str, made: str, *, width: int, count: int) -> str:
    """RMSNorm of ``count`` vectors; on a CPU several operations in fp32, elsewhere one."""
    numbers = count * width
    if shape.on_cpu and shape.element == 2:
        kept.keep_new(f"{made}.fp32", 4 * numbers)
    else:
        kept.keep(given)
    kept.keep_new(f"{made}.rstd", 4 * count)
    if shape.on_cpu:
        kept.keep_new(f"{made}.scaled", 4 * numbers)
    return kept.make(made, shape.element * numbers)


def rope(kept: Storages, shape: RankShape, layer: int) -> None:
    """Cosines and sines, each for q and for k."""
    kept.keep_new(f"rope.{layer}", 4 * shape.element * shape.query_length * shape.head_size)


def core_attention(kept: Storages, shape: RankShape, layer: int, query: str, key: str, value: str) -> None:
    """Scores as a matrix, with k and v repeated for every query head and, under context parallel, gathered."""
    kept.keep(query)
    everywhere = shape.key_length // shape.query_length
    if shape.num_heads > shape.num_groups:
        kept.keep_new(f"repeated_keys.{layer}", everywhere * shape.query_bytes)
        kept.keep_new(f"repeated_values.{layer}", everywhere * shape.query_bytes)
    elif everywhere > 1:
        kept.keep_new(f"gathered_keys.{layer}", everywhere * shape.key_bytes)
        kept.keep_new(f"gathered_values.{layer}", everywhere * shape.key_bytes)
    else:
        kept.keep(key, value)
    square = shape.query_length * shape.key_length
    kept.keep_new(f"mask.{layer}", square)
    scores = shape.batch * shape.num_heads * square
    kept.keep_new(f"softmax.{layer}", 4 * scores)
    if shape.element == 2:
        kept.keep_new(f"weights.{layer}", 2 * scores)


def mlp(kept: Storages, shape: RankShape, layer: int, given: str) -> None:
    """SwiGLU as five operations; ``given`` is normed."""
    inner = shape.element * shape.tokens * shape.ffn_size
    kept.keep(given)
    kept.keep_new(f"gate_and_up.{layer}", 2 * inner)
    for name in ("silu", "up", "product"):  # "up": an offset of zero is added to it
        kept.keep_new(f"{name}.{layer}", inner)
