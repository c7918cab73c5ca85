"""One exchange between all ranks through the store in which they found each other.

The store needs no backend and no equal versions, and unlike a collective it can say who is missing. Rank 0 collects
and answers; the others send and wait for its answer.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from megatron_depthattn.parallel.patience import WaitedInVain, within
from megatron_depthattn.parallel.rank_spans import rank_spans

Message = dict[str, Any]
_MARGIN = 10.0
"""Seconds that the others wait longer than rank 0, so that they learn from it who is missing."""
_MAX_NAMED = 16


def gather(
    store: dist.Store,
    rank: int,
    world_size: int,
    timeout: float,
    take: Callable[[], Message],
    compare: Callable[[list[Message]], Message],
) -> Message:
    """What ``compare`` makes, on rank 0, of the messages that ``take`` makes on each rank, in the order of ranks.

    Raises:
        TimeoutError: on all ranks that are there; names those that have sent nothing for ``timeout`` seconds.
    """
    exchange = _Exchange(store, rank, world_size, timeout)
    others = f"{rank_spans(range(1, world_size))} of {world_size}" if world_size > 1 else "its own folders"
    whom = "rank 0, through the store of the world" if rank else others
    call = exchange.answer if rank else exchange.ask
    try:
        return within(2 * timeout + 2 * _MARGIN, f"preflight: rank {rank}", lambda: whom, lambda: call(take, compare))
    except WaitedInVain as error:
        raise TimeoutError(
            f"{error}: the process that keeps the store (torchrun on its host, or rank 0) is stopped, its host is "
            "gone, or a file system hangs on rank 0. Look there first."
        ) from error


class _Exchange:
    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self._store = dist.PrefixStore("preflight", store)
        self._rank, self._others, self._timeout = rank, range(1, world_size), timeout

    def answer(self, take: Callable[[], Message], _: object) -> Message:
        """On the other ranks."""
        hello = {"host": socket.gethostname(), "pid": os.getpid()}
        self._store.set(f"joined/{self._rank}", json.dumps(hello))
        self._store.set(f"report/{self._rank}", json.dumps(take()))
        if not self._wait(["answer"], self._timeout + _MARGIN):
            raise TimeoutError(
                f"preflight: rank 0 has not answered for {self._timeout + _MARGIN:g} s: it has not started, is "
                "stopped, or a file system hangs where it runs. Look there first; where imports take longer set "
                "preflight.timeout higher."
            )
        answer: Message = json.loads(self._store.get("answer"))
        self._store.set(f"read/{self._rank}", "")
        if "missing" in answer:
            raise TimeoutError(answer["missing"])
        return answer

    def ask(self, take: Callable[[], Message], compare: Callable[[list[Message]], Message]) -> Message:
        """On rank 0."""
        mine = take()
        reports = [f"report/{rank}" for rank in self._others]
        if not self._wait(reports, self._timeout):
            text = self._missing([rank for rank in self._others if not self._store.check([f"report/{rank}"])])
            self._store.set("answer", json.dumps({"missing": text}))
            self._wait_until_read([rank for rank in self._others if self._store.check([f"report/{rank}"])])
            raise TimeoutError(text)
        answer = compare([mine, *(json.loads(self._store.get(key)) for key in reports)])
        self._store.set("answer", json.dumps(answer))
        self._wait_until_read(self._others)  # where this process keeps the store, they need it until then
        return answer

    def _missing(self, ranks: list[int]) -> str:
        named = "; ".join(f"rank {rank}{self._state(rank)}" for rank in ranks[:_MAX_NAMED])
        more = f"; and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
        return (
            f"preflight: no report for {self._timeout:g} s, in a world of {len(self._others) + 1}, of {named}{more}. "
            "Look there first; where imports or disks are slow set preflight.timeout higher."
        )

    def _state(self, rank: int) -> str:
        if not self._store.check([f"joined/{rank}"]):
            return ", which has not joined: it has not started, still imports, or is stopped"
        hello = json.loads(self._store.get(f"joined/{rank}"))
        state = ""
        if hello["host"] == socket.gethostname():
            with suppress(psutil.Error):
                state = f", {psutil.Process(hello['pid']).status()}"
        return f" ({hello['host']}, pid {hello['pid']}{state}), which has joined: most likely a file system hangs there"

    def _wait_until_read(self, ranks: range | list[int]) -> None:
        self._wait([f"read/{rank}" for rank in ranks], 5.0)

    def _wait(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are there within so many seconds."""
        try:
            if keys:
                self._store.wait(keys, timedelta(seconds=seconds))
        except dist.DistNetworkError:
            raise
        except dist.DistStoreError:
            return False
        return True
