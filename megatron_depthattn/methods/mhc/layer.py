"""mHC's transformer layer: several residual streams, a connector around each sublayer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import log
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_depthattn.methods.definition import Parameters
from megatron_depthattn.methods.mhc.definition import FINAL, SINKHORN_ITERATIONS
from megatron_depthattn.methods.mhc.reference import connect, weighted_streams, write_back
from megatron_depthattn.methods.parameters import Initial, method_parameters, of_prefix, recomputed
from megatron_depthattn.methods.sublayers import SublayersLayer, without_residual
from megatron_depthattn.model.cross_layer import SourceTensors
from megatron_depthattn.model.transformer_config import DepthAttentionConfig

SCALE = 0.01
"""What the input adds to the biases at first."""
STAY = 0.99
"""The part of a stream that stays in it at first."""


class Connector(torch.nn.Module):
    """Between streams ``[s, b, n * h]`` and a sublayer ``[s, b, h]``."""

    connect, write_back = staticmethod(connect), staticmethod(write_back)  # a model may have compiled ones

    def __init__(self, config: DepthAttentionConfig, shapes: Parameters) -> None:
        super().__init__()
        (n,) = shapes["pre_bias"]
        scale = partial(torch.full, fill_value=SCALE)
        initial: dict[str, Initial] = {
            "norm_weight": torch.ones,
            "pre_bias": partial(torch.full, fill_value=log(1 / (n - 1))),  # its sigmoid is 1 / n
            "post_bias": torch.zeros,
            "residual_bias": lambda _: torch.where(torch.eye(n) > 0, log(STAY), log((1 - STAY) / (n - 1))).flatten(),
            "pre_scale": scale,
            "post_scale": scale,
            "residual_scale": scale,
        }
        for name, parameter in method_parameters(config, shapes, initial).items():
            self.register_parameter(name, parameter)
        self.config = config

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sublayer's input, and what `write` needs, see `reference.connect`.

        The weights are read here and nowhere else: ZeRO stage 3 gathers a module's for its ``forward`` only.
        """
        names, weights = zip(*self.named_parameters(), strict=True)

        def run(streams: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            own = dict(zip(names, weights, strict=True))
            return self.connect(streams, own, eps=self.config.layernorm_epsilon, iterations=SINKHORN_ITERATIONS)

        return recomputed(self.config, run, streams, *weights)  # type: ignore[return-value]

    def write(self, streams: Tensor, output: Tensor, write: Tensor, mix: Tensor) -> Tensor:
        """The next streams ``[s, b, n * h]``, of a sublayer's output ``[s, b, h]``."""
        return recomputed(self.config, self.write_back, streams, output, write, mix)  # type: ignore[return-value]


class StreamReadout(torch.nn.Module):
    """The weighted mean of the streams that leaves the model."""

    def __init__(self, config: DepthAttentionConfig, shapes: Parameters) -> None:
        super().__init__()
        self.config = config
        self.weight = method_parameters(config, shapes, {"weight": torch.zeros})["weight"]

    def forward(self, streams: Tensor) -> Tensor:
        def run(streams: Tensor, weight: Tensor) -> Tensor:
            precise = torch.promote_types(streams.dtype, torch.float32)
            return weighted_streams(streams, weight.to(precise).softmax(dim=0))

        return recomputed(self.config, run, streams, self.weight)  # type: ignore[return-value]


class HyperConnectionsLayer(SublayersLayer):
    """The first layer makes the streams of the embedding, the last one the model's output of the streams."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        definition, index = self.config.method_definition, self.layer_index
        shapes = definition.layer_parameters(index)
        self.attention_connector = Connector(self.config, of_prefix(shapes, "attention_connector"))
        self.mlp_connector = Connector(self.config, of_prefix(shapes, "mlp_connector"))
        self.num_streams = definition.num_streams
        self.is_last = definition.is_last(index)
        if self.is_last:
            self.stream_readout = StreamReadout(self.config, of_prefix(definition.final_parameters(), FINAL))

    def run_layer(
        self, hidden_states: Tensor, sources: Mapping[int, Any], attention_bias: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, SourceTensors]:
        own = hidden_states
        streams = own.repeat(1, 1, self.num_streams) if self.layer_index == 0 else own
        attention_input, *back = self.attention_connector(streams)
        output = self.attention_sublayer(attention_input, attention_bias=attention_bias, **kwargs)
        streams = self.attention_connector.write(streams, output, *back)
        mlp_input, *back = self.mlp_connector(streams)
        streams = self.mlp_connector.write(streams, self.mlp_sublayer(mlp_input, **kwargs), *back)
        return self.stream_readout(streams) if self.is_last else streams, (own,)


def with_hyper_connections(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a dense decoder layer's spec with connectors in place of residuals."""
    return without_residual(spec, HyperConnectionsLayer)
