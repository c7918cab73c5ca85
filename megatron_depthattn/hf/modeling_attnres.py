"""A Qwen3-style decoder with Attention Residuals in block form, for transformers 4.57 and 5.

The residual stream flows as in a vanilla decoder, and a snapshot of it is kept every few layers, the embedding first.
What a sublayer and the final norm read is not the stream, but an attention over the snapshots and the stream at the
same token. All other weights have Qwen3's names and shapes. The key/value cache is a vanilla decoder's.

It ships inside every exported folder and needs torch and transformers only.

Shapes: b batch, t new tokens. Snapshots are positional tensor arguments of a layer, so gradients flow through them
under both kinds of gradient checkpointing.
"""

import inspect
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

from .configuration_attnres import AttnResConfig

# transformers renamed and dropped arguments of these functions between 4.57 and 5, and `past_key_values` in 5.24.
_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
_CACHE = "past_key_values" if "past_key_values" in _MASK_ARGUMENTS else "cache"
_ATTENTION_ARGUMENTS = frozenset(inspect.signature(Qwen3Attention.forward).parameters)


class ResidualAggregator(nn.Module):
    """Attention of one learned query over snapshots and residual stream, token by token."""

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.norm_weight = nn.Parameter(torch.ones(config.hidden_size))
        self.recency_bias = nn.Parameter(torch.full((1,), 3.0))

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
        mixed = weights[..., 0, None] * candidates[0].to(precise)
        for i, candidate in enumerate(candidates[1:], start=1):
            mixed = mixed + weights[..., i, None] * candidate.to(precise)
        return mixed.to(candidates[-1].dtype)


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """Qwen3's block, whose sublayers write to the residual stream and read it with its snapshots."""

    def __init__(self, config: AttnResConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_aggregator = ResidualAggregator(config)
        self.mlp_aggregator = ResidualAggregator(config)
        self.self_attn = Qwen3Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *snapshots: Tensor, **kwargs: Any) -> Tensor:
        """The residual stream [b, t, hidden] behind this layer; ``hidden_states``: the one before it."""
        read = self.attention_aggregator(*snapshots, hidden_states)
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(read), **kwargs)[0]
        read = self.mlp_aggregator(*snapshots, hidden_states)
        return hidden_states + self.mlp(self.post_attention_layernorm(read))


def _start(parameter: Tensor, value: Tensor | float) -> None:
    """Give a parameter its initial value; not one that was loaded, which transformers 5 marks."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(torch.as_tensor(value))


class AttnResPreTrainedModel(Qwen3PreTrainedModel):
    """Loading, initialisation and the features that transformers may use."""

    config_class = AttnResConfig
    config: AttnResConfig
    _no_split_modules = ["AttnResDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = None  # this model collects its outputs itself
    _pp_plan = None  # see AttnResConfig.base_model_pp_plan

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualAggregator):
            _start(module.query, 0.0)
            _start(module.norm_weight, 1.0)
            _start(module.recency_bias, 3.0)


class AttnResModel(AttnResPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(AttnResDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_aggregator = ResidualAggregator(config)
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
            output_hidden_states: also return the residual stream before each layer, and last the normed output.
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

        snapshots, streams = [], []
        for index, layer in enumerate(self.layers):
            streams.append(hidden_states)
            if config.is_snapshot(index):
                snapshots.append(hidden_states)
            hidden_states = layer(hidden_states, *snapshots, **kwargs)
        if config.is_snapshot(len(self.layers)):
            snapshots.append(hidden_states)

        hidden_states = self.norm(self.final_aggregator(*snapshots, hidden_states))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{_CACHE: past_key_values if use_cache else None},
            hidden_states=(*streams, hidden_states) if output_hidden_states else None,
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


class AttnResForCausalLM(AttnResPreTrainedModel, Qwen3ForCausalLM):
    """The decoder with its output layer, called as transformers' Qwen3."""

    def __init__(self, config: AttnResConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # not Qwen3ForCausalLM's own, which builds a vanilla decoder
        self.model = AttnResModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class AttnResForSequenceClassification(GenericForSequenceClassification, AttnResPreTrainedModel):
    """The decoder with a linear head ``score`` on the last token that is not padding, as for reward models."""

    def __init__(self, config: AttnResConfig) -> None:
        # not GenericForSequenceClassification's own, which asks AutoModel for the decoder
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = AttnResModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["AttnResForCausalLM", "AttnResForSequenceClassification", "AttnResModel", "AttnResPreTrainedModel"]
