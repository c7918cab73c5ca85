"""torchrun's agent with a policy for restarts, and words while it waits for other nodes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rdzv_registry

from megatron_depthattn.launch import EXIT_HANG, EXIT_REQUEUE, SHUTDOWN_SECONDS, SIGNALS, heeded_signals
from megatron_depthattn.launch.failures import record_death
from megatron_depthattn.parallel.launch_env import set_variables, variable
from megatron_depthattn.terminal import printable

REPORT_SECONDS = 5
"""A node that waits for others says so as often as this."""


def handle_signals() -> None:
    """Raise `SignalException` at the first signal that stops a run, and ignore all later ones: schedulers signal all
    processes of a job at once, parents too, and a second signal would kill ranks that save."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, lambda *_: None)  # a signal under way when SIG_IGN is set would be a traceback
        raise SignalException("stopped", signal.Signals(number))

    for number in heeded_signals():
        signal.signal(number, stop)


def start_agent(config: Any, command: Any, arguments: Sequence[str]) -> Agent:
    """The agent of this node, as torchrun's own launcher makes it from its `LaunchConfig`; joins no rendezvous yet."""
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    names = {field.name for field in fields(WorkerSpec)}
    spec = WorkerSpec(
        local_world_size=config.nproc_per_node,
        entrypoint=command,
        args=tuple(arguments),
        rdzv_handler=rdzv_registry.get_rendezvous_handler(parameters),
        **{name: value for name, value in vars(config).items() if name in names},
    )
    if hasattr(config, "signals_to_handle"):
        set_variables(TORCHELASTIC_SIGNALS_TO_HANDLE=config.signals_to_handle)
    names = {"shutdown_timeout"} & vars(config).keys()  # what this version of torch has
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    agent = Agent(
        spec=spec,
        logs_specs=config.logs_specs,
        start_method=config.start_method,
        log_line_prefix_template=config.log_line_prefix_template,
        **settings,
    )
    agent.num_nodes, agent.endpoint = config.max_nodes, config.rdzv_endpoint
    agent.waits_for_saves = bool(settings)
    return agent


class Agent(LocalElasticAgent):
    """The agent of one node."""

    num_nodes, endpoint = 1, ""
    waiting = ""
    """For whom this node waits, in a line; empty once all have joined."""
    started = 0.0
    """When the ranks were started the last time, in seconds since 1970."""
    waits_for_saves = False
    """Whether this version of torch has ``--shutdown-timeout``."""

    def run_until_end(self) -> set[int]:
        """Run the ranks, again after failures; returns the exit codes of this node's last ones.

        Raises:
            SignalException: this process was asked to stop; the ranks were too, and have ended.
            RendezvousError: not all nodes came.
        """
        handler = self._rdzv_handler
        is_stopped = False
        try:
            result = self.run()
            if result is None:  # torch: the rendezvous was left
                return {1}
            return {failure.exitcode for failure in result.failures.values()} or {0}
        except SignalException:
            is_stopped = True
            raise
        finally:
            if not is_stopped:  # closes the rendezvous: other nodes do not wait for this one
                handler.shutdown()

    def exit_codes(self) -> set[int]:
        """Of the ranks of this node, as far as they have ended."""
        context: Any = self._pcontext
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
                is_ended = EXIT_HANG in codes and failure.exitcode != EXIT_HANG  # by torchrun, as it did not end itself
                if failure.exitcode not in (EXIT_REQUEUE, -signal.SIGTERM) and not is_ended and not path.exists():
                    record_death(path, rank, failure.pid, failure.exitcode)
            retry = all(failure.error_file_data.get("retry", True) for failure in result.failures.values())
            if was_stopped or not retry:
                self._remaining_restarts = 0
            if self._remaining_restarts > 0:
                left = self._remaining_restarts - 1
                _say(f"ranks {sorted(result.failures)} failed; starting again, {left} restarts left after that")
        return result

    def _rendezvous(self, worker_group: Any) -> None:
        self._pcontext = None  # of an earlier attempt, whose exit codes say nothing about this one
        with self._reported(worker_group.spec.rdzv_handler):
            super()._rendezvous(worker_group)
        self.waiting = ""

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

    def _shutdown(self, *arguments: Any, **settings: Any) -> None:
        """Give ranks the time to save also where torch would kill them after 30 s."""
        context: Any = self._pcontext
        if isinstance(sys.exc_info()[1], SignalException) and context and not self.waits_for_saves:
            context.close(arguments[0] if arguments else signal.SIGTERM, SHUTDOWN_SECONDS)
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
                    _say(f"waiting for nodes: {self.waiting}")

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
        self.waiting = (
            f"{len(joined)} of {self.num_nodes} nodes joined at {self.endpoint}"
            f"{' (' + ', '.join(joined) + ')' if joined else ''}{absent}"
        )


def slurm_hosts() -> list[str]:
    """The hosts of this Slurm job; empty outside of one."""
    nodes = variable("SLURM_JOB_NODELIST")
    if not nodes or nodes.startswith("-"):
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10)
        return shown.stdout.split() if shown.returncode == 0 else []
    return []


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
