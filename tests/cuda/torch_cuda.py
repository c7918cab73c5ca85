"""``torch.cuda`` of a process that has devices: those names of it that Megatron, DeepSpeed and the project use."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

from tests.cuda.ledger import waited
from tests.cuda.tensors import GENERATORS, Device, Generator, resolved

NAME = "NVIDIA H200 (rehearsed)"
TOTAL_MEMORY, FREE_MEMORY = 150 * 10**9, 149 * 10**9


class Stream:
    """All streams are one, and its work is done when the call returns; only who waits for it is noticed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream_id, self.cuda_stream, self.device = id(self), 0, torch.device("cuda", Device.current)

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        waited("stream.synchronize")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """A mark in the one stream."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waited("event.synchronize")

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class DeviceContext:
    """``torch.cuda.device``: another current device within."""

    def __init__(self, device: Any) -> None:
        is_same = device is None or device == -1
        self._index = Device.current if is_same else resolved(device).index

    def __enter__(self) -> None:
        self._before, Device.current = Device.current, self._index

    def __exit__(self, *_: Any) -> None:
        Device.current = self._before


def _set_device(device: Any) -> None:
    index = resolved(device).index
    if index >= len(GENERATORS):
        raise RuntimeError(f"CUDA error: invalid device ordinal {index} of {len(GENERATORS)}")
    Device.current = index


def _properties(device: Any = None) -> SimpleNamespace:
    index = Device.current if device is None else resolved(device).index
    return SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        uuid=f"GPU-{index}",
        total_memory=TOTAL_MEMORY,
        multi_processor_count=132,
        warp_size=32,
        shared_memory_per_block_optin=232448,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
    )


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return GENERATORS[resolved(device).index].get_state()


def _set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
    GENERATORS[resolved(device).index].set_state(state)


def patch_cuda(count: int) -> None:
    """Replace the names that would ask the driver."""
    GENERATORS[:] = [Generator(torch.device("cuda", index)) for index in range(count)]
    default_stream = Stream()
    cuda: Any = torch.cuda
    names: dict[str, Any] = {
        # the process and its devices
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,  # called by C++ for every device="cuda"
        "_lazy_call": lambda function, **_: function(),  # Megatron's random.py has it from here
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: count,
        "current_device": lambda: Device.current,
        "set_device": _set_device,
        "device": DeviceContext,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": _properties,
        "is_bf16_supported": lambda *_, **__: True,
        # waiting
        "synchronize": lambda *_: waited("torch.cuda.synchronize"),
        "empty_cache": lambda: waited("empty_cache"),  # cudaFree waits
        "ipc_collect": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: default_stream,
        "default_stream": lambda *_: default_stream,
        "set_stream": lambda _: None,
        "stream": lambda _: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        # memory: plain numbers, none of them measured
        "mem_get_info": lambda *_: (FREE_MEMORY, TOTAL_MEMORY),
        "memory_stats": lambda *_: {},
        "max_memory_allocated": lambda *_: 10**9,
        "reset_peak_memory_stats": lambda *_: None,
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_reserved"), lambda *_: 0),
        # random numbers
        "default_generators": tuple(GENERATORS),
        "manual_seed": lambda seed: GENERATORS[Device.current].manual_seed(int(seed)),
        "manual_seed_all": lambda seed: [generator.manual_seed(int(seed)) for generator in GENERATORS],
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "nvtx": SimpleNamespace(
            range_push=lambda *_: 0,
            range_pop=lambda *_: 0,
            mark=lambda *_: 0,
            range=lambda *_: contextlib.nullcontext(),
        ),
    }
    for name, value in names.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state, cuda.random.set_rng_state = _get_rng_state, _set_rng_state
    cuda.nccl.version = lambda: (2, 28, 9)
    torch._C._cuda_setRNGState = _set_rng_state  # Megatron's random.py looks for it, and calls it
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: True
    accelerator.device_count = lambda: count
    accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
    accelerator.current_device_index = lambda: Device.current
    accelerator.current_stream = lambda *_: default_stream
    accelerator.set_stream = lambda _: None
    accelerator.synchronize = lambda *_: waited("torch.accelerator.synchronize")
