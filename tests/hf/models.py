"""Small models with known weights, and what the independent fp64 decoder computes with the same weights.

This folder also runs in environments that hold nothing but torch, transformers and pytest: import nothing else here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from megatron_depthattn.hf.configuration_depthattn import DepthAttnConfig
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from tests.reference_decoder import decoder_logits, random_weights

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 4, 4, 16
HIDDEN, FFN, VOCAB, SEQUENCE = 48, 80, 97, 17
ROPE_THETA = 1000.0  # no version's default: a model that loses it shows
# Every earlier layer and then some: a mistake in a source has nowhere to hide.
DENSE = {"depth_attention_stride": 2, "depth_attention_recent_window": 1}
UNROLLED = DENSE | {"num_loops": 2}
LOOPED = UNROLLED | {"depth_attention_loop_sources": "same_layer"}
MIXES_BOTH = {"depth_attention_mixes": "key_value"}
UNIFORM_KEYS = {"depth_attention_weights": "uniform", "depth_attention_mixes": "key"}


def make_config(config_class: type[Qwen3Config] = DepthAttnConfig, **settings: Any) -> Qwen3Config:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
    }
    return config_class(**(shape | settings))


def weights_for(config: Qwen3Config) -> dict[str, Tensor]:
    """fp64, the same for all configs of one shape; norm weights are far from one."""
    return random_weights(
        0,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tied=config.tie_word_embeddings,
    )


def make_model(
    model_class: type[PreTrainedModel] = DepthAttnForCausalLM,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """In evaluation mode. Built in ``dtype``: converting it later would round the rotary frequencies as well."""
    config = make_config(model_class.config_class, attn_implementation=attention, **settings)
    model = model_class._from_config(config, dtype=dtype).eval()
    loaded = model.load_state_dict(weights_for(config), strict=False)
    assert loaded.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert loaded.unexpected_keys == []
    return model


def make_vanilla(**settings: Any) -> Qwen3ForCausalLM:
    """transformers' own Qwen3 with the weights that ``make_model`` gives."""
    return make_model(Qwen3ForCausalLM, **settings)


def make_tokens(b: int = 2, t: int = SEQUENCE) -> Tensor:
    return torch.randint(VOCAB, (b, t), generator=torch.Generator().manual_seed(1))


def reference_logits(
    config: DepthAttnConfig, tokens: Tensor, weights: Mapping[str, Tensor] | None = None, **overrides: Any
) -> Tensor:
    """[b, t, V] in fp64, of ``weights_for(config)`` by default. ``overrides`` replace what the config says."""
    weights = weights_for(config) if weights is None else weights
    options = {
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_theta": ROPE_THETA,
        "eps": config.rms_norm_eps,
        "stride": config.depth_attention_stride,
        "window": config.depth_attention_recent_window,
        "depth_attention": config.use_depth_attention,
        "tied": config.tie_word_embeddings,
        "num_loops": config.num_loops,
        "unrolled": config.depth_attention_loop_sources == "unrolled",
        "uniform": config.depth_attention_weights == "uniform",
        "mixes": config.depth_attention_mixes,
        "k_norm_after_rope": config.depth_attention_k_norm_after_rope,
    }
    return decoder_logits(weights, tokens, **(options | overrides))


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()
