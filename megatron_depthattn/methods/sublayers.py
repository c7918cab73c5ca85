"""Megatron's transformer layer taken apart: its two sublayers without the residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_depthattn.model.cross_layer import CrossLayerLayer

BiasDropout = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class SublayersLayer(CrossLayerLayer):
    """A layer whose method says what each sublayer reads and where its output goes; see `without_residual`."""

    def attention_sublayer(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``Attention(Norm(hidden_states))``, ``[s, b, h]``; ``kwargs`` as for Megatron's layer."""
        kwargs.pop("dynamic_inference_decode_only", None)
        output, _ = self._forward_attention(hidden_states, **kwargs)
        return output  # type: ignore[no-any-return]

    def mlp_sublayer(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``MLP(Norm(hidden_states))``, ``[s, b, h]``; ``kwargs`` as for Megatron's layer."""
        return self._forward_mlp(  # type: ignore[no-any-return]
            hidden_states, kwargs.get("inference_context"), padding_mask=kwargs.get("padding_mask")
        )


def without_residual(spec: ModuleSpec, layer: type[SublayersLayer]) -> ModuleSpec:
    """A copy of a dense decoder layer's spec for ``layer``: its sublayers add no residual."""
    submodules = dataclasses.replace(spec.submodules, self_attn_bda=_bias_dropout, mlp_bda=_bias_dropout)
    return dataclasses.replace(spec, module=layer, submodules=submodules)


def _bias_dropout(training: bool, fused: bool) -> BiasDropout:
    """In place of Megatron's ``get_bias_dropout_add``, from which it differs by the addition."""

    def apply(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
        output, bias = output_with_bias
        output = output if bias is None else output + bias
        return torch.nn.functional.dropout(output, probability, training) if probability else output

    return apply
