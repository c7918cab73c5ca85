"""Tensors that say "cuda" and hide a CPU tensor, and what every operation of torch does with them.

Operations run on the hidden tensors, so numbers are real; what a GPU would reject is rejected before. Private API of
torch that this leans on is named where it is used; harness_checks.py says what to look at when torch changes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.nn.attention.bias import CausalBias
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils import _device as device_context
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.cuda import ledger
from tests.cuda.ledger import RehearsalError, copied, waited
from tests.cuda.varlen import KERNELS

aten: Any = torch.ops.aten
CPU = torch.device("cpu")


class _Devices(threading.local):
    """Which of the process's devices is current; every thread begins with 0."""

    current = 0
    meta = False
    """Whether Python asks for "meta" itself, so that it does not stand for a device."""


Device = _Devices()


class CudaTensor(torch.Tensor):
    """A tensor on a device.

    C++ takes it for one on "meta": for CUDA a build without a driver would ask the driver (streams of the autograd
    engine, device guards), and for "cpu" a mix of both would not be noticed. Python sees "cuda".
    """

    hidden: torch.Tensor
    index: int

    @staticmethod
    def __new__(cls, hidden: torch.Tensor, index: int | None = None) -> CudaTensor:
        assert type(hidden) is not CudaTensor
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            hidden.size(),
            strides=hidden.stride(),
            storage_offset=hidden.storage_offset(),
            dtype=hidden.dtype,
            layout=hidden.layout,
            device="meta",
        )
        self.hidden, self.index = hidden, Device.current if index is None else index
        return self

    def __init__(self, *_: Any, **__: Any) -> None: ...

    __torch_function__ = (
        torch._C._disabled_torch_function_impl
    )  # Python's methods below, and no hooks around the others

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.hidden!r}, device={self.device})"

    # ---- what C++ would answer for "meta"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return self.hidden.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.hidden.untyped_storage()

    def type(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return torch.Tensor.type(self, *args, **kwargs)
        return self.hidden.type().replace("torch.", "torch.cuda.")

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if type(other) is not CudaTensor:
            raise RehearsalError(f".data of a CUDA tensor is set to one on {other.device}")
        torch.Tensor.data.__set__(self, other)
        self.hidden, self.index = other.hidden, other.index

    # ---- moves, which C++ would make from and to "meta"

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = resolved(device or self.device), dtype or self.dtype
        if (device, dtype) == (self.device, self.dtype) and not copy and memory_format is None:
            return self
        form = {} if memory_format is None else {"memory_format": memory_format}
        return aten._to_copy.default(self, dtype=dtype, device=device, non_blocking=non_blocking, **form)

    def cuda(self, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self, **_: Any) -> torch.Tensor:
        return self.to("cpu")

    # ---- what never reaches the dispatcher

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise RehearsalError("can't convert cuda device type tensor to numpy: use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        waited("tolist")
        return self.hidden.tolist()

    def record_stream(self, _: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        memo[id(self)] = CudaTensor(self.hidden.detach().clone(), self.index).requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, _: Any) -> Any:
        waited("pickle")
        return CudaTensor, (self.hidden.detach().clone(), self.index)


def resolved(device: Any) -> torch.device:
    """The device with its index; "meta" is what C++ takes a `CudaTensor` to be on."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "meta" or (device.type == "cuda" and device.index is None):
        return torch.device("cuda", Device.current)
    return device


def names_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class CudaMode(TorchDispatchMode):
    """Brings operations here that no `CudaTensor` is given to: factories, copies to a device, all of the CPU's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


# ---- generators


class Generator(torch.Generator):
    """A generator of a device: one of the CPU's that says so."""

    devices: ClassVar[dict[int, torch.device]] = {}
    """By the address of the C++ object: the dispatcher hands over another Python object for it."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._device = Generator.devices[self._cdata] = resolved(device)

    @property
    def device(self) -> torch.device:
        return self._device

    def set_state(self, state: torch.Tensor) -> torch.Generator:
        if type(state) is CudaTensor:
            raise RehearsalError("the state of a random number generator must be a torch.ByteTensor on the CPU")
        return super().set_state(state)


GENERATORS: list[Generator] = []
"""Each device's own, of operations that name none."""


# ---- operations

NUMBER_ON_CPU = (
    *("add", "sub", "mul", "div", "pow", "rsub", "eq", "ne", "lt", "gt", "le", "ge", "where", "maximum", "minimum"),
    *("fill", "index_put", "clamp", "lerp", "addcmul", "addcdiv", "_foreach", "_fused", "remainder", "true_divide"),
    *("masked_fill", "floor_divide", "bitwise", "logical", "result_type", "can_cast"),
)
"""Beginnings of operations whose kernels take a CPU tensor of no dimensions as a number."""
ANY_DEVICES = ("is_same_size", "equal_sizes", "set_data", "result_type", "can_cast")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
WAITING = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "equal": "equal",
    "masked_select": "masked_select",
    "bincount": "bincount",
    "multinomial": "multinomial",
    **dict.fromkeys(("_unique", "_unique2", "unique_consecutive", "unique_dim"), "unique"),
}
"""Operations whose CUDA kernels bring a number to the host."""


@functools.cache
def is_view(func: Any) -> bool:
    return func.is_view


@functools.cache
def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@functools.cache
def written_positions(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = func._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Every operation of torch, below autograd."""
    if func.namespace == "c10d":
        from tests.cuda.nccl import collective

        return collective(func, args, kwargs)
    name = func.overloadpacket.__name__
    flat, spec = tree_flatten((args, kwargs))
    on_device = [x for x in flat if type(x) is CudaTensor]
    on_host = [x for x in flat if isinstance(x, torch.Tensor) and type(x) is not CudaTensor]
    device = kwargs.get("device")
    if device is not None:
        is_meta = Device.meta or any(x.is_meta for x in on_host)
        device = torch.device(device) if is_meta else resolved(device)
    if name in ("copy_", "_to_copy"):
        return _copy(func, name, args, kwargs, device)
    if name == "is_pinned":
        return ledger.is_pinned(args[0]) if type(args[0]) is not CudaTensor else False
    to_device = bool(on_device) if device is None else device.type == "cuda"
    if name == "_pin_memory" or kwargs.get("pin_memory"):
        if to_device:
            raise RehearsalError("cannot pin a CUDA tensor: only dense CPU tensors can be pinned")
        return ledger.pin(args[0].clone() if name == "_pin_memory" else func(*args, **kwargs | {"pin_memory": False}))
    if ledger.is_any_on_its_way() and on_host:
        _check_host_memory(func, args, kwargs, on_host)
    _check_generators(name, flat, "cuda" if to_device else "cpu")
    if not on_device and not to_device:
        return func(*args, **kwargs)
    index = _index_of(name, on_device, device)
    _check_mix(name, args, on_device, on_host)
    if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        waited(WAITING.get(name, name))
    if name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        is_fill = len(args) > 2 and args[2].numel() == 1  # torch fills under the mask then
        if not is_fill:
            waited("index with a mask")
    return _on_hidden(func, name, args, kwargs, flat, spec, index, wraps=name != "_local_scalar_dense")


def _on_hidden(func, name, args, kwargs, flat, spec, index, wraps):
    outer: dict[int, CudaTensor] = {}

    def bare(x: Any) -> Any:
        if type(x) is CudaTensor:
            outer[id(x.hidden)] = x
            return x.hidden
        return CPU if isinstance(x, torch.device) else x

    hidden_args, hidden_kwargs = tree_unflatten([bare(x) for x in flat], spec)
    if hidden_kwargs.get("device") is not None:
        hidden_kwargs["device"] = CPU
    with _OwnGenerator(func, hidden_kwargs, index):
        compute = functools.partial(KERNELS[name], func) if name in KERNELS else func
        out = compute(*hidden_args, **hidden_kwargs)
    if not wraps:
        return out
    # what an operation writes to and returns is the same object as before
    return tree_map_only(torch.Tensor, lambda x: outer[id(x)] if id(x) in outer else CudaTensor(x, index), out)


class _OwnGenerator:
    """The device's own generator for an operation that draws and names none: the CPU's default takes its state."""

    def __init__(self, func: Any, kwargs: dict[str, Any], index: int) -> None:
        self._generator = GENERATORS[index] if is_random(func) and kwargs.get("generator") is None else None

    def __enter__(self) -> None:
        if self._generator is not None:
            self._before = torch.default_generator.get_state()
            torch.default_generator.set_state(self._generator.get_state())

    def __exit__(self, *_: Any) -> None:
        if self._generator is not None:
            self._generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(self._before)


def _index_of(name: str, on_device: list[CudaTensor], device: torch.device | None) -> int:
    """The device that computes; there is one of all operands, and it is the current one."""
    return _check_current(name, {x.index for x in on_device} | ({device.index} if device is not None else set()))


def _check_current(name: str, indices: set[int]) -> int:
    if len(indices) > 1:
        raise RehearsalError(f"{name}: expected all tensors to be on the same device, but found cuda:{sorted(indices)}")
    index = indices.pop()
    if index != Device.current:
        raise RehearsalError(f"{name}: a tensor on cuda:{index}, while this process's device is cuda:{Device.current}")
    return index


def _check_mix(name: str, args: Any, on_device: list[CudaTensor], on_host: list[torch.Tensor]) -> None:
    if not on_device or name in ANY_DEVICES:
        return
    for tensor in on_host:
        if tensor.dim() == 0 and name.startswith(NUMBER_ON_CPU):
            continue
        if name in INDEXING and any(tensor is i for i in args[1]):
            copied("index to device")
            waited("index to device")
            continue
        shapes = ", ".join(f"{x.device} {tuple(x.shape)}" for x in (*on_device, *on_host))
        raise RehearsalError(f"{name}: expected all tensors to be on the same device, but found {shapes}")


def _check_generators(name: str, flat: list[Any], wanted: str) -> None:
    for generator in flat:
        if isinstance(generator, torch._C.Generator):
            kind = Generator.devices.get(generator._cdata, CPU).type
            if kind != wanted:
                raise RehearsalError(f"{name}: expected a {wanted!r} device type for generator but found {kind!r}")


def _check_host_memory(func: Any, args: Any, kwargs: dict[str, Any], on_host: list[torch.Tensor]) -> None:
    if is_view(func):
        return
    written = [args[i] if i < len(args) else kwargs.get(key) for i, key in written_positions(func)]
    for tensor in on_host:
        ledger.check_read(tensor)
        if any(tensor is x for x in written):
            ledger.check_written(tensor)


def _copy(func: Any, name: str, args: Any, kwargs: dict[str, Any], device: torch.device | None) -> torch.Tensor:
    """``copy_`` and ``_to_copy``: the operations that may have both devices."""
    if name == "copy_":
        target, source = args[:2]
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        _hidden(target).copy_(_hidden(source))
    else:
        source, kwargs = args[0], dict(kwargs)
        non_blocking, pinned = bool(kwargs.pop("non_blocking", False)), kwargs.pop("pin_memory", None)
        to_device = type(source) is CudaTensor if device is None else device.type == "cuda"
        if device is not None:
            kwargs["device"] = CPU if to_device else device
        target = func(_hidden(source), **kwargs)
        if to_device:
            target = CudaTensor(target, source.index if device is None else device.index)
        elif pinned or (non_blocking and type(source) is CudaTensor):  # torch pins what a copy is not waited for
            ledger.pin(target)
    indices = {x.index for x in (source, target) if type(x) is CudaTensor}
    if indices:
        _check_current(name, indices)
    _transfer(source, target, non_blocking)
    return target


def _hidden(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.hidden if type(tensor) is CudaTensor else tensor


def _transfer(source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
    """What a copy means for the host."""
    leaves_host = type(target) is CudaTensor
    if leaves_host == (type(source) is CudaTensor):
        if not leaves_host:
            ledger.check_read(source)
            ledger.check_written(target)
        return
    memory = source if leaves_host else target
    if leaves_host and not (non_blocking and ledger.is_pinned(source)):  # else the device reads it, in its turn
        ledger.check_read(source)
    kind = f"{'pinned' if ledger.is_pinned(memory) else 'pageable'} {'to' if leaves_host else 'from'} device"
    copied(kind)
    if not non_blocking:
        waited(f"copy {kind}")
    elif not leaves_host:
        ledger.will_arrive(target)
    elif ledger.is_pinned(source):
        ledger.will_leave(source)


# ---- patches of torch


def patch_tensors() -> None:
    """Python's side of torch where it would ask the driver, or read host memory past the dispatcher."""
    tensor: Any = torch.Tensor
    own_to = tensor.to

    def with_index(value: Any) -> Any:
        return resolved(value) if names_cuda(value) or type(value) is int else value

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and type(args[0]) is CudaTensor:
            args = (args[0].device, args[0].dtype, *args[1:])
        if "device" in kwargs:
            kwargs["device"] = with_index(kwargs["device"])
        return own_to(self, *map(with_index, args[:1]), *args[1:], **kwargs)

    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        return own_to(self, resolved("cuda" if device is None else device), non_blocking=non_blocking)

    tensor.to, tensor.cuda = to, cuda
    for name in ("numpy", "tolist", "__reduce_ex__"):
        setattr(tensor, name, _after_check(getattr(tensor, name)))
    device_context._device_constructors()  # the table of factories of `with torch.device(...)`, before they are wrapped
    for name in ("tensor", "as_tensor", "scalar_tensor"):
        setattr(torch, name, _constructor(getattr(torch, name), with_index))
    torch.empty = _asking(torch.empty, lambda *_, **given: str(given.get("device")) == "meta")
    context: Any = device_context.DeviceContext  # of `with torch.device("meta")`
    context.__torch_function__ = _asking(context.__torch_function__, lambda self, *_, **__: self.device.type == "meta")
    # `torch.tensor(..., device="cuda")` makes a CPU tensor and copies it, as a dispatch and not within C++
    torch._C._set_only_lift_cpu_tensors(True)
    torch.Generator = Generator
    # inference tensors have no version counter, which a wrapper needs
    torch.inference_mode = lambda mode=True: torch.no_grad()
    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = _attention(functional.scaled_dot_product_attention)
    # one launch for many tensors, as for CUDA: torch asks for their types
    optimizer._foreach_supported_types.append(CudaTensor)
    clip_grad._has_foreach_support = lambda *_: True


def _after_check(own: Any) -> Any:
    def function(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        ledger.check_read(self)
        return own(self, *args, **kwargs)

    return function


def _constructor(own: Any, with_index: Any) -> Any:
    def function(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = with_index(kwargs["device"])
        if args and isinstance(args[0], list | tuple):
            args = (_numbers(args[0]), *args[1:])
        out = own(*args, **kwargs)
        return out.pin_memory() if pin_memory else out

    return function


def _attention(own: Any) -> Any:
    """C++ would take attention on "meta" apart; a GPU has one kernel, and so has the CPU."""
    flash = aten._scaled_dot_product_flash_attention_for_cpu

    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> torch.Tensor:
        if isinstance(attn_mask, CausalBias):  # asks whether torch calls it for `own`
            return attn_mask._dispatch(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if type(query) is not CudaTensor or attn_mask is not None:
            return own(query, key, value, attn_mask, dropout_p, is_causal, **more)
        return flash(query, key, value, dropout_p, is_causal, scale=more.get("scale"))[0]

    return scaled_dot_product_attention


def _numbers(value: Any) -> Any:
    """A list given to ``torch.tensor``: C++ reads numbers out of tensors one by one, and waits for each."""
    if type(value) in (list, tuple):
        return type(value)(map(_numbers, value))
    return value.item() if type(value) is CudaTensor else value


def _asking(own: Any, for_meta: Callable[..., bool]) -> Any:
    """``own``, and for the time of a call `Device.meta`."""

    def function(*args: Any, **kwargs: Any) -> Any:
        before, Device.meta = Device.meta, for_meta(*args, **kwargs)
        try:
            return own(*args, **kwargs)
        finally:
            Device.meta = before

    return function


def patch_modules() -> None:
    """A parameter that is moved from the CPU to a GPU stays the same object, with its attributes; here that takes
    ``swap_tensors``, which swaps the attributes as well."""
    module: Any = torch.nn.Module
    own, future = module._apply, torch.__future__

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = future.get_swap_module_params_on_conversion()
        attributes = [(p, dict(p.__dict__)) for p in self._parameters.values() if p is not None]
        is_on_host = any(type(p) is torch.nn.Parameter for p, _ in attributes)
        future.set_swap_module_params_on_conversion(is_on_host)
        try:
            return own(self, *args, **kwargs)
        finally:
            future.set_swap_module_params_on_conversion(before)
            for parameter, own_ones in attributes:
                parameter.__dict__.update({k: v for k, v in own_ones.items() if k not in ("hidden", "index")})

    module._apply = _apply


def patch_threads() -> None:
    """Modes are a thread's own."""
    own = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with CudaMode():
            own(self)

    threading.Thread.run = run
