"""Encoding processes: N spawned processes that run `encode`, import neither torch nor transformers, and end with their
parent, even if that is killed.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from megatron_depthattn.data.encode import Content, Encoded, Recipe, encode
from megatron_depthattn.data.readers import Unit
from megatron_depthattn.data.tokenizer import Encoder
from megatron_depthattn.parallel.launch_env import set_variables

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is WorkerDiedError:  # perhaps amid an answer, whose rest is waited for until nobody can send
            self._our_end.close()
            self._processes._result_queue._writer.close()  # type: ignore[attr-defined]
        self._processes.shutdown(cancel_futures=True)  # after what is being encoded, a few MB a process
        self._our_end.close()
        self._their_end.close()

    def encode_in_order(self, units: Iterable[Unit], max_bytes: int | None = None) -> Iterator[tuple[Unit, Encoded]]:
        """Every unit with its tokens, in order, at most `AHEAD_PER_WORKER` units a process being read ahead.

        Of a unit no more than `max_bytes` of documents are encoded.

        Raises:
            OSError: a file cannot be read.
            WorkerDiedError: a process died.
        """
        waiting: deque[tuple[Unit, Future[Encoded]]] = deque()
        try:
            for unit in units:
                waiting.append((unit, self._processes.submit(_encode, unit.content, max_bytes)))
                if len(waiting) > AHEAD_PER_WORKER * self.num_workers:
                    unit, answer = waiting.popleft()
                    yield unit, self._result(answer)
        except BrokenProcessPool as error:
            raise self._death() from error
        for unit, answer in waiting:
            yield unit, self._result(answer)

    def _result(self, answer: Future[Encoded]) -> Encoded:
        while True:
            try:
                return answer.result(timeout=2.0)
            except BrokenProcessPool as error:
                raise self._death() from error
            except TimeoutError:
                if answer.done():  # of the file that it reads
                    raise
                if any(code is not None for code in self._exit_codes()):  # killed while it sent its answer
                    raise self._death() from None

    def _exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in (self._processes._processes or {}).values()]

    def _death(self) -> WorkerDiedError:
        codes = {code for code in self._exit_codes() if code} - {-signal.SIGTERM}  # by which the pool ends the others
        if codes - {-signal.SIGKILL}:
            return WorkerDiedError(f"an encoding process ended with exit code {min(codes)}; its own lines say why")
        return WorkerDiedError("an encoding process was killed: out of memory (see dmesg)? set fewer --workers")


def _start(alive: Connection, encoder: Encoder, recipe: Recipe) -> None:
    """Run first in an encoding process."""
    os.setpgrp()  # Ctrl-C is for the parent, which ends us
    set_variables(TOKENIZERS_PARALLELISM="false")  # parallel by processes: none of the library's threads in them
    _given.append((encoder, recipe))

    def end_with_parent() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode(content: Content, max_bytes: int | None) -> Encoded:
    return encode(content, *_given[0], max_bytes)
