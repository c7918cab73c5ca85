"""One node of a run: meets the others, starts this node's ranks, and starts them again after what may mend itself.

    python -m launch.node [--alone] CONFIG.yaml [OVERLAY.yaml ...] [a.b=c ...]

Started by local.sh and node.sh, which set the environment. Exit codes: 0 done, 75 stopped by a signal with the state
saved (start the same command again), 70 hung, 1 an error. A signal is passed on to the ranks and ends the run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from launch.guest import Guest, HeadLost, Stopped
from launch.meet import Head
from launch.verdict import EXIT_ERROR, EXIT_REQUEUE, Ended, Verdict, decide
from launch.workers import run_ranks
from launch.world import World, read_world
from megatron_depthattn.config import config_digest, load_config, validate
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.history import code_digest
from megatron_depthattn.train.stop_signals import STOP_SIGNALS

LAST_ERROR = "first_failure.txt"
"""In a start's folder of logs: what is told last."""


def main() -> int:
    """Exit code, see above."""
    parser = argparse.ArgumentParser(prog="launch/node.sh", description="Train on one node of several, or on this one.")
    parser.add_argument("--alone", action="store_true", help="a run of this node only")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="further YAML files and a.b=c settings, later ones win")
    arguments = parser.parse_args()
    try:
        world = read_world(alone=arguments.alone)
        config = load_config(arguments.config, arguments.overrides)
        try:
            validate(config, world.world_size)
        except ValueError as error:
            sizes = f"NNODES={world.num_nodes} times NPROC_PER_NODE={world.processes_per_node}"
            raise ValueError(f"with {world.world_size} processes ({sizes}): {error}") from error
        command = ["megatron_depthattn.train", arguments.config, *arguments.overrides]
        return Node(world, command, Path(config.run.dir), _settings(world, config_digest(config))).run()
    except (ValueError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        return EXIT_ERROR
    except Stopped:
        print("stopped by a signal before the ranks were started", file=sys.stderr, flush=True)
        return EXIT_REQUEUE


def _settings(world: World, config: str) -> dict[str, str]:
    """What has to be the same on all nodes."""
    return {
        "NNODES": str(world.num_nodes),
        "NPROC_PER_NODE": str(world.processes_per_node),
        "config (digest)": config,
        "code (digest of megatron_depthattn)": code_digest(),
        "Python": platform.python_version(),
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }


class Node:
    """This node over all starts of the run.

    Raises:
        OSError: (node 0) the port is taken.
    """

    def __init__(self, world: World, command: list[str], run_dir: Path, settings: dict[str, str]) -> None:
        self._world, self._command, self._run_dir, self._settings = world, command, run_dir, settings
        self._signal = 0  # the first that came
        self._is_passed_on = self._has_met = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup: a lost terminal is nothing to stop for
                signal.signal(number, self._note)
        self._restarts_left = world.max_restarts
        self._head: Head | None = None
        if world.num_nodes > 1 and world.node_rank == 0:
            _check_ports(world)
            self._head = Head(world)

    def run(self) -> int:
        """Until the run is done, stopped or given up; returns the exit code."""
        try:
            while True:
                start, verdict = self._alone() if self._world.num_nodes == 1 else self._together()
                if not verdict.again:
                    break
                self._say(verdict.line)
                time.sleep(1.0)
        finally:
            if self._head:
                self._head.wait_until_all_left(5.0)
        self._tell_last(start, verdict)
        return verdict.code

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or number

    def _take_signal(self) -> int:
        """The first signal that came, once."""
        if self._is_passed_on:
            return 0
        self._is_passed_on = self._signal != 0
        return self._signal

    def _alone(self) -> tuple[str, Verdict]:
        if self._signal:
            raise Stopped
        start = time.strftime("%Y%m%dT%H%M%S")
        verdict = decide([self._run_ranks(start, lambda: "", "")], self._restarts_left)
        self._restarts_left -= verdict.again
        return start, verdict

    def _together(self) -> tuple[str, Verdict]:
        seconds = self._world.return_seconds if self._has_met else self._world.meet_seconds
        guest = Guest(self._world, self._settings, seconds, lambda: self._signal != 0)
        try:
            start = guest.wait_for_start()
            self._has_met = True
        except HeadLost as lost:
            return "", self._after_lost_head(lost)
        ended = self._run_ranks(start, lambda: guest.stop, guest.interface)
        try:
            verdict = guest.report(ended)
        except HeadLost as lost:
            if ended.outcome in ("finished", "saved", "interrupted"):  # it ended a moment before this node
                return start, decide([ended], 0)
            return start, self._after_lost_head(lost)
        self._restarts_left -= verdict.again
        return start, verdict

    def _after_lost_head(self, lost: HeadLost) -> Verdict:
        again = self._restarts_left > 0 and not self._signal
        self._restarts_left -= again
        more = f"; waiting up to {self._world.return_seconds:g} s for it to come back" if again else ""
        return Verdict(again, EXIT_ERROR, f"{lost}{more}")

    def _run_ranks(self, start: str, must_stop: Callable[[], str], interface: str) -> Ended:
        world = self._world
        if world.node_rank == 0:
            self._say(f"{world.num_nodes} x {world.processes_per_node} processes, logs in {self._logs(start)}")
        environment = dict(os.environ)
        if interface:  # gloo would take the address of the host's name, which on many machines is a loopback one
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        return run_ranks(
            world,
            self._command,
            run_dir=self._run_dir,
            start=start,
            environment=environment,
            take_signal=self._take_signal,
            must_stop=must_stop,
        )

    def _logs(self, start: str) -> Path:
        return self._run_dir / "logs" / start

    def _tell_last(self, start: str, verdict: Verdict) -> None:
        """Node 0, which leaves last, shows what failed first; the others only that something did."""
        failure = verdict.failure
        if failure is None or self._world.node_rank > 0:
            self._say(verdict.line)
            return
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(failure.time))
        text = printable(
            f"first failure of the run, at {moment}: {failure.who} on {failure.host}\n{failure.text.rstrip()}"
        )
        with contextlib.suppress(OSError):
            (self._logs(start) / LAST_ERROR).write_text(text + "\n", encoding="utf-8")
        self._say(f"exit code {verdict.code}: {verdict.line}")
        self._say(f"all logs: {self._logs(start)}; merged: launch/logs {self._run_dir}")
        if not os.environ.get("FAILURE_IS_TOLD_LATER"):  # the job script does, after Slurm's own last lines
            print(text, file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        print(printable(f"node {self._world.node_rank}: {line}"), file=sys.stderr, flush=True)


def _check_ports(world: World) -> None:
    for port in (world.master_port, world.master_port + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise ValueError(
                    f"port {port} of this node, the head, is taken ({error.strerror}): end what uses it, or give all "
                    f"nodes another MASTER_PORT (it and the port after it are used)."
                ) from error


if __name__ == "__main__":
    sys.exit(main())
