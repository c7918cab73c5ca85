"""One training step and one evaluation: Megatron's schedule over our microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_depthattn.model.core_attention import context_parallel_positions
from megatron_depthattn.train.build import Chunks

Microbatch = Mapping[str, Tensor]
"""``tokens`` and ``labels``, int64 ``[micro-batch, sequence]``; empty on stages that need neither."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a finite number; no weight was changed by the step that raised it."""


class StepResult(NamedTuple):
    """What every rank knows after a step."""

    loss: float
    """Mean cross entropy over the tokens of the global batch, in nats."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""


def run_microbatches(
    chunks: Chunks, microbatches: Sequence[Microbatch], shape: tuple[int, int], *, forward_only: bool
) -> float:
    """Forward (and backward) over one global batch; gradients are left reduced and scaled on the chunks.

    Args:
        chunks: this rank's pipeline chunks.
        microbatches: this rank's microbatches of the global batch.
        shape: sequences and positions of a microbatch on the whole context-parallel group.
        forward_only: compute the loss without gradients.

    Returns:
        The mean loss per token over the global batch, on every rank.
    """
    batch_size, sequence_length = shape
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(microbatches) for _ in chunks] if len(chunks) > 1 else iter(microbatches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=sequence_length,
        micro_batch_size=batch_size,
        forward_only=forward_only,
    )
    return _mean_over_global_batch(losses, chunks)


def train_step(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    microbatches: Sequence[Microbatch],
    shape: tuple[int, int],
) -> StepResult:
    """One optimizer step.

    Raises:
        NonFiniteError: on all ranks together and before any weight changes, if the loss or the gradient is not finite.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = run_microbatches(chunks, microbatches, shape, forward_only=False)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"loss {loss}, gradient norm {grad_norm}: not finite, so the optimizer was not stepped")
    if optimizer.config.clip_grad > 0:
        clip_grad_by_total_norm_fp32(optimizer.get_parameters(), optimizer.config.clip_grad, grad_norm)
    optimizer.step_with_ready_grads()
    return StepResult(loss, grad_norm)


def _forward_step(microbatches: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """One chunk's forward, in the form that Megatron's schedules call."""
    batch = next(microbatches)
    tokens, labels = batch.get("tokens"), batch.get("labels")
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size > 1 and tokens is not None and labels is not None:
        mine = context_parallel_positions(tokens.size(1), rank, size).to(tokens.device)
        tokens, labels = tokens[:, mine], labels[:, mine]
    # RoPE numbers the positions itself (and the mask is causal): neither is passed.
    output = model(tokens, None, None, labels=labels)
    return output, partial(_sum_of_losses)


def _sum_of_losses(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token losses ``[b, s]`` to (sum, tokens, both as one tensor for the log)."""
    total = losses.float().sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, torch.stack([total.detach(), count.float()])


def _mean_over_global_batch(losses: Sequence[Tensor], chunks: Chunks) -> float:
    """Sum what the last stages computed over data and context ranks, tell every stage, and divide."""
    totals = torch.zeros(2, dtype=torch.float64, device=next(chunks[0].parameters()).device)
    if losses:
        totals += torch.stack(list(losses)).double().sum(0)
    if parallel_state.get_tensor_model_parallel_rank() > 0:  # tensor ranks hold copies of the same loss
        totals.zero_()
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])
