"""TransformerEngine's own word on which GPU and CUDA can run which recipe, and Megatron's on FP8 attention."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from unittest.mock import patch

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from transformer_engine.pytorch import quantization

from megatron_depthattn.model.gpt import qwen3_style_config

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
CUDAS = ("12.1", "12.8", "12.9", "13.0")
EXPECTED = {
    "delayed": quantization._compute_fp8_support,
    "tensorwise": quantization._compute_fp8_support,
    "blockwise": quantization._compute_fp8_block_scaling_support,
    "mxfp8": quantization._compute_mxfp8_support,
}


def results() -> dict[tuple[str, tuple[int, int], str], bool]:
    """By recipe, compute capability and CUDA."""
    library = SimpleNamespace(get_cublasLt_version=lambda: 130000)
    found = {}
    for recipe, capability, cuda in itertools.product(EXPECTED, CAPABILITIES, CUDAS):
        with (
            patch.object(quantization, "get_device_compute_capability", lambda own=capability: own),
            patch.object(quantization, "tex", library),
            patch("torch.version.cuda", cuda),
        ):
            found[recipe, capability, cuda] = EXPECTED[recipe]()[0]
    return found


def attention() -> dict[str, bool]:
    """By recipe: whether core attention hears of ``fp8_dot_product_attention``."""
    shape = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 1}
    dtypes = {"bf16": True, "params_dtype": torch.bfloat16, "fp8": "hybrid"}
    configs = {
        recipe: qwen3_style_config(**shape, **dtypes, fp8_recipe=recipe, fp8_dot_product_attention=True)
        for recipe in EXPECTED
    }
    return {recipe: bool(getattr(get_fp8_recipe(config), "fp8_dpa", False)) for recipe, config in configs.items()}
