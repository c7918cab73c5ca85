"""A Qwen3-style decoder with manifold-constrained hyper-connections (mHC), for transformers 4.57 and 5.

Several residual streams flow from layer to layer. Each sublayer reads a weighted sum of them, and its output is added
to all of them, with weights; the streams themselves are mixed by a matrix whose rows and columns sum to one. All these
weights depend on the token. All other weights have Qwen3's names and shapes. The key/value cache is a vanilla
decoder's.

It ships inside every exported folder and needs torch and transformers only.

Shapes: b batch, t new tokens, n streams. The streams are one tensor [b, t, n, hidden].
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)
from transformers.utils import can_return_tuple

from .configuration_mhc import MHCConfig

# transformers renamed and dropped arguments of these functions between 4.57 and 5, and `past_key_values` in 5.24.
_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
_CACHE = "past_key_values" if "past_key_values" in _MASK_ARGUMENTS else "cache"
_ATTENTION_ARGUMENTS = frozenset(inspect.signature(Qwen3Attention.forward).parameters)

SINKHORN_ITERATIONS = 20
CLAMP = 1e-12


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
        self.num_streams, self.eps = n, config.rms_norm_eps
        self.norm_weight = nn.Parameter(torch.ones(n * config.hidden_size))
        self.projection = nn.Parameter(torch.zeros(n * n + 2 * n, n * config.hidden_size))
        self.pre_bias = nn.Parameter(torch.zeros(n))
        self.post_bias = nn.Parameter(torch.zeros(n))
        self.residual_bias = nn.Parameter(torch.zeros(n * n))  # row by row
        self.pre_scale = nn.Parameter(torch.zeros(1))
        self.post_scale = nn.Parameter(torch.zeros(1))
        self.residual_scale = nn.Parameter(torch.zeros(1))

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

    def forward(self, streams: Tensor) -> Tensor:
        """[b, t, hidden] of ``streams`` [b, t, n, hidden], computed in fp32."""
        precise = torch.promote_types(streams.dtype, torch.float32)
        shares = self.weight.to(precise).softmax(dim=0)
        return (shares.unsqueeze(-1) * streams.to(precise)).sum(dim=-2).to(streams.dtype)


class MHCDecoderLayer(GradientCheckpointingLayer):
    """Qwen3's two sublayers, each connected to all streams."""

    def __init__(self, config: MHCConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_connector = StreamConnector(config)
        self.mlp_connector = StreamConnector(config)
        self.self_attn = Qwen3Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, streams: Tensor, **kwargs: Any) -> Tensor:
        """The streams [b, t, n, hidden] behind this layer; ``streams``: those before it."""
        streams = self.attention_connector(streams, lambda x: self.self_attn(self.input_layernorm(x), **kwargs)[0])
        return self.mlp_connector(streams, lambda x: self.mlp(self.post_attention_layernorm(x)))


def _start(parameter: Tensor, value: Tensor | float) -> None:
    """Give a parameter its initial value; not one that was loaded, which transformers 5 marks."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(torch.as_tensor(value))


class MHCPreTrainedModel(Qwen3PreTrainedModel):
    """Loading, initialisation and the features that transformers may use."""

    config_class = MHCConfig
    config: MHCConfig
    _no_split_modules = ["MHCDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = None  # this model collects its outputs itself
    _pp_plan = None  # see MHCConfig.base_model_pp_plan

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StreamReadout):
            _start(module.weight, 0.0)
        if isinstance(module, StreamConnector):
            n = module.num_streams
            mixing = torch.full((n, n), 0.01 / (n - 1)).fill_diagonal_(0.99)
            _start(module.norm_weight, 1.0)
            _start(module.projection, torch.empty_like(module.projection).normal_(std=self.config.initializer_range))
            _start(module.pre_bias, -math.log(n - 1))  # of which the sigmoid is 1 / n
            _start(module.post_bias, 0.0)
            _start(module.residual_bias, mixing.log().flatten())
            for scale in (module.pre_scale, module.post_scale, module.residual_scale):
                _start(scale, 0.01)


class MHCModel(MHCPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: MHCConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MHCDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.stream_readout = StreamReadout(config)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all layers over ``input_ids`` [b, t] or ``inputs_embeds`` [b, t, hidden].

        Args:
            output_hidden_states: also return the streams [b, t, n, hidden] before each layer, and last the normed
                output [b, t, hidden].
            kwargs: handed to every layer's attention function.

        Raises:
            ValueError: not exactly one of both inputs; attention weights are asked for, which are not collected.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions=True: this model returns no attention weights; set it to False")
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = kwargs.pop(_CACHE, past_key_values)
        past_key_values = DynamicCache(config=config) if use_cache and past_key_values is None else past_key_values
        kwargs |= self._placement(hidden_states, attention_mask, position_ids, cache_position, past_key_values)
        kwargs |= {_CACHE: past_key_values, "use_cache": use_cache}

        all_streams = []
        streams = hidden_states.unsqueeze(-2).expand(-1, -1, config.mhc_num_streams, -1)
        for layer in self.layers:
            all_streams.append(streams)
            streams = layer(streams, **kwargs)

        hidden_states = self.norm(self.stream_readout(streams))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{_CACHE: past_key_values if use_cache else None},
            hidden_states=(*all_streams, hidden_states) if output_hidden_states else None,
        )

    def _placement(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        cache_position: Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """Where the tokens stand and what they may read, as every layer takes it."""
        if cache_position is None:
            past = past_key_values.get_seq_length() if isinstance(past_key_values, Cache) else 0
            cache_position = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        if isinstance(attention_mask, dict):
            mask = attention_mask["full_attention"]  # `generate` has made it already
        else:
            arguments = {"config": self.config, "attention_mask": attention_mask, _CACHE: past_key_values}
            arguments |= {"position_ids": position_ids, "cache_position": cache_position}
            arguments |= {"input_embeds": hidden_states, "inputs_embeds": hidden_states}
            mask = create_causal_mask(**{name: arguments[name] for name in arguments.keys() & _MASK_ARGUMENTS})
        placement = {"attention_mask": mask, "position_ids": position_ids}
        placement["position_embeddings"] = self.rotary_emb(hidden_states, position_ids)
        if "cache_position" in _ATTENTION_ARGUMENTS:
            placement["cache_position"] = cache_position
        return placement


class MHCForCausalLM(MHCPreTrainedModel, Qwen3ForCausalLM):
    """The decoder with its output layer, called as transformers' Qwen3."""

    def __init__(self, config: MHCConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # not Qwen3ForCausalLM's own, which builds a vanilla decoder
        self.model = MHCModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MHCForSequenceClassification(GenericForSequenceClassification, MHCPreTrainedModel):
    """The decoder with a linear head ``score`` on the last token that is not padding, as for reward models."""

    def __init__(self, config: MHCConfig) -> None:
        # not GenericForSequenceClassification's own, which asks AutoModel for the decoder
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = MHCModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["MHCForCausalLM", "MHCForSequenceClassification", "MHCModel", "MHCPreTrainedModel"]
