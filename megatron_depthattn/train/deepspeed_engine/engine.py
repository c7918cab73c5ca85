"""A training step under DeepSpeed: our microbatches and loss, its gradients and optimizer, our norm and clipping.

Here our config's keys become DeepSpeed's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_depthattn.config import RunConfig
from megatron_depthattn.model.mup import has_scaled_rate
from megatron_depthattn.parallel.schedule import Work
from megatron_depthattn.train.build import build_chunk, build_schedule, initialize, mup_settings, transformer_config
from megatron_depthattn.train.deepspeed_engine.shards import (
    STAGES,
    DeepSpeedState,
    Template,
    clip,
    squared_gradient_norm,
    sum_over_tensor_ranks,
)
from megatron_depthattn.train.engine import Engine
from megatron_depthattn.train.non_finite import Attempt
from megatron_depthattn.train.step import (
    BatchLoss,
    LossSum,
    Microbatch,
    Status,
    StepResult,
    evaluation_mode,
    finish_attempt,
    forward_step,
    loss_of_global_batch,
    step_if_finite,
)

# On a CPU it would compile, for a minute, an operation of its inference that training does not call.
vars(import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
REDUCE_BUCKET = 50_000_000
"""Elements of the buffer in which gradients are reduced, at most; DeepSpeed allocates it whole."""


class DeepSpeedEngine(Engine):
    """DeepSpeed's ZeRO over our schedule of microbatches."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        megatron = transformer_config(config)
        self.model = build_chunk(config, megatron).to(device)
        initialize(self.model, config)
        self._module = Float16Module(megatron, self.model) if megatron.bf16 else self.model
        template, named = Template(self.model), dict(self.model.named_parameters())
        self._optimizer = build_optimizer(config, self.model)
        # DeepSpeed logs every setting on import and on start; warnings are about the run.
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._engine, _, _, _ = deepspeed.initialize(
            model=self._module,
            optimizer=self._optimizer,
            config=deepspeed_config(config, sum(parameter.numel() for parameter in named.values())),
            mpu=topology(),
            dist_init_required=False,
        )
        self.shards = STAGES[config.engine.zero_stage](named, self._optimizer, self._engine)
        self._state = DeepSpeedState(template, self.shards, named, self._optimizer.param_groups)
        self._scheduler = build_schedule(config, self._optimizer)
        self._has_gradients = False

    def describe(self) -> list[str]:
        settings = self._config.engine
        where = ", optimizer in host memory" if settings.offload_optimizer else ""
        return [f"engine: DeepSpeed {deepspeed.__version__}, ZeRO stage {settings.zero_stage}{where}"]

    def train_step(self, microbatches: Sequence[Microbatch], status: Status = tuple) -> StepResult:
        return step_if_finite(lambda: self.attempt(microbatches, status), self._update, [self._module], microbatches)

    def attempt(self, microbatches: Sequence[Microbatch], status: Status = tuple) -> Attempt:
        """Forward and backward from nothing, up to what the optimizer steps with; gradients are left in `shards`."""
        self._discard_gradients()
        loss_scale, losses = self._loss_scale(microbatches), []
        for index, microbatch in enumerate(microbatches):
            # Not DeepSpeed's own count: it ends an accumulation, or overwrites it, where its config says.
            self._engine.set_gradient_accumulation_boundary(index == len(microbatches) - 1)
            total, _, report = self._forward(microbatch)
            losses.append(report)
            self._engine.backward(total * loss_scale)
        self._has_gradients = True
        if self._config.engine.offload_optimizer and self._device.type == "cuda":
            torch.cuda.synchronize()  # DeepSpeed's copies to the host memory that is read now may be under way
        sum_over_tensor_ranks(self.shards, self._device)
        return finish_attempt(losses, squared_gradient_norm(self.shards, self._device), status)

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluation_mode([self._engine])

    def loss(self, microbatches: Sequence[Microbatch]) -> BatchLoss:
        return loss_of_global_batch([self._forward(one)[2] for one in microbatches], self._device)

    def _forward(self, microbatch: Microbatch) -> tuple[Tensor, Tensor, LossSum]:
        output, sums = forward_step(iter([Work(microbatch, {})]), self._engine)
        return sums(output)  # type: ignore[no-any-return]

    def _loss_scale(self, microbatches: Sequence[Microbatch]) -> Tensor | float:
        """What the sum of a microbatch's losses is multiplied by before its backward.

        DeepSpeed averages over data- and context-parallel ranks, the loss is one over the tokens of them all.
        """
        if "loss_mask" not in microbatches[0]:
            tokens = len(microbatches) * self._config.train.micro_batch_size * self._config.data.sequence_length
            return self._config.parallel.context / tokens
        counted = torch.stack([one["loss_mask"].sum() for one in microbatches]).sum()
        dist.all_reduce(counted, group=parallel_state.get_data_parallel_group())
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True) / counted

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


def topology() -> SimpleNamespace:
    """Megatron's process groups under the names that DeepSpeed asks an ``mpu`` for.

    Context-parallel ranks hold the same weights and other tokens: to the optimizer they are data-parallel ranks.
    """
    names: dict[str, Any] = {"get_pipeline_model_parallel_world_size": lambda: 1}
    for what in ("group", "world_size", "rank"):
        data, tensor = f"get_data_parallel_{what}", f"get_tensor_model_parallel_{what}"
        names[data] = partial(getattr(parallel_state, data), with_context_parallel=True)
        names[tensor] = names[f"get_model_parallel_{what}"] = getattr(parallel_state, tensor)
    return SimpleNamespace(**names)


class HeldAdamW(torch.optim.AdamW):
    """AdamW whose steps can be withheld.

    DeepSpeed clears what it has accumulated nowhere but in its own step. So a gradient that must not be used goes
    through that step as well, and ends here.
    """

    is_held = False

    def step(self, closure: Any = None) -> Any:
        return None if self.is_held else super().step(closure)


def build_optimizer(config: RunConfig, model: GPTModel) -> HeldAdamW:
    """AdamW over Megatron's parameter groups: norms are not decayed, and muP has learning rates of its own."""
    settings = config.optimizer
    common = {
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "max_lr": settings.lr,
        "min_lr": settings.lr * settings.min_lr_ratio,
    }
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        is_scaled = settings.mup is not None and has_scaled_rate(name, parameter)
        groups.setdefault((parameter.dim() > 1, is_scaled), []).append(parameter)
    return HeldAdamW(
        [
            {"params": groups[decays, is_scaled], "wd_mult": float(decays), "default_config": not is_scaled}
            | (common | mup_settings(config) if is_scaled else common)
            for decays, is_scaled in sorted(groups, reverse=True)
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # DeepSpeed hands over one flat tensor: any other way makes copies of its size
    )


def deepspeed_config(config: RunConfig, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's config.

    Args:
        num_parameters: of this tensor-parallel rank.
    """
    stage, bf16 = config.engine.zero_stage, config.precision.dtype == "bf16"
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(REDUCE_BUCKET, num_parameters)}
    if stage == 3:
        # Norms stay whole: to gather them would cost more than it saves. Everything larger is partitioned.
        zero["stage3_param_persistence_threshold"] = config.model.hidden_size
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif stage in (1, 2) and not (stage == 1 and bf16):
        zero["compute_grad_norm"] = False  # the engine computes it, of the gradients that are stepped with
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        # 1, so that DeepSpeed scales nothing: where an accumulation ends is said for every microbatch.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
