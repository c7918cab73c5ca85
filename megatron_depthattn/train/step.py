"""One training step and one evaluation: Megatron's schedule over our microbatches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_depthattn.model.documents import documents_of, takes_thd
from megatron_depthattn.parallel.schedule import Work, run_schedule
from megatron_depthattn.train.build import Chunks, Fp8State
from megatron_depthattn.train.errors import RunError
from megatron_depthattn.train.non_finite import Attempt, diagnose

Microbatch = Mapping[str, Tensor]
"""``tokens`` and ``labels``, int64 ``[micro-batch, sequence]``, and more (`data.loader.micro_batches`); empty on stages
that need neither."""
SAMPLE_IDS = "sample_ids"
"""Key of a microbatch that says which samples it holds; for logs, not for the device."""
BORDERS = "cu_seqlens"
"""Key of a microbatch whose documents do not see each other: where they begin."""
ON_HOST = (SAMPLE_IDS, BORDERS)


class NonFiniteError(RunError):
    """The loss or the gradient is not a finite number; no weight was changed by the step that it stands for."""

    retry = False  # the same weights and samples give the same numbers


class StepResult(NamedTuple):
    """What every rank knows after a step."""

    loss: float
    """Mean cross entropy over the tokens of the global batch that are predicted, in nats."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    skipped: bool = False
    """Loss or gradient norm is not finite, so weights, moments and Adam's step count are as they were."""
    diagnosis: tuple[str, ...] = ()
    """Of a skipped step: lines for the log that name the offenders, the same on every rank."""
    statuses: Sequence[Sequence[float]] = ()
    """What each rank had to say beside its part of loss and norm, by rank."""
    tokens: int = 0
    """Of the global batch that are predicted."""


class RankStatus(NamedTuple):
    """What a rank says of itself in a step's exchange, beside its part of the loss and of the gradient's norm."""

    data_seconds: float
    """How long the step waited for samples."""
    memory_gb: float
    signal: float
    """Number of the stop signal that it has received; 0: none."""
    has_next_batch: float
    """1: what the next step computes with is here; 0: not yet."""


Status = Callable[[], Sequence[float]]
"""Asked by every engine once in a step, between the last backward and the optimizer; as long on all ranks."""


NOTHING_PREDICTED = (
    "no token of the global batch is predicted: every label is padding or the first token of a document; prepare the "
    "corpus again with longer documents (--min-tokens)"
)


class LossSum(NamedTuple):
    """What a last stage's microbatch adds to the mean loss."""

    total: Tensor
    """Sum of its cross entropies, fp32, on the device."""
    tokens: Tensor
    """How many, int32, on the device."""


class BatchLoss(NamedTuple):
    """The loss over a global batch, on every rank."""

    mean: float
    """Per token, in nats."""
    tokens: int
    """Of all ranks that are predicted."""


class SkippedSteps:
    """What steps without an optimizer step do to the run, as ``train.on_non_finite`` says.

    Args:
        on_non_finite: ``stop`` at the first, or ``skip`` them.
        max_in_a_row: with ``skip``, how many may follow each other; one more stops the run.
    """

    def __init__(self, on_non_finite: Literal["stop", "skip"], max_in_a_row: int) -> None:
        self.in_a_row = 0
        self._stops, self._max_in_a_row = on_non_finite == "stop", max_in_a_row

    def record(self, step: int, result: StepResult) -> None:
        """Count a step; call on all ranks with the number of the step, from 1.

        Raises:
            NonFiniteError: on all ranks alike, if the run must stop here.
        """
        self.in_a_row = self.in_a_row + 1 if result.skipped else 0
        if self.in_a_row > (0 if self._stops else self._max_in_a_row):
            advice = f"{self.in_a_row} steps in a row, more than train.max_skipped_in_a_row={self._max_in_a_row}"
            advice = "set train.on_non_finite=skip to leave such steps out" if self._stops else advice
            raise NonFiniteError(f"step {step}: {'; '.join(result.diagnosis[:2])}; {advice}")


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
    losses = _losses(chunks, microbatches, shape, forward_only)
    return loss_of_global_batch(losses, device_of(chunks[0])).mean


def evaluate(chunks: Chunks, microbatches: Sequence[Microbatch], shape: tuple[int, int]) -> BatchLoss:
    """The loss over one global batch, without gradients; arguments as for `run_microbatches`."""
    return loss_of_global_batch(_losses(chunks, microbatches, shape, forward_only=True), device_of(chunks[0]))


def _losses(
    chunks: Chunks, microbatches: Sequence[Microbatch], shape: tuple[int, int], forward_only: bool
) -> list[LossSum]:
    """One for each microbatch on the last stage, elsewhere nothing."""
    size, length = shape
    if BORDERS in microbatches[0]:  # one row of documents
        size, length = 1, size * length
    return run_schedule(
        forward_step, microbatches, chunks, micro_batch_size=size, sequence_length=length, forward_only=forward_only
    )


def train_step(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    microbatches: Sequence[Microbatch],
    shape: tuple[int, int],
    fp8: Fp8State | None = None,
    status: Status = tuple,
) -> StepResult:
    """One optimizer step, or none: a loss or gradient that is not finite changes no weight, optimizer or FP8 state.

    The decision is the same on all ranks. Such a step is run a second time to find the offenders; what follows from
    it is the caller's to say, see `SkippedSteps`. What ``status`` says is in the result, for every rank.
    """

    state = fp8 or Fp8State(())
    state.keep()

    def attempt() -> Attempt:
        """Forward and backward from zeroed gradients, up to what the optimizer steps with."""
        state.restore()  # a second one computes with the scales of the first
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = _losses(chunks, microbatches, shape, forward_only=False)
        optimizer.prepare_grads()
        counted = [
            parameter.grad
            for parameter in optimizer.get_parameters()
            if parameter.grad is not None
            and param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        return finish_attempt(losses, squared_norm(counted, device_of(chunks[0])), status)

    def update(grad_norm: float) -> None:
        clip([p.grad for p in optimizer.get_parameters() if p.grad is not None], grad_norm, optimizer.config.clip_grad)
        optimizer.step_with_ready_grads()

    result = step_if_finite(attempt, update, chunks, microbatches)
    if result.skipped:
        state.restore()
    return result


def step_if_finite(
    attempt: Callable[[], Attempt],
    update: Callable[[float], None],
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
) -> StepResult:
    """What `train_step` promises, for any engine; call on all ranks.

    Args:
        attempt: forward and backward over the global batch from nothing; called again to find the offenders.
        update: called with the gradient's norm, if all is finite; clips and steps the optimizer.
        chunks: this rank's pipeline chunks.
        microbatches: this rank's microbatches of the global batch.
    """
    loss, grad_norm, suspects, statuses, tokens = attempt()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        headline = f"loss {loss}, gradient norm {grad_norm}: not finite, so the optimizer was not stepped"
        ids = [batch[SAMPLE_IDS].tolist() if SAMPLE_IDS in batch else None for batch in microbatches]
        diagnosis = diagnose(chunks, attempt, suspects, ids)
        return StepResult(loss, grad_norm, True, (headline, *diagnosis), statuses, tokens)
    update(grad_norm)
    return StepResult(loss, grad_norm, statuses=statuses, tokens=tokens)


def finish_attempt(losses: Sequence[LossSum], squared_norm: Tensor, status: Status) -> Attempt:
    """From every rank's part to what all ranks must know before the optimizer's step.

    The one place where a step waits for the device; what follows is only launched.

    Args:
        losses: as for `loss_of_global_batch`.
        squared_norm: what this rank adds to the squared norm of the whole gradient, fp64 [].
        status: what to say beside that.

    Raises:
        ValueError: on all ranks, no token of the global batch is predicted.
    """
    ranks = exchange(status(), torch.cat([_share(losses, squared_norm.device), squared_norm[None]]))
    loss, tokens = _mean(ranks)
    if not tokens:
        raise ValueError(f"{NOTHING_PREDICTED}, or set a larger train.global_batch_size")
    norm = math.sqrt(sum(rank[2] for rank in ranks))
    suspects = [] if math.isfinite(loss) else [i for i, one in enumerate(losses) if not one.total.isfinite()]
    return Attempt(loss, norm, tuple(suspects), tuple(tuple(rank[3:]) for rank in ranks), tokens)


def exchange(numbers: Sequence[float], on_device: Tensor | None = None) -> list[list[float]]:
    """Every rank's numbers, by rank, on every rank; where a step waits for the device.

    Args:
        numbers: this rank's; as many on all ranks.
        on_device: more of them, fp64 ``[n]``, which no host has seen; they come first.
    """
    has_gpu = torch.cuda.is_available()
    mine = torch.tensor(numbers, dtype=torch.float64, pin_memory=has_gpu)  # a copy from other memory would wait
    if has_gpu:
        mine = mine.to("cuda", non_blocking=True)
    if on_device is not None:
        mine = torch.cat([on_device, mine])
    everyone = torch.empty(dist.get_world_size() * len(mine), dtype=torch.float64, device=mine.device)
    dist.all_gather_into_tensor(everyone, mine)
    return everyone.view(-1, len(mine)).tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Their squared L2 norm, fp64 []; inf where it overflows fp32, as Megatron's, which reads each one on the host."""
    return get_total_norm(gradients).to(device).square().double()


@torch.no_grad()
def clip(gradients: list[Tensor], grad_norm: float, largest: float) -> None:
    """Scale the gradient of this norm down to ``largest``, unless that is 0."""
    factor = clip_factor(grad_norm, largest)
    if gradients and 0.0 < factor < 1.0:
        torch._foreach_mul_(gradients, factor)


def clip_factor(grad_norm: float, largest: float) -> float:
    """What brings a gradient of this norm to ``largest``, above 1 where it is smaller; Megatron's to the last digit."""
    return largest / (grad_norm + 1.0e-6)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's parameters lie."""
    return next(model.parameters()).device


def forward_step(work: Iterator[Work], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """One chunk's forward, in the form that Megatron's schedules call."""
    batch, call_arguments = next(work)
    tokens, labels, mask = (batch.get(name) for name in ("tokens", "labels", "loss_mask"))
    if BORDERS in batch:
        tokens, labels, mask = (part.reshape(1, -1) for part in (tokens, labels, mask))
        documents = documents_of(batch[BORDERS], thd=takes_thd(model), device=tokens.device)
        call_arguments = call_arguments | {"packed_seq_params": documents}
    tokens, labels, mask = map(_of_context_rank, (tokens, labels, mask))
    # RoPE numbers the positions itself (and the mask is causal): neither is passed.
    output = model(tokens, None, None, labels=labels, **call_arguments)
    return output, partial(sum_of_losses, mask=mask)


def _of_context_rank(row: Tensor | None) -> Tensor | None:
    """The columns at `context_parallel_positions`; as two pieces, so nothing is sent to index."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1 or row is None:
        return row
    pieces = row.chunk(2 * size, dim=1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim=1)


def sum_of_losses(losses: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, LossSum]:
    """Per-token losses ``[b, s]`` to (sum, tokens, both for the log): all, or those where a mask is true."""
    if mask is None:
        total = losses.float().sum()
        tokens = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)  # torch.tensor: waits for a copy
    else:
        total, tokens = (losses.float() * mask).sum(), mask.sum(dtype=torch.int)
    return total, tokens, LossSum(total.detach(), tokens)


def loss_of_global_batch(losses: Sequence[LossSum], device: torch.device) -> BatchLoss:
    """The mean loss per token, on every rank, of what the last stages computed over data and context ranks.

    Without a token that is predicted it is 0.
    """
    return _mean(exchange([], _share(losses, device)))


def _share(losses: Sequence[LossSum], device: torch.device) -> Tensor:
    """What this rank adds: the sum of the losses and their tokens, fp64 [2]."""
    if not losses or parallel_state.get_tensor_model_parallel_rank() > 0:  # tensor ranks hold copies of the same loss
        return torch.zeros(2, dtype=torch.float64, device=device)
    return torch.stack([torch.stack(part).double().sum() for part in zip(*losses, strict=True)])


def _mean(ranks: Sequence[Sequence[float]]) -> BatchLoss:
    """Of all ranks' shares, their first two numbers."""
    total, tokens = (sum(rank[place] for rank in ranks) for place in range(2))
    return BatchLoss(total / max(tokens, 1), round(tokens))


@contextmanager
def evaluation_mode(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Without gradients, and with the modules in evaluation mode."""
    for model in models:
        model.eval()
    with torch.no_grad():
        yield
    for model in models:
        model.train()
