"""Cross entropy over a vocabulary that tensor ranks share, without a copy of the logits.

Megatron's keeps an fp32 softmax of the size of the logits beside them: in bf16 three times their bytes. Here the
softmax is taken a few rows at a time and the gradient takes the logits' place, in their dtype. Every operation is
Megatron's on the same numbers, so loss and gradient are equal to the bit. What it costs in bf16 is a second
exponential, in backward; fp32 logits, which have the softmax's dtype, are overwritten by their exponentials at once.

torch's `linear_cross_entropy` knows no tensor ranks, and its chunks took up to 40 times as long on a CPU. Chunks of the
product with the weight, gradients made in forward, need a gradient that is the same for every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_depthattn.vocabulary import LOSS_CHUNK


class ChunkedLossGPTModel(GPTModel):
    """Megatron's ``GPTModel`` whose loss, where Megatron's fused one is not asked for, is `chunked_cross_entropy`."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """As Megatron's: ``labels`` ``[b, s]``, ``logits`` ``[s, b, v]`` of this tensor rank; the loss is ``[b, s]``.

        The memory of ``logits`` is used for what it needs: they are overwritten.
        """
        if self.config.cross_entropy_loss_fusion:
            fused: Tensor = super().compute_language_model_loss(labels, logits)
            return fused
        return chunked_cross_entropy(logits, labels.transpose(0, 1), self.pg_collection.tp).transpose(0, 1).contiguous()


def chunked_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The cross entropy of every token in fp32, shaped as ``target``.

    Args:
        logits: ``[..., v]``, contiguous, this rank's share of the vocabulary; overwritten.
        target: ``[...]``, ids of the whole vocabulary.
        group: ranks that share the vocabulary, in its order.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(logits, target, group)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
        rows = logits.view(-1, logits.size(-1))
        local = target.reshape(-1) - group.rank() * rows.size(1)
        is_elsewhere = (local < 0) | (local >= rows.size(1))
        local.masked_fill_(is_elsewhere, 0)
        maxima = rows.amax(-1).float()
        if group.size() > 1:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
        picked = rows.gather(1, local[:, None])[:, 0].float().sub_(maxima).masked_fill_(is_elsewhere, 0.0)
        sums = torch.empty_like(maxima)
        for chunk, part in _in_fp32(rows):
            sums[chunk] = part.sub_(maxima[chunk, None]).exp_().sum(-1)
        if group.size() > 1:
            picked, sums = both = torch.stack([picked, sums])
            dist.all_reduce(both, group=group)
        ctx.save_for_backward(logits, local, is_elsewhere, maxima, sums)
        return (sums.log() - picked).view_as(target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, local, is_elsewhere, maxima, sums = ctx.saved_tensors
        rows, gradient = logits.detach().view(-1, logits.size(-1)), gradient.reshape(-1, 1)
        is_here = 1.0 - is_elsewhere.float()
        for chunk, part in _in_fp32(rows):
            if rows.dtype != torch.float32:
                part.sub_(maxima[chunk, None]).exp_()
            part.div_(sums[chunk, None])
            part[torch.arange(part.size(0), device=part.device), local[chunk]] -= is_here[chunk]
            part.mul_(gradient[chunk])
            if rows.dtype != torch.float32:
                rows[chunk] = part
        return rows.view_as(logits), None, None


def _in_fp32(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time: themselves if they are fp32, else a copy that lasts until the next."""
    size = max(1, LOSS_CHUNK[rows.device.type] // rows.size(1))
    is_fp32 = rows.dtype == torch.float32
    scratch = None if is_fp32 else torch.empty_like(rows[:size], dtype=torch.float32)
    for start in range(0, rows.size(0), size):
        chunk = slice(start, min(start + size, rows.size(0)))
        yield chunk, rows[chunk] if scratch is None else scratch[: chunk.stop - start].copy_(rows[chunk])
