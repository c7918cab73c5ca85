"""Depth-Attention mixing: one function, several implementations of the same formula. Needs torch; `triton`, when it is
chosen, Triton and a GPU.

`depth_mix` checks shapes and picks an implementation by name; nothing falls back to another one on its own.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_depthattn.ops.lean import depth_mix_lean
from megatron_depthattn.ops.reference import depth_mix_reference, uniform_mix
from megatron_depthattn.ops.triton_mix import depth_mix_triton

__all__ = [
    "DEPTH_MIX_IMPLEMENTATIONS",
    "depth_mix",
    "depth_mix_lean",
    "depth_mix_reference",
    "depth_mix_triton",
    "uniform_mix",
]

_DepthMix = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor, Tensor, float], Tensor]

DEPTH_MIX_IMPLEMENTATIONS: dict[str, _DepthMix] = {
    "reference": depth_mix_reference,
    "lean": depth_mix_lean,
    "triton": depth_mix_triton,
}
"""Name (as in the configuration) to implementation. Same arguments, same results up to rounding in fp32."""


def depth_mix(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    implementation: str = "lean",
) -> Tensor:
    """Mix a layer's values with those of its source layers (arXiv:2606.05014; formula in reference.py).

    Args:
        q: queries [..., H, d]; query head h belongs to KV head h // (H / G). When tensor parallelism spreads
            the query heads of one KV head over ranks, pass the mean of each group instead, [..., G, d]: with
            H == G the group mean is the tensor itself, and its gradient is that of the mean.
        keys: one key tensor [..., G, d] per source layer; empty for a layer without sources.
        values: one mixed value tensor [..., G, d] per source layer, in the order of `keys`.
        k: the layer's own keys [..., G, d]. All keys and q must be on the same side of RoPE, either one.
        v: the layer's own values [..., G, d].
        scale: factor of the scores, normally 1 / sqrt(d).
        implementation: a name in `DEPTH_MIX_IMPLEMENTATIONS`.

    Returns:
        The mixed values [..., G, d] in v's dtype; without a source, `v` itself.

    Raises:
        ValueError: an unknown implementation, shapes that do not fit together, or what it does not support.
    """
    if implementation not in DEPTH_MIX_IMPLEMENTATIONS:
        raise ValueError(
            f"depth_mix implementation {implementation!r} is unknown; set one of {sorted(DEPTH_MIX_IMPLEMENTATIONS)}"
        )
    _check_shapes(q, keys, values, k, v)
    return DEPTH_MIX_IMPLEMENTATIONS[implementation](q, keys, values, k, v, scale)


def _check_shapes(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], k: Tensor, v: Tensor) -> None:
    """Raise for what broadcasting would silently turn into a wrong result."""
    if len(keys) != len(values):
        raise ValueError(f"got {len(keys)} source keys but {len(values)} source values; pass one of each per source")
    for i, tensor in enumerate((v, *keys, *values)):
        if tensor.shape != k.shape:
            name = "v" if i == 0 else f"keys[{i - 1}]" if i <= len(keys) else f"values[{i - 1 - len(keys)}]"
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} but k has {list(k.shape)}; the keys and values of "
                "the layer and of its sources must all be [..., num_kv_heads, head_dim] of the same tokens"
            )
    if q.ndim != k.ndim or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q has shape {list(q.shape)} but k has {list(k.shape)}; they may differ only in the number of "
            "heads, the dimension before the last"
        )
    if q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"q has {q.shape[-2]} heads, which is not a multiple of k's {k.shape[-2]}; pass whole groups of "
            "query heads, or the mean of each group"
        )
