"""The transformer layer of Attention Residuals: each sublayer reads an attention over depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_depthattn.methods.attnres.definition import FINAL
from megatron_depthattn.methods.attnres.reference import aggregate
from megatron_depthattn.methods.definition import Parameters
from megatron_depthattn.methods.parameters import Initial, method_parameters, of_prefix, recomputed
from megatron_depthattn.methods.sublayers import SublayersLayer, without_residual
from megatron_depthattn.model.cross_layer import SourceTensors
from megatron_depthattn.model.transformer_config import DepthAttentionConfig

RECENCY_BIAS = 3.0
"""At first the stream weighs e^3 times as much as a snapshot."""


class Aggregator(torch.nn.Module):
    """Attention over the snapshots and the stream, each ``[s, b, h]``, by a learned query."""

    def __init__(self, config: DepthAttentionConfig, shapes: Parameters) -> None:
        super().__init__()
        initial: dict[str, Initial] = {
            "query": torch.zeros,
            "norm_weight": torch.ones,
            "recency_bias": lambda shape: torch.full(shape, RECENCY_BIAS),
        }
        for name, parameter in method_parameters(config, shapes, initial).items():
            self.register_parameter(name, parameter)
        self.config = config

    def forward(self, stream: Tensor, *snapshots: Tensor) -> Tensor:
        parameters = self.query, self.norm_weight, self.recency_bias
        eps = self.config.layernorm_epsilon
        return recomputed(self.config, aggregate, *parameters, eps, stream, *snapshots)  # type: ignore[return-value]


class AttentionResidualsLayer(SublayersLayer):
    """Its source is its input, where that is a snapshot; the last layer also aggregates what leaves the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        definition, index = self.config.method_definition, self.layer_index
        shapes = definition.layer_parameters(index)
        self.attention_aggregator = Aggregator(self.config, of_prefix(shapes, "attention_aggregator"))
        self.mlp_aggregator = Aggregator(self.config, of_prefix(shapes, "mlp_aggregator"))
        self.snapshots = definition.snapshots(index)
        self.is_last = definition.is_last(index)
        if self.is_last:
            self.final_aggregator = Aggregator(self.config, of_prefix(definition.final_parameters(), FINAL))
            self.final_snapshots = definition.snapshots(index + 1)

    def run_layer(
        self, hidden_states: Tensor, sources: Mapping[int, Any], attention_bias: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, SourceTensors]:
        own = stream = hidden_states
        inputs = {index: source[0] for index, source in sources.items()} | {self.layer_index: own}
        snapshots = [inputs[index] for index in self.snapshots]
        attention_input = self.attention_aggregator(stream, *snapshots)
        stream = stream + self.attention_sublayer(attention_input, attention_bias=attention_bias, **kwargs)
        stream = stream + self.mlp_sublayer(self.mlp_aggregator(stream, *snapshots), **kwargs)
        if self.is_last:
            inputs[self.layer_index + 1] = stream
            stream = self.final_aggregator(stream, *(inputs[index] for index in self.final_snapshots))
        return stream, (own,)


def with_attention_residuals(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a dense decoder layer's spec with aggregators in place of residuals."""
    return without_residual(spec, AttentionResidualsLayer)
