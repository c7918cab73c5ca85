"""What TransformerEngine's modules keep for backward, as Megatron-Core's layer spec puts them together. Pure.

Counted from the sources of TransformerEngine 2.20, not measured: ``module/layernorm_linear.py`` and ``linear.py``
(input, reciprocal deviations and normed input; in FP8 the latter, or the linear layer's input, as one byte a number for
the gradient of the weight), ``ops/basic/rmsnorm.py`` (a contiguous copy of a view), ``attention/dot_product_attention``
(q, k, v, output and the log of the sum of exponentials; a value that is a view is copied). RoPE is fused and keeps the
angles only. Layers that a recipe leaves in bf16 at the bottom and the top are counted as the others.
"""

from __future__ import annotations

from megatron_depthattn.estimate.shapes import RankShape
from megatron_depthattn.estimate.storages import Storages


def norm(kept: Storages, shape: RankShape, given: str, made: str, *, width: int, count: int, is_view: bool) -> str:
    """RMSNorm of ``count`` vectors."""
    size = shape.element * count * width
    if is_view:
        kept.keep_new(f"{made}.copy", size)
    else:
        kept.keep(given)
    kept.keep_new(f"{made}.rstd", 4 * count)
    return kept.make(made, size)


def linear_input(kept: Storages, shape: RankShape, given: str, numbers: int) -> None:
    """What a linear layer keeps of its input: itself, or an FP8 copy with its scales."""
    if shape.fp8 is None:
        kept.keep(given)
    else:
        kept.keep_new(f"{given}.fp8", numbers + scale_bytes(shape.fp8, numbers))


def scale_bytes(recipe: str, numbers: int) -> int:
    """Bytes of the scales of one FP8 copy of so many activations."""
    return {"blockwise": 4 * numbers // 128, "mxfp8": numbers // 32}.get(recipe, 4)


def core_attention(kept: Storages, shape: RankShape, layer: int, query: str, key: str, value: str) -> None:
    """Flash or cuDNN attention; under context parallel k and v travel, and stay on their own rank."""
    kept.keep(query, key)
    if kept.is_view(value):
        kept.keep_new(f"value_copy.{layer}", shape.key_bytes)
    else:
        kept.keep(value)
    kept.keep(f"attention_output.{layer}")
    kept.keep_new(f"log_sum_exp.{layer}", 4 * shape.tokens * shape.num_heads)


def mlp(kept: Storages, shape: RankShape, layer: int, given: str) -> None:
    """SwiGLU between two linear layers, as torch's operations or one kernel; ``given`` is normed."""
    numbers = shape.tokens * shape.ffn_size
    inner = shape.element * numbers
    linear_input(kept, shape, given, shape.rows * shape.hidden_size)
    kept.keep_new(f"gate_and_up.{layer}", 2 * inner)
    if not shape.fused_swiglu:
        kept.keep_new(f"silu.{layer}", inner)
        kept.keep_new(f"up.{layer}", inner)
    linear_input(kept, shape, kept.make(f"product.{layer}", inner), numbers)
