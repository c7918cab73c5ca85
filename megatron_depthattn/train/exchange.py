"""What all ranks say to each other in a step: one small collective, and one transfer from the device to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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


def no_status() -> Sequence[float]:
    """Nothing to say beside loss and norm."""
    return ()


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
