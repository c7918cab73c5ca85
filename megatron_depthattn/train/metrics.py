"""A step's numbers, in the units of their names."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from typing import Any

import torch

from megatron_depthattn.config import RunConfig
from megatron_depthattn.estimate.counts import PEAK_TFLOPS_BF16 as PEAK_TFLOPS_BF16
from megatron_depthattn.estimate.counts import decoder_shape as decoder_shape
from megatron_depthattn.model.flops import ForwardFlops
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.train.exchange import RankStatus
from megatron_depthattn.train.step import StepResult
from megatron_depthattn.train.step_folders import Progress


def forward_flops(config: RunConfig, megatron: DepthAttentionConfig) -> ForwardFlops:
    """Operations of one token's forward pass under this config."""
    plan = megatron.source_plan if megatron.attends_over_depth else None
    return decoder_shape(config).forward_flops(config.data.sequence_length, plan)


def peak_tflops(config: RunConfig) -> float | None:
    """What MFU is a fraction of: the peak of this process's device; None for a device or precision that has none."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = PEAK_TFLOPS_BF16 if config.precision.dtype == "bf16" else {}
    return next((peak for part, peak in peaks.items() if part in name), None)


class Meter:
    """Turns steps into the records of metrics.jsonl.

    Args:
        tokens: of a step.
        flops: operations of one token's forward pass; backward counts as two more.
        world_size: devices that share them.
        peak: what MFU is a fraction of, see `peak_tflops`.
    """

    def __init__(self, tokens: int, flops: ForwardFlops, world_size: int, peak: float | None) -> None:
        self._tokens, self._peak = tokens, peak
        self._tflops_per_device = 3 * flops.total * tokens / world_size / 1e12

    def record(
        self, progress: Progress, result: StepResult, *, lr: float | None, seconds: float, ranks: Sequence[RankStatus]
    ) -> dict[str, Any]:
        """One line of metrics.jsonl; the loop fills in ``eval_loss``, ``depth`` and ``checkpoint_seconds``.

        Memory is that of the rank that holds most of it. Loss and gradient norm are null where they are not finite.
        """
        tflops = self._tflops_per_device / seconds
        waits = [rank.data_seconds for rank in ranks]
        return {
            "step": progress.step,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "lr": lr,
            "tokens": progress.consumed_tokens,
            "samples": progress.consumed_samples,
            "step_seconds": seconds,
            "data_seconds": max(waits),
            "data_seconds_min": min(waits),
            "data_slowest_rank": waits.index(max(waits)),
            "tokens_per_second": self._tokens / seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "memory_gb": max(rank.memory_gb for rank in ranks),
            "checkpoint_seconds": 0.0,
            "skipped_steps": progress.skipped_steps,
            "eval_loss": None,
            "depth": None,
        }


def peak_memory_gb() -> float:
    """Most memory this process has held, in 10^9 bytes: the allocator's peak on a GPU, resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
