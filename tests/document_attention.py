"""A core attention for tests that attends within each document of a packed sequence, as TransformerEngine's does.

Simple and independent of any kernel: one document, one causal softmax. Like a fused kernel it keeps q, k and v,
contiguous, for backward, and nothing that grows with the square of the length. Shapes: t tokens of all documents, s
positions, b batch, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_depthattn.model.cross_entropy import ChunkedLossGPTModel
from megatron_depthattn.model.gpt import DepthGPTModel
from megatron_depthattn.model.layer_specs import depth_attention_block_spec
from megatron_depthattn.model.transformer_config import DepthAttentionConfig


def packed(lengths: list[int], device: str = "cpu") -> PackedSeqParams:
    """Documents of these lengths, one after the other."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    longest = max(lengths)
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One document: q ``[t, H, d]``, k and v ``[t, G, d]``; returns ``[t, H, d]``."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.size(-1) ** -0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


class _KeepsInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(*(x.contiguous() for x in (q, k, v)))
        ctx.attend = attend
        return attend(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.attend(*inputs)
        return None, *torch.autograd.grad(out, inputs, grad)


class DocumentAttention(torch.nn.Module):
    """In place of Megatron's core attention; takes ``[t, H, d]`` with packed sequences, else ``[s, b, H, d]``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        def rows(*inputs: Tensor) -> Tensor:
            return torch.stack([causal(*row) for row in zip(*(x.unbind(1) for x in inputs), strict=True)], dim=1)

        def documents(*inputs: Tensor) -> Tensor:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            return torch.cat([causal(*each) for each in zip(*(x.split(lengths) for x in inputs), strict=True)])

        return _KeepsInputs.apply(documents if packed_seq_params else rows, query, key, value).flatten(-2)


def build_with_document_attention(
    config: DepthAttentionConfig, *, vocab_size: int, length: int, **stage: bool
) -> GPTModel:
    """A local model with this core attention in every layer; ``stage``: pre_process and post_process."""
    spec = depth_attention_block_spec(config)
    layer = spec.layer_specs[0]
    attention = layer.submodules.self_attention
    parts = dataclasses.replace(attention.submodules, core_attention=DocumentAttention)
    submodules = dataclasses.replace(layer.submodules, self_attention=dataclasses.replace(attention, submodules=parts))
    spec.layer_specs = [dataclasses.replace(layer, submodules=submodules)] * len(spec.layer_specs)
    return (DepthGPTModel if config.shares_over_layers else ChunkedLossGPTModel)(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=length,
        position_embedding_type="rope",
        **stage,
    )
