"""The small Megatron model of the unit tests."""

from typing import Any

from megatron_depthattn.model.gpt import qwen3_style_config
from megatron_depthattn.model.transformer_config import DepthAttentionConfig


def small_config(num_layers: int, **fields: Any) -> DepthAttentionConfig:
    """Of a model with 4 heads of 8, two of which share keys and values."""
    shape = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
    }
    return qwen3_style_config(num_layers=num_layers, **(shape | fields))
