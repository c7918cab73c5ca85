"""One model of ours with its optimizer, and the step that is timed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_depthattn.config import RunConfig


class Model:
    """Initialised as a run initialises it; every step is on the same tokens, drawn at random."""

    def __init__(self, config: RunConfig, device: torch.device, *, has_optimizer: bool) -> None:
        from megatron_depthattn.estimate.counts import forward_flops
        from megatron_depthattn.train.build import build_model, build_optimizer
        from megatron_depthattn.train.metrics import peak_tflops

        self._device = device
        self._shape = (config.train.micro_batch_size, config.data.sequence_length)
        self._chunks = build_model(config, device)
        self._optimizer: tuple[Any, Any] | None = build_optimizer(config, self._chunks) if has_optimizer else None
        self._whole = random_microbatch(config, device)
        self._batches = [self._whole]
        self.tokens = self._shape[0] * self._shape[1]
        self.flops_per_token = 3 * forward_flops(config).total
        self.peak_tflops = peak_tflops(config)

    def step(self) -> float:
        """Seconds of one step, until the device is done."""
        synchronize(self._device)
        started = time.perf_counter()
        self.update() if self._optimizer else self.gradients()
        synchronize(self._device)
        return time.perf_counter() - started

    def update(self) -> float:
        """A whole training step; the mean loss."""
        from megatron_depthattn.train.step import train_step

        assert self._optimizer, "built without an optimizer"
        optimizer, schedule = self._optimizer
        schedule.step(increment=1)
        return train_step(self._chunks, optimizer, self._batches, self._shape).loss

    def gradients(self) -> float:
        """Forward and backward from zeroed gradients; the mean loss."""
        from megatron_depthattn.train.step import run_microbatches

        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        return run_microbatches(self._chunks, self._batches, self._shape, forward_only=False)

    def gradient_norm(self) -> float:
        """L2 norm of what `gradients` left."""
        gradients = [parameter.main_grad for chunk in self._chunks for parameter in chunk.parameters()]
        return float(torch.nn.utils.get_total_norm(gradients))

    def set_length(self, length: int) -> None:
        """Take the first ``length`` positions of every sequence from now on; not more than it was built with."""
        self._shape = (self._shape[0], length)
        self._batches = [{name: tensor[:, :length].contiguous() for name, tensor in self._whole.items()}]

    def weights(self) -> dict[str, Tensor]:
        """The parameters by the names of Megatron's modules."""
        from megatron.core.utils import unwrap_model

        (model,) = unwrap_model(self._chunks)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


def random_microbatch(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """``tokens`` and ``labels`` of one micro-batch, the same for every model of one vocabulary."""
    size, length = config.train.micro_batch_size, config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (size, length + 1), generator=generator).to(device)
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
