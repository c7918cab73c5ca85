"""``torch.compile`` of regions of the local layers: their norms, and those of q and k.

SwiGLU is Megatron's own region (`model.fused_swiglu`). Both are what torch runs as many passes over memory, both are
the same in every layer, so each is compiled once for the whole model, and neither holds a collective or the matrix
products that add to gradients themselves. A whole layer is no region: those of cross-layer methods read other numbers
of earlier states at every depth, and each depth would be compiled for itself.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel


def compile_layers(model: GPTModel) -> None:
    """Compile the norms of ``model``'s layers in place; modules and parameters keep their names."""
    for layer in model.decoder.layers:
        attention = layer.self_attention
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm):
            # Of the function: a wrapped module would have another name in checkpoints. As one graph: torch then raises
            # where it would go on without compiling.
            norm.forward = torch.compile(norm.forward, dynamic=False, fullgraph=True)
