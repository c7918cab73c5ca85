"""torchrun's agent with a policy for restarts, and words while it waits for other nodes."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rdzv_registry

from megatron_depthattn import launch
from megatron_depthattn.launch import EXIT_DONE, EXIT_ERROR, EXIT_HANG, EXIT_REQUEUE, report
from megatron_depthattn.launch.failures import record_death
from megatron_depthattn.parallel.launch_env import set_variables, variable

REPORT_SECONDS = 5
"""A node that waits for others says so as often as this."""
STOP_SECONDS = 30
"""How long ranks have to end by themselves once another node has given up, and again after SIGTERM: as in torchrun."""


def handle_signals() -> None:
    """Raise `SignalException` at the first signal that stops a run, and ignore all later ones: schedulers signal all
    processes of a job at once, parents too, and a second signal would kill ranks that save."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        for each in launch.SIGNALS:
            signal.signal(each, lambda *_: None)  # a signal under way when SIG_IGN is set would be a traceback
        raise SignalException("stopped", signal.Signals(number))

    for number in launch.heeded_signals():
        signal.signal(number, stop)


def _is_stopping() -> bool:
    """Whether a signal that stops the run is on its way up the stack."""
    return isinstance(sys.exc_info()[1], SignalException)


class Agent(LocalElasticAgent):
    """The agent of one node, made of torchrun's `LaunchConfig`; joins no rendezvous yet."""

    started = 0.0
    """When the ranks were started the last time, in seconds since 1970."""
    _names: Sequence[str] = ()
    """The nodes that had joined the last rendezvous when most of them were there."""
    _closed_at = 0.0
    """When another node was first seen to have given up while ranks ran, by the monotonic clock; 0: none has."""

    def __init__(self, config: Any, command: Any, arguments: Sequence[str]) -> None:
        self.config, given = config, vars(config)
        nodes = (config.min_nodes, config.max_nodes, config.local_addr)
        place = RendezvousParameters(
            config.rdzv_backend, config.rdzv_endpoint, config.run_id, *nodes, **config.rdzv_configs
        )
        spec = WorkerSpec(
            local_world_size=config.nproc_per_node,
            entrypoint=command,
            args=tuple(arguments),
            rdzv_handler=rdzv_registry.get_rendezvous_handler(place),
            **{each.name: given[each.name] for each in fields(WorkerSpec) if each.name in given},
        )
        if "signals_to_handle" in given:
            set_variables(TORCHELASTIC_SIGNALS_TO_HANDLE=given["signals_to_handle"])
        names = ("logs_specs", "start_method", "log_line_prefix_template", "shutdown_timeout")
        super().__init__(spec, **{name: given[name] for name in names if name in given})  # what this torch knows

    def run_until_end(self) -> set[int]:
        """Run the ranks, again after failures; returns the exit codes of this node's last ones.

        Raises:
            SignalException: this process was asked to stop; the ranks were too, and have ended.
            RendezvousError: not all nodes came.
        """
        codes = {EXIT_ERROR}
        try:
            if result := self.run():  # None: the rendezvous was left
                codes = {failure.exitcode for failure in result.failures.values()} or {EXIT_DONE}
            return codes
        finally:
            if launch.exit_code(codes) in (EXIT_ERROR, EXIT_HANG) and not _is_stopping():
                self._rdzv_handler.shutdown()  # closes the rendezvous: other nodes do not wait for this one

    def exit_codes(self) -> set[int]:
        """Of the ranks of this node, as far as they have ended."""
        context: Any = self._pcontext
        handlers = context.subprocess_handlers.values() if context else ()
        return {handler.proc.returncode for handler in handlers} - {None}

    @property
    def _state(self) -> Any:
        """torchrun's own state of the rendezvous."""
        return getattr(getattr(self._rdzv_handler, "_state_holder", None), "state", None)

    def joined(self) -> str:
        """Who has joined, and under Slurm who has not."""
        names = self._names
        known = {*names, *(name.partition(".")[0] for name in names)}
        missing = ", ".join(host for host in slurm_hosts() if host not in known)
        head = f"{len(names)} of {self.config.max_nodes} nodes joined at {self.config.rdzv_endpoint}"
        return head + (f" ({', '.join(names)})" if names else "") + (f"; not: {missing}" if missing else "")

    def _monitor_workers(self, worker_group: Any) -> Any:
        """Keep a record of ranks that left none; restart nothing that was asked to stop or would fail again; wait no
        longer than `STOP_SECONDS` for ranks whose neighbours another node has ended."""
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and getattr(self._state, "closed", False):
            self._closed_at = self._closed_at or time.monotonic()
            if time.monotonic() - self._closed_at > STOP_SECONDS:
                raise RendezvousClosedError
        if not result.is_failed():
            return result
        context: Any = self._pcontext
        codes = {failure.exitcode for failure in result.failures.values()}
        for rank, failure in result.failures.items():
            path = Path(context.error_files[failure.local_rank])
            is_ended = EXIT_HANG in codes and failure.exitcode != EXIT_HANG  # by torchrun, as it did not end itself
            if failure.exitcode not in (EXIT_REQUEUE, -signal.SIGTERM) and not is_ended and not path.exists():
                record_death(path, rank, failure.pid, failure.exitcode)
        was_stopped = EXIT_REQUEUE in codes and codes <= {EXIT_REQUEUE, -signal.SIGTERM}
        if was_stopped or not all(failure.error_file_data.get("retry", True) for failure in result.failures.values()):
            self._remaining_restarts = 0
        if left := self._remaining_restarts:
            report(f"ranks {sorted(result.failures)} failed; starting again, {left - 1} restarts left after that")
        return result

    def _rendezvous(self, worker_group: Any) -> None:
        self._pcontext, self._names = None, ()  # of an earlier attempt, whose exit codes say nothing about this one
        done = threading.Event()

        def watch() -> None:
            for second in itertools.count(1):
                if done.wait(1.0):
                    return
                self._note_nodes()
                if second % REPORT_SECONDS == 0:
                    report(f"waiting for nodes: {self.joined()}")

        if self.config.max_nodes > 1:
            threading.Thread(target=watch, name="rendezvous report", daemon=True).start()
        try:
            super()._rendezvous(worker_group)
        finally:
            done.set()
            self._note_nodes()

    def _note_nodes(self) -> None:
        """Note who has joined: torchrun forgets nodes once they have given up, this one first."""
        nodes = list(getattr(self._state, "participants", ()))  # torch's own thread removes dead ones
        if getattr(self._rdzv_handler, "_this_node", None) in nodes:
            self._names = max(sorted(node.addr for node in nodes), self._names, key=len)

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        """Name the folders of the ranks' logs by rank; torchrun's own names have the number on this node only."""
        self.started = time.time()
        started = super()._start_workers(worker_group)
        handle_signals()  # torch has set its own
        attempt = worker_group.spec.max_restarts - self._remaining_restarts
        context: Any = self._pcontext
        for worker in worker_group.workers:
            folder = Path(context.error_files[worker.local_rank]).parent
            link = folder.parents[2] / f"rank_{worker.global_rank:05d}_attempt_{attempt}"
            with contextlib.suppress(OSError):
                link.symlink_to(folder.relative_to(link.parent))
        return started

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *arguments: Any, **settings: Any) -> None:
        """Give ranks the time to save where this process was asked to stop, whatever torch does; else `STOP_SECONDS`,
        since their step may wait for a node that has gone."""
        context: Any = self._pcontext
        if context:
            seconds = getattr(self, "_shutdown_timeout", launch.SHUTDOWN_SECONDS) if _is_stopping() else STOP_SECONDS
            context.close(death_sig, seconds)
        super()._shutdown(death_sig, *arguments, **settings)


def slurm_hosts() -> list[str]:
    """The hosts of this Slurm job; empty outside of one."""
    command = ["scontrol", "show", "hostnames", variable("SLURM_JOB_NODELIST")]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    return []
