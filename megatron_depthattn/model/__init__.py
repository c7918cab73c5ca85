"""The model: Depth-Attention on Megatron-Core's own layers. Import the config and the block spec.

Names are looked up when they are first used, so that the pure modules of this package import without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_depthattn.model.documents import documents_of as documents_of
    from megatron_depthattn.model.gpt import DepthGPTModel as DepthGPTModel
    from megatron_depthattn.model.gpt import qwen3_style_config as qwen3_style_config
    from megatron_depthattn.model.layer_specs import depth_attention_block_spec as depth_attention_block_spec
    from megatron_depthattn.model.layer_specs import depth_attention_layer_spec as depth_attention_layer_spec
    from megatron_depthattn.model.transformer_config import DepthAttentionConfig as DepthAttentionConfig

_MODULES = {
    "DepthAttentionConfig": "transformer_config",
    "DepthGPTModel": "gpt",
    "documents_of": "documents",
    "depth_attention_block_spec": "layer_specs",
    "depth_attention_layer_spec": "layer_specs",
    "qwen3_style_config": "gpt",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
