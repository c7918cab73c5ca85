"""What the rehearsal counts, in the process that has entered it; what it stops at: planted.py. Each check says what to
look at if torch has changed."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.cuda.rehearsal import COPIES, FAULTS, RehearsalError, counted


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


CHECKS = threads, waits, host_memory
