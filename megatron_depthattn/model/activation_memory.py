"""What Depth-Attention keeps for backward above the vanilla model, counted from the source plan.

Pure: integers in, integers out, in elements per token, for a whole model on one pipeline stage.

A layer's key and value are there in vanilla too, and core attention keeps the q, k and v that it is given. But the
value is there a view of the fused QKV projection. Where the norm of k keeps that projection alive in both models
(torch's norm does), the own value that the mix keeps is such a view, too, and a mixed value is memory of its own.
TransformerEngine's norm does not, and its core attention copies a value that is a view: the mixed value takes the
place of that copy, and the own value is a copy that only the mix keeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_depthattn.model.source_plan import SourcePlan

BLOCK_ROWS = 128
"""Rows of queries that share a mask in the local core attention, where they are fewer than the keys."""


@dataclass(frozen=True)
class DepthActivations:
    """Numbers per token that are kept from forward to backward, above vanilla."""

    source_keys: int = 0
    """Keys that later layers read, where core attention does not keep them: recomputed layers."""
    source_values: int = 0
    """Mixed values that later layers read (of a layer without sources: its value)."""
    mixed_values: int = 0
    """Mixed values that only the layer's own core attention reads."""
    own_values: int = 0
    """Values before the mix, which its backward pass multiplies with, if they are copies."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def source_numbers(plan: SourcePlan, *, key_size: int) -> int:
    """Key and mixed value of every layer that is read, elements per token: the least that can be kept of them.

    Args:
        key_size: elements of one key, ``kv_heads * head_size`` of this rank.
    """
    return 2 * key_size * len(_read_layers(plan))


def depth_activations(
    plan: SourcePlan, *, key_size: int, norm_keeps_projection: bool = True, recomputed: bool = False
) -> DepthActivations:
    """What the model keeps above vanilla with the `lean` mix, under q/k norm and RoPE.

    Args:
        plan: of a model on one pipeline stage.
        key_size: elements of one key, ``kv_heads * head_size`` of this rank.
        norm_keeps_projection: see above.
        recomputed: under full recompute of all layers.

    Raises:
        ValueError: the plan has more than one chunk, or is that of an ablation.
    """
    if plan.kinds != ("key", "value"):
        raise ValueError(
            f"activations are counted for weights=softmax and mixes=value, not for sources of {', '.join(plan.kinds)}; "
            "depthattn estimate counts those of an ablation"
        )
    if len(plan.chunk_starts) > 1:
        raise ValueError("activations are counted for a model on one pipeline stage: give a plan of one chunk")
    read = _read_layers(plan)
    if recomputed:
        return DepthActivations(source_keys=key_size * len(read), source_values=key_size * len(read))
    mixing = {layer for layer in range(plan.num_layers) if plan.sources(layer)}
    if not norm_keeps_projection:
        return DepthActivations(own_values=key_size * len(mixing))
    return DepthActivations(source_values=key_size * len(read), mixed_values=key_size * len(mixing - read))


def _read_layers(plan: SourcePlan) -> set[int]:
    return {source for layer in range(plan.num_layers) for source in plan.sources(layer)}
