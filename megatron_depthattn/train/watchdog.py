"""A run that hangs ends, and leaves behind what is needed to say why.

Every rank has a thread that watches for the loop's heartbeats. When they stay away, the rank raises an alarm in the
store that all ranks joined the world through; every rank that still runs then writes the stacks of all its threads,
answers, says which ranks did not, and ends with `EXIT_HANG`, so that the launcher ends the job. Neither the alarm nor
the end relies on a collective, on a signal or on the main thread: those are what hangs. What may hang with them (the
store of a dead host, the disk that the stacks go to) is waited for only so long. Last of all a rank writes what torch's
flight recorder knows of its collectives: torch itself would write it only when one times out, which is later.

A main thread that holds the interpreter's lock in a C call stops this thread as well. For that there is a timer of
`faulthandler`, which needs no lock: it prints the stacks on stderr and ends the process with exit code 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist

from megatron_depthattn.parallel.rank_spans import rank_spans

EXIT_HANG = 70
"""Exit code of a process that the watchdog ended: EX_SOFTWARE, which neither Python nor a signal produces."""
_ALARM, _ANSWERS = "alarm", "answers"
_RECORDERS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}
"""Torch's flight recorders: by what recorded, the function that returns all of it."""
_MAX_RANKS = 16
"""Silent ranks that are described one by one; more are counted."""
_STATES = {
    psutil.STATUS_STOPPED: "stopped (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "in disk sleep, waiting for a disk or a driver",
    psutil.STATUS_ZOMBIE: "gone",
    psutil.STATUS_DEAD: "gone",
}


class Heartbeat(NamedTuple):
    """Progress of the loop."""

    at: float
    """Seconds of the monotonic clock."""
    step: int | None
    phase: str


class Watchdog(AbstractContextManager["Watchdog"]):
    """Ends this process, and through the store every other rank, when the loop stops calling `heartbeat`.

    Use it as a context manager: what is not closed keeps watching.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as hung; longer than the slowest step, evaluation
            batch, or forcing of one file to disk. Watching starts with the first heartbeat, so loading and
            compiling are not timed.
        folder: where the stacks go, ``<time>_rank_<N>.txt`` for each rank, and ``<time>_hang_<N>.txt``, what rank
            N says of the others; made when needed. Ranks' collectives go into ``<time>_collectives``.
        rank, world_size: this process's place.
        store: the store of the world. Of it a copy with a connection of its own is used, since a store serves one
            call at a time and the main thread's may be the one that hangs.
    """

    def __init__(self, timeout: float, folder: Path, *, rank: int, world_size: int, store: dist.Store) -> None:
        self.rank, self.world_size, self.timeout, self.folder = rank, world_size, timeout, folder
        self.interval = min(5.0, timeout / 10)
        self.grace = 2 * self.interval + min(5.0, timeout / 4)
        """Seconds for the other ranks to answer."""
        self._host = socket.gethostname()
        self._process = {"host": self._host, "pid": os.getpid(), "started": psutil.Process().create_time()}
        self._last: Heartbeat | None = None
        self._closed, self._alarmed = threading.Event(), threading.Event()
        self._store: Any = dist.PrefixStore("watchdog", store.clone())  # Any: torch's type stubs lack `append`
        self._store.set_timeout(timedelta(seconds=max(1.0, self.grace)))
        self._threads = [
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
            threading.Thread(target=self._stay_in_touch, name="watchdog store", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def heartbeat(self, step: int, phase: str) -> None:
        """Say that the loop makes progress: ``phase`` (step, evaluation, checkpoint, ...) of ``step`` begins now."""
        if self._last is None:
            self._arm_backstop(self.timeout + self.grace)
        self._last = Heartbeat(time.monotonic(), step, phase)

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2.0)  # not for a store that is gone
        faulthandler.cancel_dump_traceback_later()

    # ---- watching

    def _watch(self) -> None:
        """The thread that decides; waits for nobody."""
        while not self._closed.wait(self.interval):
            last = self._last
            if last is not None:  # armed here, not by each heartbeat: it fires when this thread does not run
                self._arm_backstop(self.timeout + self.grace)
            if self._alarmed.is_set() or (last and time.monotonic() - last.at > self.timeout):
                self._end()

    def _end(self) -> None:
        """Report, for so long as that may take, and leave."""
        limit = 3 * self.grace + 5.0
        self._arm_backstop(limit + 5.0)
        report = threading.Thread(target=self._report, name="watchdog report", daemon=True)
        report.start()
        report.join(timeout=limit)
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        os._exit(EXIT_HANG)

    @staticmethod
    def _arm_backstop(seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr())

    def _stay_in_touch(self) -> None:
        """The thread that talks to the store: two small messages each interval. May block when the store is gone."""
        try:
            while not self._closed.is_set():
                self._store.set(f"state/{self.rank}", json.dumps(self._state()))
                if self._store.check([_ALARM]):
                    self._alarmed.set()
                    return
                self._closed.wait(self.interval)
            self._store.set(f"state/{self.rank}", json.dumps(self._state() | {"phase": "closed"}))
        except RuntimeError as error:  # torch's DistError: the host of the store is gone
            if not self._closed.is_set():
                _say(f"rank {self.rank} lost the store ({error}); it keeps watching for itself alone")

    # ---- the end

    def _report(self) -> None:
        """Write the stacks and, meanwhile, talk to the others; where one fails or blocks the other is still done."""
        self._name = stamp = time.strftime("%Y%m%dT%H%M%S")
        _say(f"rank {self.rank} {self._what_happened()}; main thread: {main_thread(6)}")
        path = self.folder / f"{stamp}_rank_{self.rank}.txt"
        stacks = threading.Thread(target=self._try, args=(lambda: self._write_stacks(path),), daemon=True)
        stacks.start()
        answers = {self.rank: self._state() | {"where": main_thread(3)}}
        self._try(lambda: answers.update(self._exchange_answers(answers[self.rank])))
        lines = [f"hang: no heartbeat for {self.timeout:g} s"] if self.rank == min(answers) else []
        self._try(lambda: lines.extend(self._silent_ranks(answers)))
        collectives = self.folder / f"{self._name}_collectives"
        if self.rank == min(answers):
            lines += _groups(answers)
        for line in lines:
            _say(line)
        if lines:
            self._try(lambda: (self.folder / f"{stamp}_hang_{self.rank}.txt").write_text("\n".join(lines) + "\n"))
        stacks.join()
        self._try(lambda: write_collectives(collectives, self.rank))
        if self.rank == min(answers) and collectives.exists():
            _say(f"each rank's last collectives are in {collectives} (docs/fault-tolerance.md)")

    def _try(self, part: Callable[[], Any]) -> None:
        try:
            part()
        except (OSError, RuntimeError, ValueError, psutil.Error) as error:
            _say(f"rank {self.rank}: {type(error).__name__}: {error}")

    def _what_happened(self) -> str:
        last = self._last
        if last is None:
            return "learned of a hang before its first step"
        verb = "hangs" if time.monotonic() - last.at > self.timeout else "learned of a hang"
        return f"{verb}: {_last_heartbeat(self._state())}"

    def _write_stacks(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"rank {self.rank} on {self._host}, pid {os.getpid()}: {self._what_happened()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    print(f"child {child.pid} {child.name()}: {child.status()}", file=file)

    def _exchange_answers(self, mine: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Raise the alarm, answer, and after the time of grace read who answered; all take the first one's name."""
        self._name = self._store.compare_set(_ALARM, "", self._name).decode()
        self._store.append(_ANSWERS, json.dumps({self.rank: mine}) + "\n")
        time.sleep(self.grace)
        return {
            int(rank): answer
            for line in self._store.get(_ANSWERS).decode().splitlines()
            for rank, answer in json.loads(line).items()
        }

    def _silent_ranks(self, answers: dict[int, dict[str, Any]]) -> Iterator[str]:
        """A line for each rank that did not answer, from the one rank that can say most: the first on its host."""
        silent = sorted({*range(self.world_size)} - answers.keys())
        for rank in silent[:_MAX_RANKS]:
            key = f"state/{rank}"
            state = json.loads(self._store.get(key)) if self._store.check([key]) else {}
            neighbours = [other for other, answer in answers.items() if answer["host"] == state.get("host")]
            if self.rank == min(neighbours or answers):
                yield f"rank {rank} is unresponsive: {_describe(state, self._host)}"
        if len(silent) > _MAX_RANKS and self.rank == min(answers):
            yield f"and {len(silent) - _MAX_RANKS} more ranks are unresponsive"

    def _state(self) -> dict[str, Any]:
        beat = self._last or Heartbeat(time.monotonic(), None, "start")
        since = time.time() - (time.monotonic() - beat.at)
        return self._process | {"step": beat.step, "phase": beat.phase, "since": since}


def write_collectives(folder: Path, rank: int) -> None:
    """Write what torch's flight recorder kept of this rank's collectives, for ``torchfrtrace FOLDER -p nccl_rank_``.

    The recorder asks CUDA, and holds the interpreter's lock meanwhile: call it when all else is done.
    """
    names = dist.distributed_c10d._world.pg_names
    groups = {
        name: {"name": name, "desc": group.group_desc, "ranks": str(dist.get_process_group_ranks(group))}
        for group, name in names.items()
    }
    for backend, function in _RECORDERS.items():
        dump = getattr(torch._C._distributed_c10d, function, None)  # a build without NCCL lacks one
        recorded = pickle.loads(dump()) if dump else {}
        if recorded.get("entries"):
            folder.mkdir(parents=True, exist_ok=True)
            recorded["pg_config"] = groups  # gloo's recorder knows neither names nor ranks of groups
            (folder / f"{backend}_rank_{rank}").write_bytes(pickle.dumps(recorded))


def main_thread(limit: int) -> str:
    """Where the main thread is, innermost first: ``file:line function``. Reads no source file: the disk may hang."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    places = [(each.f_code, line) for each, line in itertools.islice(traceback.walk_stack(frame), limit)]
    return " < ".join(f"{os.path.basename(code.co_filename)}:{line} {code.co_name}" for code, line in places)


def _describe(state: dict[str, Any], host: str) -> str:
    """What is known of a rank that is silent, from its last state in the store and, on this host, from the kernel."""
    if not state:
        return "it never began"
    where = f"its process is {_process_state(state)}" if state["host"] == host else "another host"
    return f"{state['host']}, pid {state['pid']}, {_last_heartbeat(state)}; {where}"


def _last_heartbeat(state: dict[str, Any]) -> str:
    if state["step"] is None:
        return "no heartbeat yet"
    return f"last heartbeat {time.time() - state['since']:.0f} s ago at step {state['step']} ({state['phase']})"


def _process_state(state: dict[str, Any]) -> str:
    try:
        process = psutil.Process(state["pid"])
        if abs(process.create_time() - state["started"]) > 1.0:
            return "gone"  # another process has its number
        status = process.status()
    except psutil.NoSuchProcess:
        return "gone"
    return _STATES.get(status, f"{status}, but its threads do not run: a C call that holds the interpreter's lock?")


def _groups(answers: dict[int, dict[str, Any]]) -> list[str]:
    """Ranks that answered, together where they are at the same place; the fewest first, as outliers are the news."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for rank, answer in sorted(answers.items()):
        groups[answer["step"], answer["phase"], answer["where"]].append(rank)
    return [
        f"{rank_spans(ranks)} answered: step {step} ({phase}), main thread at {where}"
        for (step, phase, where), ranks in sorted(groups.items(), key=lambda group: len(group[1]))
    ]


def _stderr() -> Any:
    return sys.__stderr__ or sys.stderr  # the real one: what replaced it may have no file descriptor, or a lock


def _say(line: str) -> None:
    print(f"watchdog: {line}", file=_stderr(), flush=True)
