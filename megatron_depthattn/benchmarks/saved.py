"""What autograd keeps for backward: the tensors that a forward pass saves, and the storages behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_depthattn.parallel.microbatch_state import MicrobatchState


class SavedTensors:
    """What was saved within `saved_tensors`, without the parameters of the model.

    Only what goes through autograd or a micro-batch's state is seen: not what a module or a closure holds on to (on a
    GPU the allocator reports that too), and of what is recomputed only the inputs of the recomputation.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._tensors: list[Tensor] = []  # holds them, so that no address is used twice

    def add(self, tensor: Tensor) -> None:
        """Something that is kept beside autograd."""
        self._tensors.append(tensor)

    @property
    def tensors(self) -> list[Tensor]:
        """Each one once, however often it was saved."""
        distinct = {
            (t.data_ptr(), t.dtype, tuple(t.shape), t.stride()): t
            for t in self._tensors
            if t.untyped_storage().data_ptr() not in self._own
        }
        return list(distinct.values())

    @property
    def kinds(self) -> Counter[tuple[torch.dtype, tuple[int, ...]]]:
        """How many distinct tensors of each dtype and shape."""
        return Counter((t.dtype, tuple(t.shape)) for t in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct storages: a saved view keeps all of what it is a view of."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(storages.values())


@contextmanager
def saved_tensors(model: torch.nn.Module, state: MicrobatchState) -> Iterator[SavedTensors]:
    """Record what is saved for backward inside the block, and what is left in ``state`` at its end."""
    saved = SavedTensors(model)

    def pack(tensor: Tensor) -> Tensor:
        alone = tensor.detach()  # with its graph, an operation's output would keep that alive for ever
        saved._tensors.append(alone)
        return alone

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    saved._tensors += state.tensors()
