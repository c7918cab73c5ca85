"""What the ranks of a world give to their groups, in which order, and where that is not the same on all ranks.

NCCL matches the operations of a communicator by their order and compares neither kind nor size: where ranks differ it
hangs, or writes what was never sent. gloo lets some of that pass, with wrong numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda.ledger import lines

ONE_SIDED = {"gather_": -1, "scatter_": 0}
"""Where among an operation's tensors the one is that all ranks give; the root gives a list as well."""


class Message(NamedTuple):
    """One operation of one rank on one group."""

    group: str
    """Its name, the same on all its ranks."""
    rank: int
    """Of this process in the group."""
    size: int
    """Of the group."""
    operation: str
    root: int
    """The root, or the other end of what goes from one rank to one; else -1."""
    tensors: str
    """Their types and shapes."""
    where: str
    """The lines that asked for it."""


class Recorder(TorchDispatchMode):
    """Notes what this process gives to its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.overloadpacket.__name__, tree_leaves((args, kwargs)))
        return func(*args, **kwargs or {})

    def _note(self, operation: str, leaves: list[Any]) -> None:
        (boxed,) = (x for x in leaves if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        group = dist.ProcessGroup.unbox(boxed)
        # What hides another tensor does not notice when that one is resized.
        tensors = [getattr(x, "hidden", x) for x in leaves if isinstance(x, torch.Tensor)]
        tensors = [f"{str(x.dtype)[6:]}{list(x.shape)}" for x in tensors]
        if operation in ONE_SIDED:
            tensors = [tensors[ONE_SIDED[operation]]]
        has_root = operation in ("send", "recv_", "broadcast_", *ONE_SIDED)
        root = next(x for x in leaves if type(x) is int) if has_root else -1
        place = group.group_name, group.rank(), group.size()
        self.messages.append(Message(*place, operation, root, " ".join(tensors), " < ".join(lines(3))))


def differences(messages: Iterable[Message]) -> list[str]:
    """Of each group the first operation that is not the same on all of its ranks, and of each pair of its ranks."""
    streams: dict[str, dict[int, list[tuple[str, str]]]] = defaultdict(dict)
    for one in messages:
        ends: Sequence[int] = range(one.size)
        what, said = f"group {one.group}", f"{one.operation} {one.root} {one.tensors}"
        if one.operation in ("send", "recv_"):
            ends = (one.rank, one.root) if one.operation == "send" else (one.root, one.rank)
            what, said = f"{what} from {ends[0]} to {ends[1]}", one.tensors
        for rank in ends:
            streams[what].setdefault(rank, [])
        streams[what][one.rank].append((said, one.where))
    found = []
    for what, ranks in streams.items():
        for number, now in enumerate(zip_longest(*ranks.values(), fillvalue=("nothing", ""))):
            if len({said for said, _ in now}) > 1:
                ranks_said = (f"rank {rank}: {said} ({where})" for rank, (said, where) in zip(ranks, now, strict=True))
                found.append(f"{what}, operation {number}: {'; '.join(ranks_said)}")
                break
    return found
