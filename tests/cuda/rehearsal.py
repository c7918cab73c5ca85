"""A rehearsal of CUDA on a machine without a GPU.

After `start`, every tensor that code puts on "cuda" says so and hides its numbers in a CPU tensor. Operations compute
with those, so losses are those of the CPU; what a GPU would reject raises `RehearsalError`, and what makes the host
wait is counted by the line that does it. Real gloo processes stand in for NCCL.

    tensors.py     the tensors, and what each operation of torch does with them
    torch_cuda.py  torch.cuda, its streams and its generators
    nccl.py        collectives
    ledger.py      counters, objections, host memory that a device may still be at

It cannot see kernels, TransformerEngine, Triton, memory, or streams that overtake each other: docs/gpu/rehearsal.md.
The order of messages within a group is compared between ranks by messages.py.
"""

from __future__ import annotations

import sys

import torch

from tests.cuda.ledger import COPIES, FAULTS, SYNCS, RehearsalError, counted
from tests.cuda.nccl import patch_distributed
from tests.cuda.tensors import CudaMode, CudaTensor, Device, patch_modules, patch_tensors, patch_threads
from tests.cuda.torch_cuda import patch_cuda

__all__ = ["COPIES", "FAULTS", "SYNCS", "CudaTensor", "RehearsalError", "counted", "start"]


def start(device: int = 0, count: int = 1) -> None:
    """Enter the rehearsal, for good: this process has ``count`` GPUs, and ``device`` is its current one.

    Call it before Megatron is imported, which takes names of torch.cuda with it.
    """
    assert "megatron.core" not in sys.modules, "the rehearsal has to begin before Megatron is imported"
    assert not torch.cuda.is_available(), "there is a GPU here"
    Device.current = device
    patch_tensors()
    patch_modules()
    patch_cuda(count)
    patch_distributed()
    patch_threads()
    torch._dynamo.config.disable = True  # what Inductor would write for a GPU is Triton
    CudaMode().__enter__()
