"""Depth-Attention's transformer layer: its sources are keys and mixed values, or what an ablation mixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_depthattn.model.attention import DepthCall
from megatron_depthattn.model.cross_layer import CrossLayerLayer, SourceTensors


class DepthAttentionLayer(CrossLayerLayer):
    """Hands its sources to its self-attention, `attention.DepthSelfAttention`, and leaves what that made."""

    def run_layer(
        self, hidden_states: Tensor, sources: Mapping[int, Any], attention_bias: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, SourceTensors]:
        read = {index: dict(zip(self.kinds, source, strict=True)) for index, source in sources.items()}
        call = DepthCall(read, attention_bias)
        hidden_states = self.vanilla_forward(hidden_states, attention_bias=call, **kwargs)
        made = call.made.pop()
        return hidden_states, tuple(made[kind] for kind in self.kinds)

    def source_of_message(self, parts: SourceTensors) -> SourceTensors:
        """Each part ``[s, b, groups, head size]`` of all positions, whatever the share of the hidden state."""
        rows, batch = parts[0].shape[:2]
        if self.config.sequence_parallel:
            rows *= self.config.tensor_model_parallel_size
        shape = (rows, batch, -1, self.self_attention.hidden_size_per_attention_head)
        return tuple(part.reshape(shape) for part in parts)
