"""Small models of the compared methods with known weights, and what the independent fp64 decoder computes with them.

Like `models.py` it imports nothing that an environment of torch, transformers and pytest lacks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_depthattn.hf.modeling_cross_layer import AttnResForCausalLM, DenseFormerForCausalLM, MHCForCausalLM
from tests.hf.models import ROPE_THETA, make_config, weights_for
from tests.reference_methods import method_logits, random_method_weights

MODELS: dict[str, type[PreTrainedModel]] = {
    "denseformer": DenseFormerForCausalLM,
    "attnres": AttnResForCausalLM,
    "mhc": MHCForCausalLM,
}
# Each with what it leaves out, so that a mistake in it has nowhere to hide. Five layers: no multiple of a block.
VARIANTS: dict[str, tuple[str, dict[str, int]]] = {
    "denseformer": ("denseformer", {}),
    "denseformer-period2-dilation3": ("denseformer", {"period": 2, "dilation": 3}),
    "attnres": ("attnres", {"block_size": 4}),
    "attnres-odd": ("attnres", {"block_size": 1}),
    "mhc": ("mhc", {}),
    "mhc-two-streams": ("mhc", {"num_streams": 2}),
}
NUM_LAYERS = 5


def method_weights(config: Any) -> dict[str, Tensor]:
    """fp64 and random: of the blocks, and of the method."""
    sizes = {"num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size}
    return weights_for(config) | random_method_weights(7, config.model_type, **sizes, **method_settings(config))


def method_settings(config: Any) -> dict[str, int]:
    """The method's settings without its name in front: period, dilation."""
    start = f"{config.model_type}_"
    return {key.removeprefix(start): value for key, value in vars(config).items() if key.startswith(start)}


def make_method_model(
    variant: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, initial: bool = False, **settings: Any
) -> Any:
    """In evaluation mode, with the weights of `method_weights`; `initial`: the method's own stay as they start."""
    method, method_settings = VARIANTS[variant]
    settings = {"num_hidden_layers": NUM_LAYERS} | settings
    settings |= {f"{method}_{key}": value for key, value in method_settings.items()}
    config = make_config(MODELS[method].config_class, attn_implementation=attention, **settings)
    model = MODELS[method]._from_config(config, dtype=dtype).eval()
    weights = weights_for(config) if initial else method_weights(config)
    loaded = model.load_state_dict(weights, strict=False)
    assert loaded.unexpected_keys == []
    assert initial or loaded.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model


def method_reference(config: Any, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """[b, t, V] in fp64, of ``method_weights(config)`` by default."""
    return method_logits(
        config.model_type,
        method_weights(config) if weights is None else weights,
        tokens,
        method_settings(config),
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_theta=ROPE_THETA,
        eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
    )
