"""One exchange between all ranks through the store in which they found each other.

The store needs no backend and no equal versions, and unlike a collective it can say who is missing. Rank 0 collects
and answers; the others send and wait for its answer.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_depthattn.parallel.patience import WaitedInVain, within
from megatron_depthattn.parallel.rank_spans import rank_spans

Message = dict[str, Any]
Take = Callable[[], Message]
Compare = Callable[[list[Message]], Message]
_MARGIN = 10.0
"""Seconds that the others wait longer than rank 0, so that they learn from it who is missing."""
_MAX_NAMED = 16


def gather(store: dist.Store, rank: int, world_size: int, timeout: float, take: Take, compare: Compare) -> Message:
    """What ``compare`` makes, on rank 0, of the messages that ``take`` makes on each rank, in the order of ranks.

    Raises:
        TimeoutError: on all ranks that are there; names those that have sent nothing for ``timeout`` seconds.
    """
    store, others = dist.PrefixStore("preflight", store), range(1, world_size)
    from_others = f"{rank_spans(others)} of {world_size}" if world_size > 1 else "its own folders"
    whom = "rank 0, through the store of the world" if rank else from_others

    def call() -> Message:
        return _send(store, rank, timeout, take) if rank else _collect(store, others, timeout, take, compare)

    try:
        return within(2 * timeout + 2 * _MARGIN, f"preflight: rank {rank}", lambda: whom, call)
    except WaitedInVain as error:
        raise TimeoutError(
            f"{error}: the process that keeps the store (torchrun on its host, or rank 0) is stopped, its host is "
            "gone, or a file system hangs on rank 0. Look there first."
        ) from error


def _send(store: dist.Store, rank: int, timeout: float, take: Callable[[], Message]) -> Message:
    """On the other ranks."""
    store.set(f"joined/{rank}", f"{socket.gethostname()}, pid {os.getpid()}")
    store.set(f"report/{rank}", json.dumps(take()))
    if not _wait(store, ["answer"], timeout + _MARGIN):
        raise TimeoutError(
            f"preflight: rank 0 has not answered for {timeout + _MARGIN:g} s: it has not started, is stopped, or a "
            "file system hangs where it runs. Look there first; where imports take longer set preflight.timeout higher."
        )
    answer: Message = json.loads(store.get("answer"))
    store.set(f"read/{rank}", "")
    if "missing" in answer:
        raise TimeoutError(answer["missing"])
    return answer


def _collect(store: dist.Store, others: Sequence[int], timeout: float, take: Take, compare: Compare) -> Message:
    """On rank 0."""
    mine = take()
    reports = [f"report/{rank}" for rank in others]
    missing = [] if _wait(store, reports, timeout) else [n for n in others if not store.check([f"report/{n}"])]
    if missing:
        named = "; ".join(f"rank {rank}{_state(store, rank)}" for rank in missing[:_MAX_NAMED])
        more = f"; and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        text = f"preflight: no report for {timeout:g} s, in a world of {len(others) + 1}, of {named}{more}. "
        answer = {"missing": text + "Look there first; where imports or disks are slow set preflight.timeout higher."}
    else:
        answer = compare([mine, *(json.loads(store.get(key)) for key in reports)])
    store.set("answer", json.dumps(answer))
    # where this process keeps the store, they need it until they have read
    _wait(store, [f"read/{rank}" for rank in others if rank not in missing], 5.0)
    if missing:
        raise TimeoutError(answer["missing"])
    return answer


def _state(store: dist.Store, rank: int) -> str:
    if not store.check([f"joined/{rank}"]):
        return ", which has not joined: it has not started, still imports, or is stopped"
    return f" ({store.get(f'joined/{rank}').decode()}), which has joined: most likely a file system hangs there"


def _wait(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are there within so many seconds."""
    try:
        if keys:
            store.wait(keys, timedelta(seconds=seconds))
    except dist.DistNetworkError:
        raise
    except dist.DistStoreError:
        return False
    return True
