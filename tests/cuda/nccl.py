"""NCCL, played by gloo: a group "nccl" is one of gloo's, and its messages are those of the hidden tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.cuda.ledger import RehearsalError, waited
from tests.cuda.tensors import CPU, CudaTensor, Device

DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
}
"""What ProcessGroupNCCL has a type for (ncclDataType in ProcessGroupNCCL.cpp)."""
_groups: dict[int, tuple[Any, dist.ProcessGroup]] = {}
"""By id of the backend, that and the group of the CPU through which its messages go."""


class _Nccl(type):
    def __instancecheck__(cls, backend: Any) -> bool:
        return id(backend) in _groups  # torch asks of what it has just made


class ProcessGroupNCCL(metaclass=_Nccl):
    """Stands in for torch's class of this name where torch makes a backend "nccl"; one of gloo's comes out."""

    Options = c10d.ProcessGroupNCCL.Options  # real: torch fills them

    def __new__(cls, store: Any, rank: int, size: int, options: Any) -> Any:
        if not dist.is_initialized():
            _groups.clear()  # of a world that was left
        backend = c10d.ProcessGroupGloo(store, rank, size, timeout=options._timeout)
        # Operations of a group look for the backend of their tensors' device: the hidden ones need one of the CPU.
        group = dist.ProcessGroup(store, rank, size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, backend)
        group._set_group_name(f"{options.group_name} on the CPU")
        _groups[id(backend)] = backend, group
        return backend


def patch_distributed() -> None:
    """Where torch takes the class from: distributed_c10d.py."""
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL


def collective(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of ``torch.ops.c10d``, which has its group among its arguments."""
    name = func.overloadpacket.__name__
    flat, spec = tree_flatten((args, kwargs))
    on_device = [x for x in flat if type(x) is CudaTensor]
    on_host = [x for x in flat if isinstance(x, torch.Tensor) and type(x) is not CudaTensor]
    place = next(
        i for i, x in enumerate(flat) if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())
    )
    group = dist.ProcessGroup.unbox(flat[place])
    try:
        backend = group._get_backend(torch.device("cuda"))
    except RuntimeError:
        backend = None
    if id(backend) not in _groups:
        if on_device:
            raise RehearsalError(f"{name}: a CUDA tensor is given to a gloo group")
        return func(*args, **kwargs)
    if name == "barrier":
        waited("barrier")
    elif on_host:
        shapes = [(str(x.dtype), tuple(x.shape)) for x in on_host]
        raise RehearsalError(
            f"{name}: no backend type associated with device type cpu: an NCCL group is given {shapes}"
        )
    for tensor in on_device:
        if not tensor.hidden.is_contiguous():
            raise RehearsalError(f"{name}: NCCL: tensors must be contiguous, not {tensor.shape} by {tensor.stride()}")
        if tensor.dtype not in DTYPES:
            raise RehearsalError(f"{name}: NCCL: unsupported data type {tensor.dtype}")
        if tensor.index != Device.current:
            raise RehearsalError(f"{name}: NCCL: a tensor on cuda:{tensor.index} on the rank of cuda:{Device.current}")
    outer = {id(x.hidden): x for x in on_device}
    hidden = [x.hidden if type(x) is CudaTensor else x for x in flat]
    hidden[place] = _groups[id(backend)][1].boxed()
    hidden_args, hidden_kwargs = tree_unflatten(hidden, spec)
    out = func(*hidden_args, **hidden_kwargs)
    return tree_map_only(torch.Tensor, lambda x: outer[id(x)] if id(x) in outer else CudaTensor(x), out)
