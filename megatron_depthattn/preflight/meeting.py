"""The ranks of one start, talking through the store in which they found each other.

The store needs no backend, no equal versions and no working links, and it can say who is silent, which a collective
cannot. Rank 0 collects and answers; the others send and wait for its answer.

A store may outlive the processes of a start that torchrun repeats, with everything they wrote. So each rank greets
with a name of its own, rank 0 answers this name with the name of the start, and only who uses that has arrived.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

from megatron_depthattn.parallel.patience import WaitedInVain, within
from megatron_depthattn.parallel.rank_spans import rank_spans

Message = dict[str, Any]
T = TypeVar("T")
_MARGIN = 10.0
"""Seconds that the others wait longer than rank 0, so that they hear from it who is silent."""
_MAX_NAMED = 16


class Meeting:
    """Gathers all ranks; construct it on all of them.

    Args:
        store: the store of the world.
        rank, world_size: this process's place.
        timeout: seconds that a rank may stay silent.

    Raises:
        TimeoutError: on all ranks that are there; names the silent ones.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._greetings: dict[int, Message] = {}
        root = dist.PrefixStore("preflight", store)
        self.name = uuid.uuid4().hex
        self._silent = list(range(1, world_size))  # on rank 0: for whom it waits
        self.store = dist.PrefixStore(self.name, root)
        self._bounded("join", lambda: self._join(root))
        self.clock_offset, self.clock_error = self._bounded("clock", self._compare_clocks)

    def exchange(self, stage: str, mine: Message, judge: Callable[[list[Message]], Message]) -> Message:
        """Send ``mine``, and get what ``judge`` makes of all ranks' messages, in their order, on rank 0.

        Raises:
            TimeoutError: on all ranks; names the silent ones.
        """

        def exchange() -> Message:
            if self.rank:
                self.store.set(f"{stage}/{self.rank}", json.dumps(mine))
                answer = self._receive(self.store, stage)
                self.store.set(f"{stage}/heard/{self.rank}", "")
                return answer
            answer = judge([mine, *(message for message, _ in self._collect(stage))])
            self.store.set(stage, json.dumps(answer))
            return answer

        return self._bounded(stage, exchange)

    def wait_until_heard(self, stage: str) -> None:
        """On rank 0, before it ends: where it keeps the store itself, the others need it to learn why."""
        if self.rank == 0 and self.world_size > 1:
            keys = [f"{stage}/heard/{rank}" for rank in range(1, self.world_size)]
            _wait(self.store, keys, 5.0)

    # ---- the parts

    def _bounded(self, stage: str, call: Callable[[], T]) -> T:
        """What ``call`` returns; its own limits hold as long as the process that keeps the store answers."""

        def whom() -> str:
            others = f"{rank_spans(self._silent)} of {self.world_size}" if self._silent else "its own folders"
            return f"{'rank 0, through the store of the world' if self.rank else others} ({stage})"

        try:
            return within(2 * self.timeout + 3 * _MARGIN, f"preflight: rank {self.rank}", whom, call)
        except WaitedInVain as error:
            raise TimeoutError(
                f"{error}: the process that keeps the store (torchrun on its host, or rank 0) is stopped, its host is "
                "gone, or a file system hangs on rank 0. Look there first."
            ) from error

    def _join(self, root: dist.Store) -> None:
        me = {"name": self.name, "host": socket.gethostname(), "pid": os.getpid()}
        if self.rank == 0:
            return self._welcome(root)
        root.set(f"hello/{self.rank}", json.dumps(me))
        self.name = self._receive(root, f"welcome/{self.name}")["start"]
        self.store = dist.PrefixStore(self.name, root)
        self.store.set(f"here/{self.rank}", json.dumps(me))
        return None

    def _welcome(self, root: dist.Store) -> None:
        """On rank 0: give everyone who greets the name of this start, until all have used it."""
        started = time.monotonic()
        missing, welcomed = set(range(1, self.world_size)), set[str]()
        while missing:
            for rank in sorted(missing):
                if self.store.check([f"here/{rank}"]):
                    self._greetings[rank] = json.loads(self.store.get(f"here/{rank}"))
                    missing.discard(rank)
                elif root.check([f"hello/{rank}"]):
                    greeting = json.loads(root.get(f"hello/{rank}"))
                    if greeting["name"] not in welcomed:
                        root.set(f"welcome/{greeting['name']}", json.dumps({"start": self.name}))
                        welcomed.add(greeting["name"])
            waited = time.monotonic() - started
            if missing and waited > self.timeout:
                self._give_up("clock", "join", sorted(missing))
            self._silent = sorted(missing)  # in a new list, as another thread reads it
            time.sleep(0.01 if missing else 0.0)

    def _compare_clocks(self) -> tuple[float, float]:
        """This rank's clock against rank 0's: the offset in seconds, and how far off it may be.

        The others answer a call of rank 0 with their time. It lies between the call and the answer's arrival, so
        a slow answer makes the offset less certain, and never wrong.
        """
        if self.rank:
            self._receive(self.store, "clock")
            self.store.set(f"clock/{self.rank}", json.dumps({"time": time.time()}))
            offset, error = self._receive(self.store, "clocks")["offsets"][self.rank]
            return offset, error
        called = time.time()
        self.store.set("clock", json.dumps({}))
        offsets = [(0.0, 0.0)]
        for message, arrived in self._collect("clock"):
            offsets.append((message["time"] - (called + arrived) / 2, (arrived - called) / 2))
        self.store.set("clocks", json.dumps({"offsets": offsets}))
        return offsets[0]

    def _collect(self, stage: str) -> list[tuple[Message, float]]:
        """On rank 0: the other ranks' messages and when they were read."""
        deadline = time.monotonic() + self.timeout
        arrived: list[tuple[Message, float]] = []
        for rank in range(1, self.world_size):
            key = f"{stage}/{rank}"
            self._silent = [rank]
            if not _wait(self.store, [key], max(0.001, deadline - time.monotonic())):
                everyone = range(1, self.world_size)
                silent = [other for other in everyone if not self.store.check([f"{stage}/{other}"])]
                self._give_up("clocks" if stage == "clock" else stage, stage, silent)
            arrived.append((json.loads(self.store.get(key)), time.time()))
        self._silent = []
        return arrived

    def _give_up(self, answer: str, stage: str, silent: list[int]) -> None:
        """On rank 0: tell the others, as the answer that they wait for next, and end."""
        what = {
            "join": "has not joined: it has not started, still imports, or is stopped",
            "report": "has joined, and not said what its machine is like: most likely a file system hangs",
        }.get(stage, "has joined, and has not answered since")
        named = [f"rank {rank}{self._known_of(rank)}" for rank in silent[:_MAX_NAMED]]
        more = f" and {len(silent) - _MAX_NAMED} more" if len(silent) > _MAX_NAMED else ""
        text = (
            f"preflight: no sign for {self.timeout:g} s, in a world of {self.world_size}, of {', '.join(named)}{more}, "
            f"which {what}. Look there first; where imports or disks are slow set preflight.timeout higher."
        )
        self.store.set(answer, json.dumps({"silent": text}))
        here = [rank for rank in range(1, self.world_size) if rank not in silent]
        _wait(self.store, [f"left/{rank}" for rank in here], 5.0)
        raise TimeoutError(text)

    def _known_of(self, rank: int) -> str:
        greeting = self._greetings.get(rank)
        if greeting is None:
            return ""
        state = ""
        if greeting["host"] == socket.gethostname():
            with suppress(psutil.Error):
                state = f", {psutil.Process(greeting['pid']).status()}"
        return f" ({greeting['host']}, pid {greeting['pid']}{state})"

    def _receive(self, store: dist.Store, key: str) -> Message:
        """What rank 0 says under ``key``."""
        if _wait(store, [key], self.timeout + _MARGIN):
            message: Message = json.loads(store.get(key))
            if "silent" in message:
                self.store.set(f"left/{self.rank}", "")
                raise TimeoutError(message["silent"])
            return message
        raise TimeoutError(
            f"preflight: rank 0 has not answered for {self.timeout + _MARGIN:g} s: it has not started, is stopped, or "
            "a file system hangs where it runs. Look there first; where imports take longer set preflight.timeout "
            "higher."
        )


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
