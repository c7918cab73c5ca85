"""Counts what a process really sends point to point, below Megatron."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

MESSAGES = "messages"


@contextlib.contextmanager
def recorded_sends() -> Iterator[Counter[str]]:
    """Bytes that this rank sends, whatever they are, by the receiving rank; under ``MESSAGES`` how many messages.

    ``isend`` and batched sends on gloo both end in the process group's ``send``, which is what is counted.
    """
    sent: Counter[str] = Counter()
    send = dist.ProcessGroup.send

    def record(group: Any, tensors: list[Tensor], to: int, tag: int) -> Any:
        sent[str(dist.get_process_group_ranks(group)[to])] += sum(t.numel() * t.element_size() for t in tensors)
        sent[MESSAGES] += 1
        return send(group, tensors, to, tag)

    with mock.patch.object(dist.ProcessGroup, "send", record):
        yield sent


def sent_between_stages(sent: Counter[str], stages: list[int]) -> dict[str, Any] | None:
    """On rank 0, of one pipeline: bytes from every stage to every other ("0>1"), and the messages of all together.

    Args:
        sent: of this rank; every rank of the world calls this.
        stages: the pipeline's ranks in order.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(sent, gathered if dist.get_rank() == 0 else None)
    if dist.get_rank() > 0:
        return None
    between = {
        f"{i}>{j}": gathered[rank][str(other)] for i, rank in enumerate(stages) for j, other in enumerate(stages)
    }
    return {
        "bytes": {edge: size for edge, size in between.items() if size},
        "messages": sum(gathered[rank][MESSAGES] for rank in stages),
    }
