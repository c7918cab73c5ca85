"""Encoding processes: N of `encode.serve`, each fed and read by a thread of its own over pipes.

Plain child processes rather than multiprocessing's, for three reasons: they do not import the main program again (which
brings torch), they inherit no locks, and they end with their parent even if that is killed, because their input ends.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from megatron_depthattn.data.encode import Content, Encoded, Recipe, serve
from megatron_depthattn.data.readers import Unit
from megatron_depthattn.data.tokenizer import Encoder

AHEAD_PER_WORKER = 2  # units read and not yet merged: enough that none waits, few enough to hold in memory


class WorkerDiedError(RuntimeError):
    """An encoding process ended without an answer."""


class EncodePool:
    """`num_workers` processes that encode units. A context manager: leaving it ends them."""

    def __init__(self, num_workers: int, encoder: Encoder, recipe: Recipe) -> None:
        self.num_workers = num_workers
        self._workers = [_start() for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers)
        for worker in self._workers:
            self._threads.submit(self._introduce, worker, (encoder, recipe))

    def __enter__(self) -> "EncodePool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()  # they hold nothing that could be lost
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.communicate()

    def submit(self, content: Content, max_bytes: int | None = None) -> "Future[Encoded]":
        """Encode `content` in the next free process.

        The future raises OSError if a file cannot be read, WorkerDiedError if the process died.
        """
        return self._threads.submit(self._ask, content, max_bytes)

    def encode_in_order(self, units: Iterable[Unit], max_bytes: int | None = None) -> Iterator[tuple[Unit, Encoded]]:
        """Every unit with its tokens, in order, at most `AHEAD_PER_WORKER` units a process being read ahead.

        Of a unit no more than `max_bytes` of documents are encoded.
        """
        waiting: deque[tuple[Unit, Future[Encoded]]] = deque()
        for unit in units:
            waiting.append((unit, self.submit(unit.content, max_bytes)))
            if len(waiting) > AHEAD_PER_WORKER * self.num_workers:
                unit, answer = waiting.popleft()
                yield unit, answer.result()
        for unit, answer in waiting:
            yield unit, answer.result()

    def _introduce(self, worker: "subprocess.Popen[bytes]", greeting: tuple[Encoder, Recipe]) -> None:
        try:
            _send(worker, greeting)
        finally:
            self._idle.put(worker)  # even a dead one: whoever asks it next learns that it died, and nobody waits

    def _ask(self, content: Content, max_bytes: int | None) -> Encoded:
        worker = self._idle.get()
        assert worker.stdout is not None
        try:
            _send(worker, (content, max_bytes))
            answer: Encoded | OSError = pickle.load(worker.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise _death(worker) from error
        finally:
            self._idle.put(worker)
        if isinstance(answer, OSError):
            raise answer
        return answer


def _start() -> "subprocess.Popen[bytes]":
    # Parallel by processes, so none of the library's threads in them. `env`: the parent's environment is not ours to
    # change. -P: no module from the current folder.
    settings = [f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}", "TOKENIZERS_PARALLELISM=false"]
    command = ["env", *settings, sys.executable, "-P", "-c", f"from {serve.__module__} import serve; serve()"]
    # A process group of their own: Ctrl-C is for the parent, which ends them.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)


def _send(worker: "subprocess.Popen[bytes]", message: Any) -> None:
    assert worker.stdin is not None
    try:
        pickle.dump(message, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
    except BrokenPipeError as error:
        raise _death(worker) from error


def _death(worker: "subprocess.Popen[bytes]") -> WorkerDiedError:
    code = worker.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    advice = ": out of memory? set fewer --workers" if code == -signal.SIGKILL else ""
    return WorkerDiedError(f"an encoding process {how}{advice}")
