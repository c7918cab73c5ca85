"""What the operations of ``spec="local"`` keep for backward: torch's, as Megatron-Core's modules call them. Pure."""

from __future__ import annotations

from megatron_depthattn.estimate.shapes import RankShape
from megatron_depthattn.estimate.storages import Storages
from megatron_depthattn.model.activation_memory import BLOCK_ROWS


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
    """A flash kernel: its inputs, its output (which the projection keeps too) and the log of each row's sum.

    Under context parallel k and v are gathered, and a piece of the sequence goes in blocks of rows with one strip of
    masks. Rank 0 is counted, whose first piece needs none.
    """
    kept.keep(query)
    everywhere = shape.key_length // shape.query_length
    if everywhere > 1:
        kept.keep_new(f"gathered_keys.{layer}", everywhere * shape.key_bytes)
        kept.keep_new(f"gathered_values.{layer}", everywhere * shape.key_bytes)
        kept.keep_new(f"blocks.{layer}", shape.query_bytes)
        rows = shape.query_length // 2
        block = min(rows, BLOCK_ROWS)
        kept.keep_new(f"mask.{layer}", shape.element * block * (shape.key_length + block))
    else:
        kept.keep(key, value)
    kept.keep_new(f"logsumexp.{layer}", 4 * shape.batch * shape.num_heads * shape.query_length)


def mlp(kept: Storages, shape: RankShape, layer: int, given: str) -> None:
    """SwiGLU as five operations, or as one; ``given`` is normed."""
    inner = shape.element * shape.tokens * shape.ffn_size
    kept.keep(given)
    kept.keep_new(f"gate_and_up.{layer}", 2 * inner)
    unfused = () if shape.fused_swiglu else ("silu", "up")  # "up": an offset of zero is added to it
    for name in (*unfused, "product"):
        kept.keep_new(f"{name}.{layer}", inner)
