"""A Qwen3-style decoder with Depth-Attention (arXiv:2606.05014), for transformers 4.57 and 5.

Before a layer attends over the sequence, its query attends over the keys of earlier layers at the same token and mixes
their values into the value that self-attention reads. The weights have Qwen3's names and shapes. The key/value cache
holds each layer's key and *mixed* value: a token is mixed once, when it is written, so decoding with a cache computes
what one pass over the whole sequence computes, and the cache has a vanilla decoder's size.

It ships inside every exported folder and needs torch and transformers only.

Shapes: b batch, t new tokens, s cached and new tokens, H query heads, G key/value heads, d head size, n sources.
A *source* is the pair (key after the rotary embedding, mixed value) of an earlier layer, each [b, G, t, d]: the very
tensors that the layer writes to the cache. Sources are positional tensor arguments and results of a layer, so gradients
flow through them under both kinds of gradient checkpointing.

Two settings are ablations of the paper. ``depth_attention_weights="uniform"`` weighs a layer's sources and itself
alike. ``depth_attention_mixes`` mixes the key, or key and value, by the same weights; scores are of unmixed keys, which
are part of the source but not of the cache, as sources are read within one pass.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

from .configuration_depthattn import CrossLayerConfig, DepthAttnConfig

# transformers renamed and dropped arguments of this function between 4.57 and 5, and `past_key_values` in 5.24.
_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
_TAKES_CACHE_POSITION = "cache_position" in inspect.signature(Qwen3Attention.forward).parameters  # transformers 4
CACHE = "past_key_values" if "past_key_values" in _MASK_ARGUMENTS else "cache"


@dataclass
class DepthAttnModelOutput(BaseModelOutputWithPast):
    """Adds ``depth_weights``: per effective layer the weights [b, G, t, n + 1] of its sources and, last, of itself."""

    depth_weights: tuple[Tensor, ...] | None = None


@dataclass
class DepthAttnCausalLMOutput(CausalLMOutputWithPast):
    """Adds ``depth_weights``, as in ``DepthAttnModelOutput``."""

    depth_weights: tuple[Tensor, ...] | None = None


def weighted_sum(weights: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """The sum in the type of the weights, returned in that of the last of ``states``."""
    total = weights[0] * states[0].to(weights[0].dtype)
    for weight, state in zip(weights[1:], states[1:], strict=True):
        total = total + weight * state.to(weight.dtype)
    return total.to(states[-1].dtype)


class DecoderLayer(GradientCheckpointingLayer):
    """Qwen3's two sublayers; ``forward`` is the method's."""

    attention_class: type[nn.Module] = Qwen3Attention

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """What attention adds to the residual stream, having read ``hidden_states`` [b, t, hidden]."""
        attended: Tensor = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return attended

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """What SwiGLU adds to it."""
        output: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return output


class CrossLayerPreTrainedModel(Qwen3PreTrainedModel):
    """Loading, initialisation and the features that transformers may use."""

    config_class = CrossLayerConfig
    config: Any
    _can_record_outputs = None  # these models collect their outputs themselves
    _pp_plan = None  # see CrossLayerConfig.base_model_pp_plan

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As transformers', and a method's own parameters as its modules' ``initial`` says."""
        super()._init_weights(module)
        for name, value in getattr(module, "initial", dict)().items():
            parameter = getattr(module, name)
            if not getattr(parameter, "_is_hf_initialized", False):  # loaded, as transformers 5 marks it
                parameter.copy_(torch.as_tensor(value))


class CrossLayerModel(CrossLayerPreTrainedModel):
    """A decoder without its output layer."""

    layer_class: type[DecoderLayer]
    gives_attentions = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.add_final(config)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def add_final(self, config: Any) -> None:
        """Make the method's module behind the last layer, if it has one."""

    def run_layers(self, hidden_states: Tensor, kept: dict[str, list[Tensor]], **kwargs: Any) -> Tensor:
        """What the final norm reads, from the embedding [b, t, hidden].

        Args:
            kept: receives, under the names that it holds, the outputs of every layer.
            kwargs: handed to every layer.
        """
        raise NotImplementedError

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
        output_depth_weights: bool = False,
        **kwargs: Any,
    ) -> DepthAttnModelOutput:
        """Run all layers over ``input_ids`` [b, t] or ``inputs_embeds`` [b, t, hidden].

        Args:
            output_hidden_states: also return what flowed into each layer (mHC: the streams [b, t, n, hidden]), and
                last the normed output [b, t, hidden].
            output_depth_weights: also return each effective layer's weights over its sources and itself
                (Depth-Attention).
            kwargs: handed to every layer's attention function.

        Raises:
            ValueError: not exactly one of both inputs; attention weights are asked for where there are none; a paged
                cache for a looped model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        wanted = {
            "attentions": config.output_attentions if output_attentions is None else output_attentions,
            "hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            "depth_weights": output_depth_weights,
        }
        kept: dict[str, list[Tensor]] = {name: [] for name, is_wanted in wanted.items() if is_wanted}
        if "attentions" in kept and not (self.gives_attentions and config._attn_implementation == "eager"):
            raise ValueError(
                f"output_attentions=True: a {config.model_type} model with {config._attn_implementation!r} attention "
                "gives no weights; only depthattn does, with attn_implementation='eager'"
            )

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = kwargs.pop(CACHE, past_key_values)
        if "cache" in kwargs or not isinstance(past_key_values, Cache | None):
            _check_paged(config)
        past_key_values = DynamicCache(config=config) if use_cache and past_key_values is None else past_key_values
        if past_key_values is not None and config.num_loops > 1:
            _add_cache_slots(past_key_values, config.num_effective_layers)
        if cache_position is None:
            past = past_key_values.get_seq_length() if isinstance(past_key_values, Cache) else 0
            cache_position = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past
        documents = None
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        elif attention_mask is None and isinstance(past_key_values, Cache | None):
            documents = _within_documents(position_ids.expand(len(hidden_states), -1), cache_position)
            is_one_row = len(hidden_states) == 1 and cache_position[0] == 0
            if documents and "flash" in config._attn_implementation and not is_one_row:
                raise ValueError(
                    "position_ids of several documents: flash attention takes them in one row, without what is in a "
                    "cache already; give a row at a time, or load the model with attn_implementation='sdpa'"
                )
        if isinstance(attention_mask, dict):
            mask = attention_mask["full_attention"]  # `generate` has made it already
        else:
            arguments = {"config": config, "attention_mask": attention_mask, CACHE: past_key_values}
            arguments |= {"and_mask_function": documents, "position_ids": None, "cache_position": cache_position}
            arguments |= {"input_embeds": hidden_states, "inputs_embeds": hidden_states}
            mask = create_causal_mask(**{name: arguments[name] for name in arguments if name in _MASK_ARGUMENTS})
        kwargs |= {CACHE: past_key_values, "use_cache": use_cache, "attention_mask": mask, "position_ids": position_ids}
        kwargs |= {"cache_position": cache_position} if _TAKES_CACHE_POSITION else {}
        kwargs["position_embeddings"] = self.rotary_emb(hidden_states, position_ids)

        hidden_states = self.norm(self.run_layers(hidden_states, kept, **kwargs))
        kept.get("hidden_states", []).append(hidden_states)
        outputs: dict[str, Any] = {name: tuple(values) for name, values in kept.items()}
        outputs[CACHE] = past_key_values if use_cache else None
        return DepthAttnModelOutput(last_hidden_state=hidden_states, **outputs)


def _within_documents(position_ids: Tensor, slots: Tensor) -> Callable[..., Tensor] | None:
    """A mask function that hides from tokens [b, t] what is not of their document; None: nothing is to be hidden.

    A document begins where positions do not rise. For transformers one begins at a gap as well, but it looks only where
    there is no cache and, in version 4, makes a square mask of any positions.

    Args:
        slots: [t], where in a cache the tokens are written.
    """
    begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) <= 0
    firsts = torch.where(begins, slots, slots[0] - position_ids[:, :1]).cummax(dim=-1).values
    if not torch.compiler.is_compiling() and (firsts <= 0).all():
        return None
    return lambda batch, head, query, key: key >= firsts[batch, query - slots[0]]


def _check_paged(config: CrossLayerConfig) -> None:
    """Continuous batching keeps a paged cache for each layer that holds weights, which passes would share."""
    if config.num_loops > 1:
        raise ValueError(
            f"num_loops={config.num_loops}: continuous batching (paged attention) has one cache for all passes of a "
            "layer, which would give wrong tokens; use generate"
        )


def _add_cache_slots(cache: Cache, num_slots: int) -> None:
    """Give ``cache`` a slot for each effective layer: transformers makes one for each layer that holds weights."""
    if cache.layer_class_to_replicate is not None:
        return  # it grows by itself
    while len(cache.layers) < num_slots:
        cache.layers.append(copy.deepcopy(cache.layers[0]))  # empty as yet; with its size, or how it quantizes


class CrossLayerForSequenceClassification(GenericForSequenceClassification):
    """A decoder of ``decoder_class`` with a linear head ``score`` on the last token that is not padding."""

    decoder_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        # not GenericForSequenceClassification's own, which asks AutoModel for the decoder
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.decoder_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class CrossLayerForCausalLM(CrossLayerPreTrainedModel, GenerationMixin):
    """The decoder with its output layer."""

    decoder_class: type[CrossLayerModel]
    _tied_weights_keys = Qwen3ForCausalLM._tied_weights_keys
    _tp_plan = Qwen3ForCausalLM._tp_plan

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which runs the model in a thread and only logs what is raised there."""
        _check_paged(self.config)
        return super().init_continuous_batching(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DepthAttnCausalLMOutput:
        """As ``CrossLayerModel.forward``, with logits and, given ``labels`` [b, t] (-100: ignored), the loss in nats.

        ``logits_to_keep``: compute the logits of the last so many positions (0: of all), or of these positions.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache_position, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        shared = {name: outputs.get(name) for name in (CACHE, "hidden_states", "attentions", "depth_weights")}
        return DepthAttnCausalLMOutput(loss=loss, logits=logits, **shared)


# ------------------------------------------------------------------------------------------------ Depth-Attention


def depth_weights(query: Tensor, keys: Sequence[Tensor], scale: float) -> Tensor:
    """Weights [b, G, t, n + 1] of n sources and, last, of the layer itself, in fp32 (fp64 for fp64).

    Query and keys are turned by the same rotation, so their products are those before the rotary embedding.

    Args:
        query: [b, H, t, d]. The H / G heads of a group are averaged.
        keys: [b, G, t, d] of each source and, last, of the layer.
        scale: factor of the scores.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    mean_query = query.unflatten(1, (keys[-1].shape[1], -1)).to(precise).mean(dim=2)
    scores = [(mean_query * key.to(precise)).sum(dim=-1) for key in keys]
    return (torch.stack(scores, dim=-1) * scale).softmax(dim=-1)


def depth_mix(weights: Tensor, own: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """Mix a layer's own value [b, G, t, d] with its sources' mixed values, in the type of the weights [b, G, t, n + 1].

    Returns:
        The mixed value in the type of ``own``.
    """
    *source_weights, own_weight = weights.unsqueeze(-1).unbind(-2)
    return weighted_sum([own_weight, *source_weights], [own, *sources])


class DepthAttnAttention(Qwen3Attention):
    """Qwen3's attention, reading a value that was mixed over depth first."""

    def forward(
        self,
        hidden_states: Tensor,
        *sources: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache_slot: int | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Attend from ``hidden_states`` [b, t, hidden].

        Args:
            sources: k_0, v_0, k_1, v_1, ... of the source layers (or what else ``config.source_kinds`` names), each
                [b, G, t, d]; none: vanilla attention.
            cache_slot: the cache's layer to read and write; None: this layer's own index.
            kwargs: the cache, by transformers' name for it; the rest is handed to the attention function.

        Returns:
            Output [b, t, hidden], the attention weights where the attention function gives them, the depth weights
            [b, G, t, n + 1], and this layer's source: key and mixed value.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        cos, sin = position_embeddings
        if self.config.depth_attention_k_norm_after_rope:
            query, key = apply_rotary_pos_emb(query, key.transpose(1, 2), cos, sin)
            key = self.k_norm(key)
        else:
            query, key = apply_rotary_pos_emb(query, self.k_norm(key).transpose(1, 2), cos, sin)
        kinds = self.config.source_kinds
        read = {kind: sources[i :: len(kinds)] for i, kind in enumerate(kinds)}
        own = {"key": key, "mixed_key": key, "value": value}
        if sources and "key" in read:
            weights = depth_weights(query, [*read["key"], key], self.scaling)
        else:
            num_candidates = len(sources) // len(kinds) + 1
            precise = torch.promote_types(key.dtype, torch.float32)
            weights = key.new_full((*key.shape[:-1], num_candidates), 1 / num_candidates, dtype=precise)
        if sources:
            own |= {kind: depth_mix(weights, own[kind], states) for kind, states in read.items() if kind != "key"}

        key, value = own["mixed_key"], own["value"]
        all_keys, all_values = key, value
        if (cache := kwargs.pop(CACHE, None)) is not None:
            slot = self.layer_idx if cache_slot is None else cache_slot
            if CACHE == "cache":  # a paged one completes the attention function's arguments
                all_keys, all_values = cache.update(key, value, slot, kwargs=kwargs)
            else:
                placement = {"sin": sin, "cos": cos, "cache_position": cache_position}  # transformers 5 ignores it
                all_keys, all_values = cache.update(key, value, slot, placement)
            is_kept_whole = type(cache) is DynamicCache and type(cache.layers[slot]) is DynamicLayer
            if is_kept_whole and not getattr(cache, "offloading", False):
                # It keeps copies. Views of them are the sources, so that nothing is kept beside the cache.
                new = slice(all_keys.shape[2] - key.shape[2], None)
                views = {"mixed_key": all_keys[:, :, new], "value": all_values[:, :, new]}
                own = (own if "mixed_key" in kinds else {"key": views["mixed_key"]}) | views

        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        output, attention_weights = attend(
            self, query, all_keys, all_values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return output, attention_weights, weights, *(own[kind] for kind in kinds)


class DepthAttnDecoderLayer(DecoderLayer):
    """Pre-norm block of attention and SwiGLU; ``forward`` takes the sources it reads and returns its own."""

    attention_class = DepthAttnAttention

    def forward(self, hidden_states: Tensor, *sources: Tensor, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """As ``DepthAttnAttention.forward``, with the block's output [b, t, hidden] first."""
        attended, *rest = self.self_attn(self.input_layernorm(hidden_states), *sources, **kwargs)
        hidden_states = hidden_states + attended
        del attended  # in a long prefill the MLP has its memory
        return hidden_states + self.feed_forward(hidden_states), *rest


class DepthAttnPreTrainedModel(CrossLayerPreTrainedModel):
    config_class = DepthAttnConfig
    _no_split_modules = ["DepthAttnDecoderLayer"]  # noqa: RUF012


class DepthAttnModel(DepthAttnPreTrainedModel, CrossLayerModel):
    layer_class = DepthAttnDecoderLayer
    gives_attentions = True

    def __init__(self, config: DepthAttnConfig) -> None:
        super().__init__(config)
        if self.rotary_emb.attention_scaling != 1.0 and config.use_depth_attention:
            raise ValueError(
                f"rope type {self.rotary_emb.rope_type!r} scales queries and keys, which would change the weights over "
                "depth: take one without attention scaling"
            )

    def run_layers(self, hidden_states: Tensor, kept: dict[str, list[Tensor]], **kwargs: Any) -> Tensor:
        reads = [self.config.depth_sources(index) for index in range(self.config.num_effective_layers)]
        last_reader = {source: index for index, sources in enumerate(reads) for source in sources}
        live: dict[int, list[Tensor]] = {}  # the sources that a later layer still reads, by effective layer
        for index, sources in enumerate(reads):
            kept.get("hidden_states", []).append(hidden_states)
            hidden_states, attention_weights, weights, *live[index] = self.layers[index % len(self.layers)](
                hidden_states,
                *(tensor for source in sources for tensor in live[source]),
                cache_slot=index,
                **kwargs,
            )
            live = {i: source for i, source in live.items() if last_reader.get(i, 0) > index}
            kept.get("attentions", []).append(attention_weights)
            kept.get("depth_weights", []).append(weights)
        return hidden_states


class DepthAttnForCausalLM(DepthAttnPreTrainedModel, CrossLayerForCausalLM):
    decoder_class = DepthAttnModel


class DepthAttnForSequenceClassification(CrossLayerForSequenceClassification, DepthAttnPreTrainedModel):
    decoder_class = DepthAttnModel


__all__ = ["DepthAttnForCausalLM", "DepthAttnForSequenceClassification", "DepthAttnModel", "DepthAttnPreTrainedModel"]
