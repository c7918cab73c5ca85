"""The rehearsal itself, in the process that has entered it. Each check says what to look at if torch has changed."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda.rehearsal import COPIES, FAULTS, CudaTensor, RehearsalError, counted
from tests.cuda.tensors import CudaMode


@contextlib.contextmanager
def objects(pattern: str) -> Iterator[None]:
    """The rehearsal raises within."""
    with pytest.raises(RehearsalError, match=pattern) as raised:
        yield
    FAULTS.remove(str(raised.value))


def kinds(function: Callable[[], Any]) -> set[str]:
    """What ``function`` makes the host wait for."""
    with counted() as counts:
        function()
    return {kind for kind, _ in counts.syncs}


def on_gpu(*shape: int, **options: Any) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel()), **options).view(shape).to("cuda")


def autograd() -> None:
    """`Tensor._make_wrapper_subclass` for "meta": the engine's queue of that device must be the calling thread's."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    expected = torch.autograd.grad(model(x).square().sum(), model.weight)[0]
    moved = copy.deepcopy(model).to("cuda")
    moved(x.cuda()).square().sum().backward()
    assert type(moved.weight.grad) is CudaTensor and moved.weight.grad.device == torch.device("cuda", 0)
    assert torch.equal(moved.weight.grad.cpu(), expected)


def modules() -> None:
    """`Module._apply` with `swap_tensors`, and `Tensor.data`: a parameter stays the same object with its attributes."""
    model = nn.Linear(4, 3)
    parameter = model.weight
    parameter.mark, tied = 1, nn.Linear(4, 3)
    tied.weight = parameter
    nn.ModuleList([model, tied]).to("cuda").bfloat16()
    assert model.weight is tied.weight is parameter and isinstance(parameter, nn.Parameter)
    assert (parameter.mark, parameter.is_cuda, parameter.dtype) == (1, True, torch.bfloat16)
    buffer = torch.zeros(12, device="cuda", dtype=torch.bfloat16)
    parameter.data = buffer.view(3, 4)
    buffer.fill_(2)
    assert parameter.cpu().sum() == 24
    with objects(".data of a CUDA tensor"):
        parameter.data = torch.zeros(3, 4)


def optimizers() -> None:
    """Private lists of torch's optimizers and norms: one launch for all tensors of a `CudaTensor`'s type."""
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **kwargs or {})

    for fused in (True, None):
        parameters = [nn.Parameter(on_gpu(3)), nn.Parameter(on_gpu(2, 2))]
        adam = torch.optim.AdamW(parameters, fused=fused)
        for each in parameters:
            each.grad = torch.ones_like(each)
        with Seen():
            adam.step()
            get_total_norm([each.grad for each in parameters])
    wanted = {"aten._fused_adamw_.default", "aten._foreach_lerp_.Scalar", "aten._foreach_norm.Scalar"}
    assert wanted <= set(seen), sorted(seen)


def attention() -> None:
    """`functional.scaled_dot_product_attention`: one operation with an autograd formula, grouped heads included."""
    q, k, v = (torch.randn(1, heads, 8, 4).requires_grad_() for heads in (4, 2, 2))
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rehearsed = functional.scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda(), is_causal=True, enable_gqa=True)
    assert torch.equal(rehearsed.cpu(), expected)
    grads = [torch.autograd.grad(out.sum(), v)[0] for out in (expected, rehearsed)]
    assert torch.equal(*grads)


def generators() -> None:
    """`Generator._cdata`, by which the dispatcher's object is known, and the tag `nondeterministic_seeded`."""
    generator = torch.Generator("cuda").manual_seed(1)
    drawn = torch.empty(3, device="cuda").normal_(generator=generator)
    assert torch.equal(drawn.cpu(), torch.empty(3).normal_(generator=torch.Generator().manual_seed(1)))
    for device, other in (("cuda", torch.Generator()), ("cpu", generator)):
        with objects("device type for generator"):
            torch.empty(3, device=device).normal_(generator=other)
    torch.manual_seed(0)
    of_cpu, of_gpu = torch.get_rng_state(), torch.cuda.get_rng_state()
    functional.dropout(torch.rand(3, device="cuda"))
    assert torch.equal(torch.get_rng_state(), of_cpu) and not torch.equal(torch.cuda.get_rng_state(), of_gpu)
    with objects("ByteTensor"):
        torch.cuda.set_rng_state(of_gpu.cuda())


def devices() -> None:
    """`torch.utils._device.DeviceContext` and ``torch.empty``: "meta" from C++ is a GPU, from Python it is meta."""
    x = on_gpu(2)
    with torch.device("meta"):
        assert torch.ones(2).device.type == "meta"
    assert torch.empty(2, device="meta").device.type == "meta"
    made = torch.zeros_like(x), x.new_ones(2), x[:1], torch.ones(2, device="cuda"), torch.tensor([1], device="cuda")
    assert {str(each.device) for each in made} == {"cuda:0"}
    with objects("same device"):
        x + torch.ones(2)
    assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.tensor([1.0, 2.0]))  # a number
    with objects("while this process's device"), torch.cuda.device(1):
        x + 1
    with objects("to numpy"):
        x.numpy()
    with objects("cannot pin"):
        x.pin_memory()


def threads() -> None:
    """`threading.Thread.run`: dispatch modes are a thread's own, and so is the current device, which begins with 0."""
    found: list[Any] = []
    torch.cuda.set_device(1)
    thread = threading.Thread(target=lambda: found.append(torch.ones(1, device="cuda").device))
    thread.start()
    thread.join()
    assert (torch.cuda.current_device(), found) == (1, [torch.device("cuda", 0)])
    torch.cuda.set_device(0)


def waits() -> None:
    """`tensors.WAITING` and the schemas of these operations; `_set_only_lift_cpu_tensors` for ``torch.tensor``."""
    x = on_gpu(4)
    assert kinds(lambda: (x + 1, x.sum(), x.view(2, 2).t().contiguous(), torch.full((), 2, device="cuda"))) == set()
    assert kinds(x[0].item) == kinds(lambda: bool(x[0])) == kinds(lambda: float(x[0])) == {"item"}
    assert kinds(lambda: x[x > 1]) == {"index with a mask"}
    assert kinds(x.tolist) == {"tolist"} and kinds(x.nonzero) == {"nonzero"}
    assert kinds(x.cpu) == {"copy pageable from device"}
    assert kinds(lambda: torch.tensor(3, device="cuda")) == {"copy pageable to device"}
    assert kinds(lambda: torch.ones(2).cuda(non_blocking=True)) == set()
    assert kinds(lambda: x[torch.tensor([1])]) == {"index to device"}
    assert kinds(torch.cuda.synchronize) == {"torch.cuda.synchronize"}


def host_memory() -> None:
    """``is_pinned`` and ``_pin_memory`` reach dispatch; ``numpy``, ``tolist`` and pickling of CPU tensors do not."""
    x, pinned = on_gpu(4), torch.zeros(4, pin_memory=True)
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not torch.zeros(4).is_pinned()
    for target in (pinned, torch.zeros(4)):
        for read in (
            lambda t: t + 1,
            lambda t: t[1:].clone(),
            lambda t: t.numpy(),
            lambda t: t.tolist(),
            copy.deepcopy,
        ):
            target.copy_(x, non_blocking=True)
            with objects("nobody has waited for the copy into it"):
                read(target)
        torch.cuda.synchronize()
        assert target.tolist() == [0, 1, 2, 3]
    pinned.to("cuda", non_blocking=True)
    with objects("nobody has waited for the copy out of it"):
        pinned.add_(1)
    torch.cuda.current_stream().synchronize()
    pinned.add_(1)
    before = COPIES.total()
    x.cpu()
    assert COPIES.total() == before + 1


def collectives() -> None:
    """`distributed_c10d.ProcessGroupNCCL` and its options; `ScriptObject._type` of a group; ``_get_backend``."""
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        gloo, x, everyone = dist.new_group(backend="gloo"), on_gpu(2, 3), torch.empty(6, device="cuda")
        dist.all_reduce(x)
        dist.all_gather_into_tensor(everyone, x.view(-1))
        assert torch.equal(everyone.cpu(), x.cpu().view(-1))
        assert kinds(dist.barrier) == {"barrier"} and dist.get_backend() == "nccl"
        objects_of_all: list[Any] = [None]
        dist.all_gather_object(objects_of_all, {"a": 1})
        assert objects_of_all == [{"a": 1}]
        for wrong, said in (
            (torch.ones(2), "NCCL group is given"),
            (x.t(), "must be contiguous"),
            (torch.ones(2, dtype=torch.int16, device="cuda"), "unsupported data type torch.int16"),
        ):
            with objects(said):
                dist.all_reduce(wrong)
        with objects("given to a gloo group"):
            dist.all_reduce(x, group=gloo)
        dist.all_reduce(torch.ones(2), group=gloo)
    finally:
        dist.destroy_process_group()


def modes() -> None:
    """`TorchDispatchMode` sees factories; without the mode there is no GPU to make a tensor on."""
    assert CudaMode.__torch_dispatch__ and torch.inference_mode is not torch.no_grad
    with torch.inference_mode():
        x = torch.ones(2, device="cuda") * 2
    x.add_(1)
    assert x.cpu().tolist() == [3, 3]


CHECKS = (
    *(autograd, modules, optimizers, attention, generators, devices, threads, waits, host_memory, collectives, modes),
)
