"""What Depth-Attention keeps for backward above the vanilla model, counted from the source plan.

Pure: integers in, integers out, in numbers (elements) per token, for a whole model on one pipeline stage.

A layer's key and value are there in vanilla too, but not always as tensors that are kept. Core attention either keeps
the q, k and v that it is given (TransformerEngine's; the local one when it is recomputed, or without grouped heads), or
copies of k and v that it has repeated for every query head (the local one otherwise). The value that vanilla's is given
is a view of the fused QKV projection. Where the norm of k keeps that projection alive in both models (torch's norm
does), the own value that the mix keeps is such a view, too, and a mixed value is memory of its own. TransformerEngine's
norm does not, and its core attention copies a value that is a view: the mixed value takes the place of that copy, and
the own value is a copy that only the mix keeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_depthattn.model.source_plan import SourcePlan


@dataclass(frozen=True)
class DepthActivations:
    """Numbers per token that are kept from forward to backward, above vanilla."""

    source_keys: int = 0
    """Keys that later layers read, where core attention does not keep them anyway."""
    source_values: int = 0
    """Mixed values that later layers read (of a layer without sources: its value)."""
    own_keys: int = 0
    """Keys that only the layer's own mix scores, where core attention does not keep them anyway."""
    mixed_values: int = 0
    """Mixed values that only the layer's own core attention reads."""
    own_values: int = 0
    """Values before the mix, which its backward pass multiplies with, if they are copies."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def source_numbers(plan: SourcePlan, *, key_size: int) -> int:
    """Key and mixed value of every layer that is read, numbers per token: the least that can be kept of them.

    Args:
        key_size: numbers of one key, ``kv_heads * head_size`` of this rank.
    """
    return 2 * key_size * len(_read_layers(plan))


def depth_activations(
    plan: SourcePlan,
    *,
    key_size: int,
    attention_keeps_inputs: bool,
    norm_keeps_projection: bool = True,
    recomputed: bool = False,
) -> DepthActivations:
    """What the model keeps above vanilla with the `lean` mix, under q/k norm and RoPE.

    Args:
        plan: of a model on one pipeline stage.
        key_size: numbers of one key, ``kv_heads * head_size`` of this rank.
        attention_keeps_inputs, norm_keeps_projection: see above.
        recomputed: under full recompute of all layers.

    Raises:
        ValueError: the plan has more than one chunk.
    """
    if len(plan.chunk_starts) > 1:
        raise ValueError("activations are counted for a model on one pipeline stage: give a plan of one chunk")
    read = _read_layers(plan)
    if recomputed:
        return DepthActivations(source_keys=key_size * len(read), source_values=key_size * len(read))
    mixing = {layer for layer in range(plan.num_layers) if plan.sources(layer)}
    keys = 0 if attention_keeps_inputs else key_size
    replaces_copy = attention_keeps_inputs and not norm_keeps_projection
    values = 0 if replaces_copy else key_size
    return DepthActivations(
        source_keys=keys * len(read),
        source_values=values * len(read),
        own_keys=keys * len(mixing - read),
        mixed_values=values * len(mixing - read) if attention_keeps_inputs else 0,
        own_values=0 if norm_keeps_projection else key_size * len(mixing),
    )


def _read_layers(plan: SourcePlan) -> set[int]:
    return {source for layer in range(plan.num_layers) for source in plan.sources(layer)}
