"""A training step under DeepSpeed: our microbatches and loss, its gradients and optimizer, our norm and clipping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import deepspeed
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.config import RunConfig
from megatron_depthattn.parallel.schedule import Work
from megatron_depthattn.train.base_engine import Engine
from megatron_depthattn.train.build import build_schedule
from megatron_depthattn.train.deepspeed_engine.build import build_model, build_optimizer, initialize
from megatron_depthattn.train.deepspeed_engine.gradients import clip, squared_gradient_norm, sum_over_tensor_ranks
from megatron_depthattn.train.deepspeed_engine.shards import STAGES
from megatron_depthattn.train.deepspeed_engine.state import DeepSpeedState, Template
from megatron_depthattn.train.exchange import Status, no_status
from megatron_depthattn.train.non_finite import Attempt
from megatron_depthattn.train.step import (
    LossSum,
    Microbatch,
    StepResult,
    evaluation_mode,
    finish_attempt,
    forward_step,
    mean_over_global_batch,
    step_if_finite,
    sum_of_losses,
)


class DeepSpeedEngine(Engine):
    """DeepSpeed's ZeRO over our schedule of microbatches."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._module = build_model(config, device)
        self.model: GPTModel = unwrap_model(self._module)
        template, named = Template(self.model), dict(self.model.named_parameters())
        self._optimizer = build_optimizer(config, self.model)
        self._engine = initialize(config, self._module, self._optimizer)
        self.shards = STAGES[config.engine.zero_stage](named, self._optimizer, self._engine)
        self._state = DeepSpeedState(template, self.shards, named, self._optimizer.param_groups)
        self._scheduler = build_schedule(config, self._optimizer)
        # DeepSpeed averages over data-parallel ranks, the loss is a sum over the tokens of them all.
        tokens = config.train.global_batch_size * config.data.sequence_length
        self._loss_scale = parallel_state.get_data_parallel_world_size(with_context_parallel=True) / tokens
        self._has_gradients = False

    def describe(self) -> list[str]:
        settings = self._config.engine
        where = ", optimizer in host memory" if settings.offload_optimizer else ""
        return [f"engine: DeepSpeed {deepspeed.__version__}, ZeRO stage {settings.zero_stage}{where}"]

    def train_step(self, microbatches: Sequence[Microbatch], status: Status = no_status) -> StepResult:
        return step_if_finite(lambda: self.attempt(microbatches, status), self._update, [self._module], microbatches)

    def attempt(self, microbatches: Sequence[Microbatch], status: Status = no_status) -> Attempt:
        """Forward and backward from nothing, up to what the optimizer steps with; gradients are left in `shards`."""
        self._discard_gradients()
        losses = []
        for index, microbatch in enumerate(microbatches):
            # Not DeepSpeed's own count: it ends an accumulation, or overwrites it, where its config says.
            self._engine.set_gradient_accumulation_boundary(index == len(microbatches) - 1)
            total, _, report = self._forward(microbatch)
            losses.append(report)
            self._engine.backward(total * self._loss_scale)
        self._has_gradients = True
        sum_over_tensor_ranks(self.shards, self._device)
        return finish_attempt(losses, squared_gradient_norm(self.shards, self._device), status)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with evaluation_mode([self._engine]):
            yield

    def loss(self, microbatches: Sequence[Microbatch]) -> float:
        return mean_over_global_batch([self._forward(one)[2] for one in microbatches], self._device)

    def _forward(self, microbatch: Microbatch) -> tuple[Tensor, Tensor, LossSum]:
        return sum_of_losses(forward_step(iter([Work(microbatch, {})]), self._engine)[0])

    def _update(self, grad_norm: float) -> None:
        if self._config.optimizer.grad_clip > 0:
            clip(self.shards, grad_norm, self._config.optimizer.grad_clip)
        self._engine.step()
        self._has_gradients = False

    def _discard_gradients(self) -> None:
        """Let DeepSpeed drop gradients that no step must use; weights and optimizer stay as they are."""
        if self._has_gradients:
            self._optimizer.is_held = True
            self._engine.step()
            self._optimizer.is_held = self._has_gradients = False
