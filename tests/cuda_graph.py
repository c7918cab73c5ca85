"""A CUDA graph on the CPU: the operations of a piece of Python, recorded once and run again without the Python.

As a graph on a GPU it holds operations and the addresses that they read and write: what is copied to the same place
before a replay is computed with, and what only Python did is not done again. What a GPU cannot capture is named by the
line that does it: a look at a number, an upload, a generator that is moved by hand. Not seen: on which device a tensor
would be, streams, memory that is reused, kernels that are no operation of torch.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_depthattn.parallel.schedule import run_schedule
from megatron_depthattn.train import step
from megatron_depthattn.train.build import Chunks, Fp8State

WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
"""Operations for whose result the host waits."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
GENERATORS = {
    f"_{way}_cuda_rng_state in megatron/core/tensor_parallel/random.py:_{way}_all_rng_states" for way in ("get", "set")
}
"""Recomputation moves the generator by hand, though nothing here draws from it."""
PERSISTENT = {
    "megatron/core/models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_bshd",  # kept by `lru_cache`
    "megatron/core/optimizer/optimizer.py:scale_loss",
}

_OWN = re.compile("/(megatron|megatron_depthattn|transformer_engine|tests)/")


class Region(NamedTuple):
    """A tensor as a graph knows it."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    place: tuple[int, tuple[int, ...], tuple[int, ...]]

    def tensor(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(self.storage, *self.place)


class Operation(NamedTuple):
    """One that does something on a device."""

    function: Any
    leaves: list[Any]
    spec: Any
    fresh: list[Region | None]
    """Where its results go, None: in place."""

    @property
    def name(self) -> str:
        return str(self.function)

    def regions(self) -> list[Region]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Region)]


class Graph(TorchDispatchMode):
    """What was done inside `capture`; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.stops: Counter[str] = Counter()
        """What a GPU would not capture: what it is and the line that does it, with how often."""
        self.reads: dict[int, tuple[Region, str]] = {}
        """What was there before and is read or written, by address, with the first line that does so."""
        self._known: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out twice
        self._on_host: set[int] = set()

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        def by_hand(*_: Any, graph_safe: bool = False, **__: Any) -> bool:
            return not graph_safe

        watched = (
            (torch.cuda, "synchronize", lambda *_: True),
            (torch, "get_rng_state", lambda: False),
            (torch, "tensor", lambda *_, device=None, **__: str(device).startswith("cuda")),
            (megatron_random, "_get_cuda_rng_state", by_hand),
            (megatron_random, "_set_cuda_rng_state", by_hand),
        )
        with contextlib.ExitStack() as stack:
            for owner, name, stops in watched:
                stack.enter_context(patch.object(owner, name, self._watched(name, getattr(owner, name), stops)))
            wait = dist.Work.wait

            def unrecorded(work: dist.Work, *args: Any) -> bool:
                with _disable_current_modes():  # where gloo has results to copy
                    return wait(work, *args)

            stack.enter_context(patch.object(dist.Work, "wait", unrecorded))
            stack.enter_context(self)
            yield

    def _watched(self, name: str, own: Callable[..., Any], stops: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if stops(*args, **kwargs):
                self.stops[f"{name} in {_line()}"] += 1
            result = own(*args, **kwargs)
            if name in ("tensor", "get_rng_state") and kwargs.get("device") is None:  # for the host's own use
                self._on_host.add(_address(result))
                self.reads.pop(_address(result), None)
            return result

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Tensor) and kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # the operations of which a subclass consists come here one by one
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        given = {_address(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()}
        name = func._schema.name.split("::")[1]
        if name in WAITS and not given.keys() <= self._on_host:
            self.stops[f"{name.strip('_')} in {_line()}"] += 1
        for address, tensor in given.items():
            if address not in self._known and address not in self._on_host:
                self.reads[address] = _region(tensor), _line()
            self._known[address] = tensor.untyped_storage()
        result = func(*args, **(kwargs or {}))
        fresh = [None if _address(x) in given else _region(x) for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._known |= {region.storage.data_ptr(): region.storage for region in fresh if region}
        if given and given.keys() <= self._on_host:
            self._on_host |= {region.storage.data_ptr() for region in fresh if region}
        is_view = func.namespace == "aten" and not func._schema.is_mutable and not any(fresh)
        if not is_view and name not in ALLOCATIONS:
            self.operations.append(Operation(func, tree_map_only(Tensor, _region, leaves), spec, fresh))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again: what lies in the memory that the graph reads has changed, or not."""
        under_way: dict[int, Any] = {}
        for operation in self.operations:
            touched = {region.storage.data_ptr() for region in operation.regions()}
            for work in [under_way.pop(address) for address in touched & under_way.keys()]:
                work.wait()
            args, kwargs = torch.utils._pytree.tree_unflatten(
                [leaf.tensor() if isinstance(leaf, Region) else leaf for leaf in operation.leaves], operation.spec
            )
            results = tree_leaves(operation.function(*args, **kwargs))
            made = [result for result in results if isinstance(result, Tensor)]
            for tensor, region in zip(made, operation.fresh, strict=True):
                if region:
                    region.tensor().copy_(tensor)
            if operation.function.namespace == "c10d":
                under_way |= dict.fromkeys(touched, dist.distributed_c10d.Work.unbox(results[-1]))
        for work in under_way.values():
            work.wait()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _region(tensor: Tensor) -> Region:
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return Region(tensor.untyped_storage(), tensor.dtype, place)


def _line() -> str:
    """The innermost function of Megatron, TransformerEngine or this repository."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or not _OWN.search(frame.f_code.co_filename)):
        frame = frame.f_back
    path = frame.f_code.co_filename.split("site-packages/")[-1].split("/te/")[-1]
    return f"{path.split('/megatron_depthattn/')[-1]}:{frame.f_code.co_name}"


class CapturedStep:
    """Forward and backward over a global batch as one graph, in the place of `step._losses`."""

    def __init__(
        self, chunks: Chunks, like: Sequence[step.Microbatch], shape: tuple[int, int], graph: Any = None
    ) -> None:
        """``like``: microbatches of the shapes that replays are given; the weights' gradients are zero and change."""
        self._inputs = [{name: tensor.clone() for name, tensor in one.items()} for one in like]
        self.graph = graph or Graph()
        self._chunks = chunks
        with Fp8State(chunks).untouched(), self.graph.capture():  # a GPU records and does not compute
            self._reported = run_schedule(
                step.forward_step,
                self._inputs,
                chunks,
                micro_batch_size=shape[0],
                sequence_length=shape[1],
                forward_only=False,
            )

    def reads(self) -> set[str]:
        """Lines that read what is neither weight, gradient nor input: it must stay where it is."""
        own: list[Tensor] = [tensor for one in self._inputs for tensor in one.values()]
        for chunk in self._chunks:
            own += [*chunk.parameters(), *(buffer.grad_data for buffer in chunk.buffers)]
        addresses = {_address(tensor) for tensor in own}
        return {line for address, (_, line) in self.graph.reads.items() if address not in addresses}

    def replay(self, microbatches: Sequence[step.Microbatch]) -> list[step.LossSum]:
        for mine, given in zip(self._inputs, microbatches, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(given[name])
        self.graph.replay()
        return self._reported


def train(
    chunks: Chunks,
    optimizer: Any,
    batches: Iterable[Sequence[step.Microbatch]],
    shape: tuple[int, int],
    fp8: Fp8State | None = None,
    graph: Any = None,
) -> tuple[list[step.StepResult], CapturedStep]:
    """Training steps of which all but the first are replays of a graph that is captured after it."""
    first, *others = batches
    results = [step.train_step(chunks, optimizer, first, shape, fp8)]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    captured = CapturedStep(chunks, first, shape, graph)

    def replayed(_: Chunks, batch: Sequence[step.Microbatch], __: Any, forward_only: bool) -> list[step.LossSum]:
        assert not forward_only
        return captured.replay(batch)

    with patch.object(step, "_losses", replayed):
        results += [step.train_step(chunks, optimizer, batch, shape, fp8) for batch in others]
    return results, captured
