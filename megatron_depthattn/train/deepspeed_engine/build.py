"""From the run's config to DeepSpeed objects: the one place where our keys become DeepSpeed's."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from megatron_depthattn.config import RunConfig
from megatron_depthattn.model.initialization import initialize_weights
from megatron_depthattn.train.build import build_chunk, transformer_config

REDUCE_BUCKET = 50_000_000
"""Elements of the buffer in which gradients are reduced, at most; DeepSpeed allocates it whole."""


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


def build_model(config: RunConfig, device: torch.device) -> torch.nn.Module:
    """This rank's share of the whole model, initialised as under the Megatron engine."""
    megatron = transformer_config(config)
    model = build_chunk(config, megatron).to(device)
    initialize_weights(model, seed=config.run.seed, init_std=config.model.init_std)
    return Float16Module(megatron, model) if megatron.bf16 else model


def build_optimizer(config: RunConfig, model: GPTModel) -> HeldAdamW:
    """AdamW over Megatron's two parameter groups: norms are not decayed."""
    settings = config.optimizer
    common = {
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        "max_lr": settings.lr,
        "min_lr": settings.lr * settings.min_lr_ratio,
    }
    groups: list[list[Any]] = [[], []]
    for parameter in model.parameters():
        groups[parameter.dim() > 1].append(parameter)
    return HeldAdamW(
        [{"params": groups[decays], "wd_mult": float(decays), **common} for decays in (True, False)],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # DeepSpeed hands over one flat tensor: any other way makes copies of its size
    )


def initialize(config: RunConfig, model: torch.nn.Module, optimizer: HeldAdamW) -> Any:
    """DeepSpeed's engine around both."""
    # DeepSpeed logs every setting on import and on start; warnings are about the run.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=settings(config, sum(parameter.numel() for parameter in model.parameters())),
        mpu=topology(),
        dist_init_required=False,
    )
    return engine


def settings(config: RunConfig, num_parameters: int) -> dict[str, Any]:
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
