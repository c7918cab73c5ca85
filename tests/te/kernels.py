"""Where TransformerEngine's layers compute on a CPU, through tests/te/extension."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.te.extension import device


@contextlib.contextmanager
def computing(capability: tuple[int, int] = device.HOPPER) -> Iterator[None]:
    """A context in which TransformerEngine's own code finds a GPU of this capability and takes tensors on the CPU for
    tensors on it. For all other code there is none."""
    from megatron.core.distributed import param_and_grad_buffer
    from transformer_engine.pytorch import distributed, quantization

    properties = SimpleNamespace(
        **{"major": capability[0], "minor": capability[1], "multi_processor_count": 132},
        **{"name": "stand-in", "total_memory": 80 << 30},
    )
    own_is_cuda, own_is_available = torch.Tensor.is_cuda, torch.cuda.is_available
    is_cuda = property(lambda self: _asked_by_transformer_engine() or own_is_cuda.__get__(self))
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(device, "capability", capability))
        enter(patch.object(torch.Tensor, "is_cuda", is_cuda))
        enter(patch("torch.cuda.is_available", lambda: _asked_by_transformer_engine() or own_is_available()))
        enter(patch("torch.cuda.device", lambda *_: contextlib.nullcontext()))
        enter(patch("torch.cuda.get_device_properties", lambda *_: properties))
        enter(patch.object(quantization, "get_device_compute_capability", lambda: capability))
        # One generator is both the "CPU" and the "CUDA" one, as in parallel/cpu_runtime.py.
        enter(patch.object(distributed, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()))
        enter(patch.object(distributed, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)))
        # gloo's coalesced all-gather garbles buffers of two dtypes; NCCL's does not.
        enter(patch.object(param_and_grad_buffer, "_coalescing_manager", _one_by_one))
        yield


def _asked_by_transformer_engine() -> bool:
    """Whether the caller's caller is a function of TransformerEngine."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("transformer_engine.")


class _one_by_one:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> _one_by_one:
        return self

    def __exit__(self, *_: object) -> None: ...
    def wait(self) -> None: ...
