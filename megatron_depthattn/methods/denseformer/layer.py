"""DenseFormer's transformer layer: averages its input with those of earlier layers before anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_depthattn.methods.definition import Parameters
from megatron_depthattn.methods.denseformer.reference import weighted_sum
from megatron_depthattn.methods.parameters import method_parameters, of_prefix, recomputed
from megatron_depthattn.model.cross_layer import CrossLayerLayer, SourceTensors
from megatron_depthattn.model.transformer_config import DepthAttentionConfig


class DepthAverage(torch.nn.Module):
    """A weighted sum of hidden states ``[s, b, h]``; at first that of the last state alone."""

    def __init__(self, config: DepthAttentionConfig, shapes: Parameters) -> None:
        super().__init__()
        self.config = config
        self.weight = method_parameters(config, shapes, {"weight": _last_alone})["weight"]

    def forward(self, *states: Tensor) -> Tensor:
        return recomputed(self.config, weighted_sum, self.weight, *states)  # type: ignore[return-value]


def _last_alone(shape: tuple[int, ...]) -> Tensor:
    weights = torch.zeros(shape)
    weights[-1] = 1.0
    return weights


class DenseFormerLayer(CrossLayerLayer):
    """Its source is its input; the last layer also averages what leaves the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        definition = self.config.method_definition
        self.averaged = definition.averaged(self.layer_index)
        self.finally_averaged = (
            definition.averaged(self.layer_index + 1) if definition.is_last(self.layer_index) else ()
        )
        if self.averaged:
            shapes = of_prefix(definition.layer_parameters(self.layer_index), "depth_average")
            self.depth_average = DepthAverage(self.config, shapes)
        if self.finally_averaged:
            shapes = of_prefix(definition.final_parameters(), "final_depth_average")
            self.final_depth_average = DepthAverage(self.config, shapes)

    def run_layer(
        self, hidden_states: Tensor, sources: Mapping[int, Any], attention_bias: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, SourceTensors]:
        own = hidden_states
        states = {index: source[0] for index, source in sources.items()} | {self.layer_index: own}
        if self.averaged:
            hidden_states = self.depth_average(*(states[state] for state in self.averaged))
        hidden_states = self.vanilla_forward(hidden_states, attention_bias=attention_bias, **kwargs)
        if self.finally_averaged:
            states[self.layer_index + 1] = hidden_states
            hidden_states = self.final_depth_average(*(states[state] for state in self.finally_averaged))
        return hidden_states, (own,)


def with_denseformer(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a dense decoder layer's spec with depth-weighted averages."""
    return dataclasses.replace(spec, module=DenseFormerLayer)
