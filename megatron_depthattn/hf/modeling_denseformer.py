"""A Qwen3-style decoder with DenseFormer (arXiv:2402.02622), for transformers 4.57 and 5.

Before a layer, and behind the last one, stands a weighted sum over the embedding and the outputs of the blocks so far.
The sums add one weight per hidden state that they read; all other weights have Qwen3's names and shapes. The key/value
cache is a vanilla decoder's.

It ships inside every exported folder and needs torch and transformers only.

Shapes: b batch, t new tokens. Earlier hidden states are positional tensor arguments of a layer, so gradients flow
through them under both kinds of gradient checkpointing.
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

from .configuration_denseformer import DenseFormerConfig

# transformers renamed and dropped arguments of these functions between 4.57 and 5, and `past_key_values` in 5.24.
_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
_CACHE = "past_key_values" if "past_key_values" in _MASK_ARGUMENTS else "cache"
_ATTENTION_ARGUMENTS = frozenset(inspect.signature(Qwen3Attention.forward).parameters)


class DepthAverage(nn.Module):
    """A weighted sum of hidden states; the weights are free and start as zeros with a final one."""

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_states))

    def forward(self, *states: Tensor) -> Tensor:
        """The sum, in fp32, of ``states`` [b, t, hidden] each; in the type of the last."""
        precise = torch.promote_types(states[-1].dtype, torch.float32)
        weight = self.weight.to(precise)
        average = weight[0] * states[0].to(precise)
        for i, state in enumerate(states[1:], start=1):
            average = average + weight[i] * state.to(precise)
        return average.to(states[-1].dtype)


class DenseFormerDecoderLayer(GradientCheckpointingLayer):
    """Qwen3's block, reading an average over depth first where one stands before it."""

    def __init__(self, config: DenseFormerConfig, layer_idx: int) -> None:
        super().__init__()
        num_states = len(config.averaged(layer_idx))
        self.depth_average = DepthAverage(num_states) if num_states else None
        self.self_attn = Qwen3Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *earlier: Tensor, **kwargs: Any) -> Tensor:
        """The block's output [b, t, hidden]; ``earlier``: the states that are averaged with ``hidden_states``."""
        if self.depth_average is not None:
            hidden_states = self.depth_average(*earlier, hidden_states)
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _start(parameter: Tensor, value: Tensor | float) -> None:
    """Give a parameter its initial value; not one that was loaded, which transformers 5 marks."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(torch.as_tensor(value))


class DenseFormerPreTrainedModel(Qwen3PreTrainedModel):
    """Loading, initialisation and the features that transformers may use."""

    config_class = DenseFormerConfig
    config: DenseFormerConfig
    _no_split_modules = ["DenseFormerDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = None  # this model collects its outputs itself
    _pp_plan = None  # see DenseFormerConfig.base_model_pp_plan

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthAverage):
            _start(module.weight, torch.eye(len(module.weight))[-1])


class DenseFormerModel(DenseFormerPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: DenseFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DenseFormerDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        num_states = len(config.averaged(config.num_hidden_layers))
        self.final_depth_average = DepthAverage(num_states) if num_states else None
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
            output_hidden_states: also return the input of each layer before its average, and last the normed output.
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

        states = [hidden_states]  # the embedding, and the output of every block
        for index, layer in enumerate(self.layers):
            states.append(layer(states[index], *(states[i] for i in config.averaged(index)[:-1]), **kwargs))
        hidden_states = states[-1]
        if self.final_depth_average is not None:
            hidden_states = self.final_depth_average(*(states[i] for i in config.averaged(len(self.layers))))

        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{_CACHE: past_key_values if use_cache else None},
            hidden_states=(*states[:-1], hidden_states) if output_hidden_states else None,
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


class DenseFormerForCausalLM(DenseFormerPreTrainedModel, Qwen3ForCausalLM):
    """The decoder with its output layer, called as transformers' Qwen3."""

    def __init__(self, config: DenseFormerConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # not Qwen3ForCausalLM's own, which builds a vanilla decoder
        self.model = DenseFormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class DenseFormerForSequenceClassification(GenericForSequenceClassification, DenseFormerPreTrainedModel):
    """The decoder with a linear head ``score`` on the last token that is not padding, as for reward models."""

    def __init__(self, config: DenseFormerConfig) -> None:
        # not GenericForSequenceClassification's own, which asks AutoModel for the decoder
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = DenseFormerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = [
    "DenseFormerForCausalLM",
    "DenseFormerForSequenceClassification",
    "DenseFormerModel",
    "DenseFormerPreTrainedModel",
]
