"""Megatron-Core on a machine without a GPU.

Megatron-Core names the CUDA device in many places. On a machine without one, this file makes those names mean the
CPU, so that the real modules, schedules, optimizer and checkpoint code run on gloo. It is the only file that
changes Megatron or torch at run time, it is entered only when there is no GPU, and every line says what it stands
in for.

Works with megatron-core 0.16.1 (Python 3.11) and 0.19.x (Python 3.12 and later).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _device

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


@functools.cache
def enter_cpu_runtime() -> bool:
    """Make Megatron-Core run on CPU in this process; a no-op where a GPU is present.

    Call it before the first Megatron object is built. Returns whether the process runs on CPU.
    """
    if torch.cuda.is_available():
        return False
    _replace_tensor_functions()
    _replace_cuda_functions()
    _replace_megatron_rng()
    _replace_fused_optimizer()
    _replace_gradient_kernel()
    _replace_collectives_of_one()
    return True


def _replace_tensor_functions() -> None:
    """``device="cuda"`` means the CPU. Plain wrappers: a TorchFunctionMode is off inside backward (torch 2.15)."""
    # Inside `with torch.device(...)` torch knows its factories by identity, from a table that it makes at first use:
    # made later, it would hold our wrappers, and transformers 5 would take meta tensors for tensors on the CPU.
    _device._device_constructors()
    # schedules.py, clip_grads.py, optimizer.py, grad_scaler.py, transformer/utils.py, state_dict_saver.py,
    # exchange_utils.py
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.to = _on_cpu(tensor.to)  # dist_checkpointing: tensor.to("cuda")
    tensor.cuda = lambda self, *_, **__: self  # language_module.py, rope_utils.py, exchange_utils.py
    own_type = tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return own_type(self, *args, **kwargs)
        return _CUDA_TYPE_NAMES.get(self.dtype, own_type(self))

    tensor.type = type_name  # optimizer.py, distrib_optimizer.py, clip_grads.py: == "torch.cuda.FloatTensor"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every CUDA device among its arguments replaced by the CPU."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # rope_utils.py: pinned memory needs a driver
        return function(*(_CPU if _names_cuda(arg) else arg for arg in args), **kwargs)

    return wrapper


def _names_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _NoStream:
    """Stands in for ``torch.cuda.Stream``: CPU work is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # mappings.py, p2p_communication.py: device=torch.cuda.current_device()
    cuda.set_device = lambda _: None  # filesystem_async.py's writer processes
    cuda.synchronize = lambda *_: None  # p2p_communication.py, fully_parallel.py
    cuda.empty_cache = lambda: None  # optimizer.py, distributed_data_parallel.py
    cuda.manual_seed = torch.manual_seed  # random.py: CudaRNGStatesTracker.add
    cuda.get_rng_state = lambda *_: torch.get_rng_state()  # random.py: CudaRNGStatesTracker.add
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.Stream = _NoStream  # 0.19: optimizer and checkpoint set-up
    cuda.current_stream = lambda *_: _NoStream()  # 0.19: p2p_communication.py, random.py
    cuda.default_stream = lambda *_: _NoStream()  # param_and_grad_buffer.py
    cuda.stream = lambda _: contextlib.nullcontext()  # param_and_grad_buffer.py
    cuda.is_current_stream_capturing = lambda: False  # 0.19: random.py, cuda_graphs.py
    cuda._lazy_init = lambda: None  # 0.19: random.py
    cuda.get_device_properties = _no_properties  # torch.compile asks current_device() for them


def _no_properties(*_: Any) -> Any:
    raise AssertionError("there is no CUDA device")  # as torch's own on a machine without one


def _replace_megatron_rng() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    # _get_cuda_rng_state, _set_cuda_rng_state: one generator is both the "CPU" and the "CUDA" one here.
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _replace_fused_optimizer() -> None:
    """Where TransformerEngine or Apex is installed Megatron takes their CUDA kernels: here it takes torch's Adam."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    for module in (clip_grads, base):  # the imports at the head of clip_grads.py and optimizer.py
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None  # 0.19
    optimizer.USING_PYTORCH_OPTIMIZER = True  # optimizer/__init__.py
    distrib_optimizer.HAVE_APEX_OR_TE = False  # distrib_optimizer.py: who keeps Adam's step
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False  # 0.19


def _replace_gradient_kernel() -> None:
    """Apex's kernel by which local layers add to a weight's gradient: on a CPU torch's matrix product can do so."""
    from megatron.core.tensor_parallel import layers

    module: Any = layers
    module.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add_weight_gradient)
    module._grad_accum_fusion_available = True


def _add_weight_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """``main_grad`` ``[out, in]``, fp32, plus the gradient of a weight from ``[tokens, in]`` and ``[tokens, out]``."""
    if inputs.dtype is main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    else:
        main_grad.add_(grad_output.t() @ inputs)


def _replace_collectives_of_one() -> None:
    """A group of one has what it would gather: NCCL does nothing where gloo copies all weights and all gradients."""
    from megatron.core.distributed import param_and_grad_buffer

    module: Any = param_and_grad_buffer  # the imports at its head; it calls them on views of what they return into
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(module, name, _unless_alone(getattr(module, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def wrapper(*args: Any, group: torch.distributed.ProcessGroup, **kwargs: Any) -> Any:
        return None if group.size() == 1 else collective(*args, group=group, **kwargs)

    return wrapper
