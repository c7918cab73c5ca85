"""The ranks of one node, for one start: torchrun as a child, watched until it ends; then how it ended, and why."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.follow import Follower
from launch.verdict import EXIT_HANG, EXIT_REQUEUE, Ended, Failure, Outcome
from launch.world import World
from megatron_depthattn.train.history import DELIBERATE, HISTORY
from megatron_depthattn.train.line_files import read_records
from megatron_depthattn.train.stop_signals import STOP_SIGNALS

GRACE_SECONDS = 15.0
"""Ranks of a world that is broken elsewhere have this long to say so themselves; they may wait for a peer for ever."""
_UNANNOUNCED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
_MOST_TEXT = 20_000


def run_ranks(
    world: World,
    command: Sequence[str],
    *,
    run_dir: Path,
    start: str,
    environment: dict[str, str],
    take_signal: Callable[[], int],
    must_stop: Callable[[], str],
) -> Ended:
    """Start this node's ranks and wait for their end.

    Args:
        command: module and arguments for ``torchrun -m``.
        run_dir, start: the logs are in ``<run_dir>/logs/<start>``.
        environment: for torchrun and the ranks.
        take_signal: a signal to pass on, each one once; 0 without one.
        must_stop: why the ranks should end at once, because the world is broken elsewhere; empty if it is not.
    """
    logs = run_dir / "logs" / start
    logs.mkdir(parents=True, exist_ok=True)
    node, report = world.node_rank, logs / f"torchrun_node_{world.node_rank}.json"
    began = time.time()
    environment = environment | {"TORCH_FR_DUMP_TEMP_FILE": str(logs / "flight_recorder_")}
    with (logs / f"torchrun_node_{node}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.ranks", str(logs), str(report), *_torchrun(world), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
        )
    signalled = _watch(process, Follower(logs, world), take_signal, must_stop)
    return _how_it_ended(world, logs, run_dir, process.returncode, began, signalled)


def _torchrun(world: World) -> list[str]:
    sizes = [f"--nnodes={world.num_nodes}", f"--nproc-per-node={world.processes_per_node}", "--max-restarts=0"]
    if world.num_nodes == 1:
        place = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=alone"]  # torchrun's --standalone
    else:  # static: node 0 is where it was said to be, and a node has the ranks of its number
        place = [f"--node-rank={world.node_rank}", f"--master-addr={world.master_addr}"]
        place.append(f"--master-port={world.master_port + 1}")
    return [*sizes, *place, "-m"]


def _watch(
    process: subprocess.Popen[bytes],
    follower: Follower,
    take_signal: Callable[[], int],
    must_stop: Callable[[], str],
) -> bool:
    """Until torchrun has ended; returns whether a signal was passed on."""
    signalled, kill_at = False, 0.0
    while process.poll() is None:
        follower.follow()
        if number := take_signal():
            signalled = True
            process.send_signal(number)
        if not kill_at and must_stop():
            kill_at = time.monotonic() + GRACE_SECONDS
        if kill_at and time.monotonic() > kill_at:
            _kill_ranks(process.pid)
            kill_at += 5.0
        time.sleep(0.1)
    follower.close()
    return signalled


def _kill_ranks(torchrun: int) -> None:
    """SIGKILL what torchrun has started, so that it ends by itself; itself when it has nothing left."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(torchrun)
        children = parent.children(recursive=True)
        for process in children or [parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _how_it_ended(world: World, logs: Path, run_dir: Path, code: int, began: float, signalled: bool) -> Ended:
    node = world.node_rank
    if code == 0:
        return Ended(node, "finished", signalled=signalled)
    if signalled and (recorded := _recorded_outcome(run_dir, began)):
        return Ended(node, recorded, signalled=True)
    failed = _failed_ranks(logs / f"torchrun_node_{node}.json")
    codes = {rank["exit_code"] for rank in failed}
    if EXIT_REQUEUE in codes and codes <= {EXIT_REQUEUE, -signal.SIGTERM}:  # torchrun ends the ranks that end last
        return Ended(node, "saved", signalled=signalled)
    if signalled and codes and codes <= {-number for number in STOP_SIGNALS}:  # before they could take note of it
        return Ended(node, "interrupted", signalled=True)
    failures = [*_error_records(logs, world), *_deaths(logs, failed)]
    if failures:
        first = min(failures, key=lambda failure: failure.order)
        return Ended(node, "hung" if EXIT_HANG in codes else "failed", first, signalled)
    text = _tail(logs / f"torchrun_node_{node}.log")
    return Ended(node, "failed", Failure(time.time(), socket.gethostname(), f"node {node}", text), signalled)


def _failed_ranks(report: Path) -> list[dict[str, Any]]:
    return list(json.loads(report.read_text(encoding="utf-8"))) if report.exists() else []


def _error_records(logs: Path, world: World) -> list[Failure]:
    """What failing ranks of this node have left: `megatron_depthattn.train` writes a record before it ends."""
    found = []
    first = world.node_rank * world.processes_per_node
    for rank in range(first, first + world.processes_per_node):
        path = logs / f"error_rank_{rank:05d}.json"
        with contextlib.suppress(OSError, ValueError, KeyError):  # cut off: the rank died while it wrote
            record = json.loads(path.read_text(encoding="utf-8"))
            text = record["message"]["extraInfo"]["py_callstack"][-_MOST_TEXT:]
            flags = record["retry"], record["consequence"]
            found.append(Failure(record["time"], record["host"], f"rank {rank}", text, *flags))
    return found


def _deaths(logs: Path, failed: list[dict[str, Any]]) -> list[Failure]:
    """Ranks that ended without a record."""
    found = []
    for rank in failed:
        number, code = rank["rank"], rank["exit_code"]
        if code == EXIT_REQUEUE or (logs / f"error_rank_{number:05d}.json").exists():
            continue
        what = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        if code == EXIT_HANG:
            what += ": the watchdog found the run hung"
        if code == -signal.SIGKILL:
            what += "; if nobody did that, the host ran out of memory: see its kernel's log"
        # Neighbours fail within milliseconds, torchrun looks ten times a second: this came before what they say.
        moment = rank["time"] - (1.0 if code in _UNANNOUNCED else 0.0)
        text = f"{_tail(logs / f'rank_{number:05d}.err')}\nrank {number} (pid {rank['pid']}) ended: {what}".lstrip()
        found.append(Failure(moment, socket.gethostname(), f"rank {number}", text))
    return found


def _recorded_outcome(run_dir: Path, began: float) -> Outcome | None:
    """How this start ended by the run's own record: torchrun, told to stop, has no exit codes. None: by an error."""
    records = [record for record in read_records(run_dir / HISTORY) if record["time"] >= began]
    if not records:
        return "interrupted"
    if records[-1]["event"] != "end" or records[-1]["outcome"] not in (*DELIBERATE, "signal"):
        return None
    return "saved" if records[-1]["outcome"] == "signal" else "finished"


def _tail(path: Path, lines: int = 30) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])[-_MOST_TEXT:]
    return ""
