"""torchrun's agent with a policy for restarts, and words while it waits for other nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException

from megatron_depthattn.launch.failures import record_death
from megatron_depthattn.terminal import printable

EXIT_REQUEUE = 75
REPORT_SECONDS = 5
"""A node that waits for others says so as often as this."""


class Agent(LocalElasticAgent):
    """The agent of one node; one in a process."""

    endpoint: ClassVar[str] = ""
    num_nodes: ClassVar[int] = 1
    waiting: ClassVar[str] = ""
    """For whom this node waits, in a line; empty once all have joined."""
    _last: ClassVar[Agent | None] = None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        Agent._last = self

    @classmethod
    def exit_codes(cls) -> set[int]:
        """Of the ranks of this node, as far as they have ended."""
        context: Any = cls._last._pcontext if cls._last else None
        handlers = context.subprocess_handlers.values() if context else ()
        return {handler.proc.returncode for handler in handlers if handler.proc.returncode is not None}

    def _monitor_workers(self, worker_group: Any) -> Any:
        """Keep a record of ranks that left none; restart nothing that was asked to stop or would fail again."""
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            context: Any = self._pcontext
            codes = {failure.exitcode for failure in result.failures.values()}
            was_stopped = EXIT_REQUEUE in codes and codes <= {EXIT_REQUEUE, -signal.SIGTERM}
            for rank, failure in result.failures.items():
                path = Path(context.error_files[failure.local_rank])
                if failure.exitcode not in (EXIT_REQUEUE, -signal.SIGTERM) and not path.exists():
                    record_death(path, rank, failure.pid, failure.exitcode)
            retry = all(failure.error_file_data.get("retry", True) for failure in result.failures.values())
            if was_stopped or not retry:
                self._remaining_restarts = 0
            if self._remaining_restarts > 0:
                left = self._remaining_restarts - 1
                _say(f"ranks {sorted(result.failures)} failed; starting again, {left} restarts left after that")
        return result

    def _rendezvous(self, worker_group: Any) -> None:
        with self._reported(worker_group.spec.rdzv_handler):
            super()._rendezvous(worker_group)
        Agent.waiting = ""

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        """Name the folders of the ranks' logs by rank; torchrun's own names have the number on this node only."""
        started = super()._start_workers(worker_group)
        attempt = worker_group.spec.max_restarts - self._remaining_restarts
        context: Any = self._pcontext
        for worker in worker_group.workers:
            folder = Path(context.error_files[worker.local_rank]).parent
            link = folder.parents[2] / f"rank_{worker.global_rank:05d}_attempt_{attempt}"
            with contextlib.suppress(OSError):
                link.symlink_to(folder.relative_to(link.parent))
        return started

    def _shutdown(self, *arguments: Any, **settings: Any) -> None:
        """Schedulers tell all processes of a job at once, and their parents too: the second signal would kill ranks."""
        if isinstance(sys.exc_info()[1], SignalException):
            for number in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"].split(","):
                signal.signal(getattr(signal, number), signal.SIG_IGN)
        super()._shutdown(*arguments, **settings)

    @contextlib.contextmanager
    def _reported(self, handler: Any) -> Iterator[None]:
        done = threading.Event()

        def report() -> None:
            seconds = 0
            while not done.wait(1.0):
                self._note_waiting(handler)
                seconds += 1
                if seconds % REPORT_SECONDS == 0:
                    _say(f"waiting for nodes: {Agent.waiting}")

        thread = threading.Thread(target=report, name="rendezvous report", daemon=True)
        if self.num_nodes > 1:
            thread.start()
        try:
            yield
        finally:
            done.set()

    def _note_waiting(self, handler: Any) -> None:
        """Who has joined, by torchrun's own state of the rendezvous."""
        state = getattr(getattr(handler, "_state_holder", None), "state", None)
        joined = sorted(node.addr for node in getattr(state, "participants", ()))
        hosts = slurm_hosts()
        missing = [host for host in hosts if host not in {name.partition(".")[0] for name in joined} | set(joined)]
        absent = f"; not: {', '.join(missing)}" if missing else ""
        Agent.waiting = (
            f"{len(joined)} of {self.num_nodes} nodes joined at {self.endpoint} ({', '.join(joined)}){absent}"
        )


def slurm_hosts() -> list[str]:
    """The hosts of this Slurm job; empty outside of one."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or nodes.startswith("-"):
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10)
        return shown.stdout.split() if shown.returncode == 0 else []
    return []


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
