"""The model: Depth-Attention on Megatron-Core's own layers. Import the config and the block spec."""

from megatron_depthattn.model.gpt import DepthGPTModel, qwen3_style_config
from megatron_depthattn.model.layer_specs import depth_attention_block_spec, depth_attention_layer_spec
from megatron_depthattn.model.transformer_config import DepthAttentionConfig

__all__ = [
    "DepthAttentionConfig",
    "DepthGPTModel",
    "depth_attention_block_spec",
    "depth_attention_layer_spec",
    "qwen3_style_config",
]
