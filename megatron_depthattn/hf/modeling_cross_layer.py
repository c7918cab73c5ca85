"""Qwen3-style decoders with DenseFormer, Attention Residuals or mHC, for transformers 4.57 and 5.

DenseFormer (arXiv:2402.02622): before a layer, and behind the last one, stands a weighted sum over the embedding and
the outputs of the layers so far.
Attention Residuals in block form: sublayers and the final norm read an attention over snapshots of the residual stream
and the stream itself at the same token.
Manifold-constrained hyper-connections (mHC): several residual streams flow from layer to layer; each sublayer reads a
weighted sum of them and writes to all, and a matrix whose rows and columns sum to one mixes them.

All other weights have Qwen3's names and shapes; the key/value cache is a vanilla decoder's. The file ships inside
exported folders, beside ``modeling_depthattn.py``, and needs torch and transformers only.

Shapes: b batch, t new tokens, n streams. What a layer reads of earlier ones are positional tensor arguments, so
gradients flow through them under both kinds of gradient checkpointing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_cross_layer import AttnResConfig, DenseFormerConfig, MHCConfig
from .modeling_depthattn import (
    CrossLayerForCausalLM,
    CrossLayerForSequenceClassification,
    CrossLayerModel,
    CrossLayerPreTrainedModel,
    DecoderLayer,
    weighted_sum,
)

SINKHORN_ITERATIONS = 20
CLAMP = 1e-12

# ------------------------------------------------------------------------------------------------ DenseFormer


class DepthAverage(nn.Module):
    """A weighted sum of hidden states; the weights are free and start as zeros with a final one."""

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_states))

    def initial(self) -> dict[str, Tensor | float]:
        """The last state alone."""
        return {"weight": torch.eye(len(self.weight))[-1]}

    def forward(self, *states: Tensor) -> Tensor:
        """The sum, in fp32, of ``states`` [b, t, hidden] each; in the type of the last."""
        precise = torch.promote_types(states[-1].dtype, torch.float32)
        return weighted_sum(self.weight.to(precise).unbind(), states)


class DenseFormerDecoderLayer(DecoderLayer):
    """Qwen3's block, reading an average over depth first where one stands before it."""

    def __init__(self, config: DenseFormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        num_states = len(config.averaged(layer_idx))
        self.depth_average = DepthAverage(num_states) if num_states else None

    def forward(self, hidden_states: Tensor, *earlier: Tensor, **kwargs: Any) -> Tensor:
        """The block's output [b, t, hidden]; ``earlier``: the states that are averaged with ``hidden_states``."""
        if self.depth_average is not None:
            hidden_states = self.depth_average(*earlier, hidden_states)
        hidden_states = hidden_states + self.attend(hidden_states, **kwargs)
        return hidden_states + self.feed_forward(hidden_states)


class DenseFormerPreTrainedModel(CrossLayerPreTrainedModel):
    config_class = DenseFormerConfig
    _no_split_modules = ["DenseFormerDecoderLayer"]  # noqa: RUF012


class DenseFormerModel(DenseFormerPreTrainedModel, CrossLayerModel):
    layer_class = DenseFormerDecoderLayer

    def add_final(self, config: DenseFormerConfig) -> None:
        num_states = len(config.averaged(config.num_hidden_layers))
        self.final_depth_average = DepthAverage(num_states) if num_states else None

    def run_layers(self, hidden_states: Tensor, kept: dict[str, list[Tensor]], **kwargs: Any) -> Tensor:
        states, averaged = [hidden_states], self.config.averaged  # the embedding, and the output of every block
        for index, layer in enumerate(self.layers):
            kept.get("hidden_states", []).append(states[index])
            states.append(layer(states[index], *(states[i] for i in averaged(index)[:-1]), **kwargs))
        if self.final_depth_average is None:
            return states[-1]
        average: Tensor = self.final_depth_average(*(states[i] for i in averaged(len(self.layers))))
        return average


class DenseFormerForCausalLM(DenseFormerPreTrainedModel, CrossLayerForCausalLM):
    decoder_class = DenseFormerModel


class DenseFormerForSequenceClassification(CrossLayerForSequenceClassification, DenseFormerPreTrainedModel):
    decoder_class = DenseFormerModel


# ------------------------------------------------------------------------------------------------ Attention Residuals


class ResidualAggregator(nn.Module):
    """Attention of one learned query over snapshots and residual stream, token by token."""

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm_weight = nn.Parameter(torch.ones(config.hidden_size))
        self.recency_bias = nn.Parameter(torch.full((1,), 3.0))

    def initial(self) -> dict[str, Tensor | float]:
        """Mostly the stream."""
        return {"query": 0.0, "norm_weight": 1.0, "recency_bias": 3.0}

    def forward(self, *candidates: Tensor) -> Tensor:
        """Their weighted sum, in fp32; ``candidates`` [b, t, hidden] each, the stream last, whose type it gets.

        The scores are of normed candidates and the sum is of raw ones.
        """
        precise = torch.promote_types(candidates[-1].dtype, torch.float32)
        direction = self.query.to(precise) * self.norm_weight.to(precise)
        scores = []
        for candidate in candidates:
            x = candidate.to(precise)
            scores.append((x * direction).sum(dim=-1) * torch.rsqrt(x.square().mean(dim=-1) + self.eps))
        scores[-1] = scores[-1] + self.recency_bias.to(precise)
        weights = torch.stack(scores, dim=-1).softmax(dim=-1)
        return weighted_sum(weights.unsqueeze(-1).unbind(-2), candidates)


class AttnResDecoderLayer(DecoderLayer):
    """Qwen3's block, whose sublayers write to the residual stream and read it with its snapshots."""

    def __init__(self, config: AttnResConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_aggregator = ResidualAggregator(config)
        self.mlp_aggregator = ResidualAggregator(config)

    def forward(self, hidden_states: Tensor, *snapshots: Tensor, **kwargs: Any) -> Tensor:
        """The residual stream [b, t, hidden] behind this layer; ``hidden_states``: the one before it."""
        hidden_states = hidden_states + self.attend(self.attention_aggregator(*snapshots, hidden_states), **kwargs)
        return hidden_states + self.feed_forward(self.mlp_aggregator(*snapshots, hidden_states))


class AttnResPreTrainedModel(CrossLayerPreTrainedModel):
    config_class = AttnResConfig
    _no_split_modules = ["AttnResDecoderLayer"]  # noqa: RUF012


class AttnResModel(AttnResPreTrainedModel, CrossLayerModel):
    layer_class = AttnResDecoderLayer

    def add_final(self, config: AttnResConfig) -> None:
        self.final_aggregator = ResidualAggregator(config)

    def run_layers(self, hidden_states: Tensor, kept: dict[str, list[Tensor]], **kwargs: Any) -> Tensor:
        snapshots = []
        for index, layer in enumerate(self.layers):
            kept.get("hidden_states", []).append(hidden_states)
            if self.config.is_snapshot(index):
                snapshots.append(hidden_states)
            hidden_states = layer(hidden_states, *snapshots, **kwargs)
        if self.config.is_snapshot(len(self.layers)):
            snapshots.append(hidden_states)
        mixed: Tensor = self.final_aggregator(*snapshots, hidden_states)
        return mixed


class AttnResForCausalLM(AttnResPreTrainedModel, CrossLayerForCausalLM):
    decoder_class = AttnResModel


class AttnResForSequenceClassification(CrossLayerForSequenceClassification, AttnResPreTrainedModel):
    decoder_class = AttnResModel


# ------------------------------------------------------------------------------------------------ mHC


def sinkhorn(logits: Tensor) -> Tensor:
    """Matrices [..., n, n] whose rows and columns sum to (nearly) one, from ``logits`` of that shape."""
    matrix = (logits - logits.amax(dim=(-2, -1), keepdim=True)).exp().clamp(min=CLAMP)
    for _ in range(SINKHORN_ITERATIONS):
        matrix = matrix / matrix.sum(dim=-1, keepdim=True).clamp(min=CLAMP)
        matrix = matrix / matrix.sum(dim=-2, keepdim=True).clamp(min=CLAMP)
    return matrix


class StreamConnector(nn.Module):
    """How one sublayer reads the streams, how they are mixed, and how its output is written to them."""

    def __init__(self, config: MHCConfig) -> None:
        super().__init__()
        n = config.mhc_num_streams
        self.num_streams, self.eps, self.init_std = n, config.rms_norm_eps, config.initializer_range
        self.norm_weight = nn.Parameter(torch.ones(n * config.hidden_size))
        self.projection = nn.Parameter(torch.zeros(n * n + 2 * n, n * config.hidden_size))
        self.pre_bias = nn.Parameter(torch.zeros(n))
        self.post_bias = nn.Parameter(torch.zeros(n))
        self.residual_bias = nn.Parameter(torch.zeros(n * n))  # row by row
        self.pre_scale = nn.Parameter(torch.zeros(1))
        self.post_scale = nn.Parameter(torch.zeros(1))
        self.residual_scale = nn.Parameter(torch.zeros(1))

    def initial(self) -> dict[str, Tensor | float]:
        """The mean of the streams is read, and each stays nearly as it is."""
        n = self.num_streams
        mixing = torch.full((n, n), 0.01 / (n - 1)).fill_diagonal_(0.99)
        return {
            "norm_weight": 1.0,
            "projection": torch.empty_like(self.projection).normal_(std=self.init_std),
            "pre_bias": -math.log(n - 1),  # of which the sigmoid is 1 / n
            "post_bias": 0.0,
            "residual_bias": mixing.log().flatten(),
            **dict.fromkeys(("pre_scale", "post_scale", "residual_scale"), 0.01),
        }

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The streams [b, t, n, hidden] behind ``sublayer`` [b, t, hidden] -> [b, t, hidden].

        All but the sublayer is computed in fp32, under autocast as well.
        """
        precise = torch.promote_types(streams.dtype, torch.float32)
        wide = streams.to(precise)
        with torch.autocast(streams.device.type, enabled=False):
            pre, post, residual = self.weights(wide)
            read = (pre.unsqueeze(-1) * wide).sum(dim=-2)
        written = sublayer(read.to(streams.dtype)).to(precise)
        with torch.autocast(streams.device.type, enabled=False):
            return (residual @ wide + post.unsqueeze(-1) * written.unsqueeze(-2)).to(streams.dtype)

    def weights(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of reading [b, t, n], of writing [b, t, n] and of mixing [b, t, n, n], row i for the new stream i."""
        n, precise = self.num_streams, streams.dtype
        x = streams.flatten(-2)
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.norm_weight.to(precise)
        dynamic = nn.functional.linear(x, self.projection.to(precise))
        pre, post, residual = (
            scale.to(precise) * part + bias.to(precise)
            for part, scale, bias in zip(
                dynamic.split((n, n, n * n), dim=-1),
                (self.pre_scale, self.post_scale, self.residual_scale),
                (self.pre_bias, self.post_bias, self.residual_bias),
                strict=True,
            )
        )
        return pre.sigmoid(), 2 * post.sigmoid(), sinkhorn(residual.unflatten(-1, (n, n)))


class StreamReadout(nn.Module):
    """A weighted mean of the streams behind the last layer."""

    def __init__(self, config: MHCConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.mhc_num_streams))

    def initial(self) -> dict[str, Tensor | float]:
        """The mean."""
        return {"weight": 0.0}

    def forward(self, streams: Tensor) -> Tensor:
        """[b, t, hidden] of ``streams`` [b, t, n, hidden], computed in fp32."""
        precise = torch.promote_types(streams.dtype, torch.float32)
        shares = self.weight.to(precise).softmax(dim=0)
        return (shares.unsqueeze(-1) * streams.to(precise)).sum(dim=-2).to(streams.dtype)


class MHCDecoderLayer(DecoderLayer):
    """Qwen3's two sublayers, each connected to all streams."""

    def __init__(self, config: MHCConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_connector = StreamConnector(config)
        self.mlp_connector = StreamConnector(config)

    def forward(self, streams: Tensor, **kwargs: Any) -> Tensor:
        """The streams [b, t, n, hidden] behind this layer; ``streams``: those before it."""
        streams = self.attention_connector(streams, lambda x: self.attend(x, **kwargs))
        return self.mlp_connector(streams, self.feed_forward)


class MHCPreTrainedModel(CrossLayerPreTrainedModel):
    config_class = MHCConfig
    _no_split_modules = ["MHCDecoderLayer"]  # noqa: RUF012


class MHCModel(MHCPreTrainedModel, CrossLayerModel):
    layer_class = MHCDecoderLayer

    def add_final(self, config: MHCConfig) -> None:
        self.stream_readout = StreamReadout(config)

    def run_layers(self, hidden_states: Tensor, kept: dict[str, list[Tensor]], **kwargs: Any) -> Tensor:
        streams = hidden_states.unsqueeze(-2).expand(-1, -1, self.config.mhc_num_streams, -1)
        for layer in self.layers:
            kept.get("hidden_states", []).append(streams)
            streams = layer(streams, **kwargs)
        read: Tensor = self.stream_readout(streams)
        return read


class MHCForCausalLM(MHCPreTrainedModel, CrossLayerForCausalLM):
    decoder_class = MHCModel


class MHCForSequenceClassification(CrossLayerForSequenceClassification, MHCPreTrainedModel):
    decoder_class = MHCModel


__all__ = [
    f"{method}{kind}"
    for method in ("DenseFormer", "AttnRes", "MHC")
    for kind in ("ForCausalLM", "ForSequenceClassification", "Model", "PreTrainedModel")
]
