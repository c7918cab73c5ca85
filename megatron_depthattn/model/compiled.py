"""``torch.compile`` of regions of the local layers: their norms, those of q and k, and the connectors of mHC.

SwiGLU is Megatron's own region (`model.fused_swiglu`). All are what torch runs as many passes over memory, and
the same in every layer, so each is compiled once for the whole model, and none holds a collective or the matrix
products that add to gradients themselves. A whole layer is no region: those of cross-layer methods read other numbers
of earlier states at every depth, and each depth would be compiled for itself.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.methods.mhc import reference
from megatron_depthattn.methods.mhc.layer import HyperConnectionsLayer


def compile_layers(model: GPTModel) -> None:
    """Compile the regions of ``model``'s layers in place; modules and parameters keep their names.

    Torch stops at eight compilations of a function. Norms take six of them in a run with evaluations: give the model
    one number of sequences and one length.
    """
    # A function of the weight: a module's own forward is compiled again where a later loop borrows its weight. As one
    # graph: torch then raises where it would run without compiling.
    compiled = torch.compile(_rms_norm, dynamic=False, fullgraph=True)
    connect = torch.compile(reference.connect, dynamic=False, fullgraph=True)
    write_back = torch.compile(reference.write_back, dynamic=False, fullgraph=True)
    for layer in model.decoder.layers:
        attention = layer.self_attention
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm):
            norm.forward = lambda x, norm=norm: compiled(x, norm.weight, norm.eps)
        if isinstance(layer, HyperConnectionsLayer):
            for connector in (layer.attention_connector, layer.mlp_connector):
                connector.connect, connector.write_back = connect, write_back


def _rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.size(-1),), weight, eps)
