"""Encoding processes: N spawned processes that run `encode`, import neither torch nor transformers, and end with their
parent, even if that is killed.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from megatron_depthattn.data.encode import Content, Encoded, Recipe, encode
from megatron_depthattn.data.readers import Unit
from megatron_depthattn.data.tokenizer import Encoder

AHEAD_PER_WORKER = 2  # units read and not yet merged: enough that none waits, few enough to hold in memory

_given: list[tuple[Encoder, Recipe]] = []  # of an encoding process


class WorkerDiedError(RuntimeError):
    """An encoding process ended without an answer."""


class EncodePool:
    """`num_workers` processes that encode units. A context manager: leaving it ends them."""

    def __init__(self, num_workers: int, encoder: Encoder, recipe: Recipe) -> None:
        self.num_workers = num_workers
        # Nothing is sent. The processes end when our end is closed: by us, or by our death.
        self._their_end, self._our_end = multiprocessing.Pipe(duplex=False)
        given = (self._their_end, encoder, recipe)
        self._processes = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start, given)

    def __enter__(self) -> "EncodePool":
        return self

    def __exit__(self, *_: object) -> None:
        self._our_end.close()  # they hold nothing that could be lost
        self._processes.shutdown(cancel_futures=True)
        self._their_end.close()

    def encode(self, content: Content, max_bytes: int | None = None) -> Encoded:
        """The tokens of `content`, or of its first `max_bytes` of documents.

        Raises:
            OSError: a file cannot be read.
            WorkerDiedError: the process died.
        """
        return _result(self._processes.submit(_encode, content, max_bytes))

    def encode_in_order(self, units: Iterable[Unit], max_bytes: int | None = None) -> Iterator[tuple[Unit, Encoded]]:
        """Every unit with its tokens, in order, at most `AHEAD_PER_WORKER` units a process being read ahead.

        Of a unit no more than `max_bytes` of documents are encoded. Raises what `encode` does.
        """
        waiting: deque[tuple[Unit, Future[Encoded]]] = deque()
        try:
            for unit in units:
                waiting.append((unit, self._processes.submit(_encode, unit.content, max_bytes)))
                if len(waiting) > AHEAD_PER_WORKER * self.num_workers:
                    unit, answer = waiting.popleft()
                    yield unit, _result(answer)
        except BrokenProcessPool as error:
            raise _death() from error
        for unit, answer in waiting:
            yield unit, _result(answer)


def _result(answer: Future[Encoded]) -> Encoded:
    try:
        return answer.result()
    except BrokenProcessPool as error:
        raise _death() from error


def _death() -> WorkerDiedError:
    return WorkerDiedError("an encoding process was killed: out of memory (see dmesg)? set fewer --workers")


def _start(alive: Connection, encoder: Encoder, recipe: Recipe) -> None:
    """Run first in an encoding process."""
    os.setpgrp()  # Ctrl-C is for the parent, which ends us
    _given.append((encoder, recipe))

    def end_with_parent() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode(content: Content, max_bytes: int | None) -> Encoded:
    return encode(content, *_given[0], max_bytes)
