"""Small worlds with something wrong on rank 1, one after the other, by the preflight's own command.

    python tests/e2e/odd_worlds.py WORK CONFIG.yaml SCENARIO...

The ranks are forked from a process that has imported everything and done nothing, which saves their imports; each is a
process of its own. As under torchrun, which starts ranks again after a crash, one store outlives all of these worlds.
What they said and how they ended: WORK/<number>/result.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed

from megatron_depthattn.preflight import __main__ as command
from megatron_depthattn.preflight import run  # noqa: F401  imported once, before the forks
from tests.e2e.odd_rank import do_wrong
from tests.launch.jobs import free_port

SECONDS = 50
"""A world that has not ended by then is ended."""


def main(work: Path, config: str, scenarios: list[str]) -> None:
    launcher_port = free_port()
    launcher = keep_store(launcher_port)
    for number, scenario in enumerate(scenarios):
        fault, _, settings = scenario.partition("/")
        folder = work / str(number)
        run_dir = folder / "run"
        (run_dir / "checkpoints").mkdir(parents=True)
        arguments = [config, f"run.dir={run_dir}", *settings.split()]
        started = time.monotonic()
        is_alone = fault == "stopped, no launcher"
        port = free_port() if is_alone else launcher_port
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": str(not is_alone), "TORCHELASTIC_RESTART_COUNT": str(number)}
        ranks = [start(rank, port, fault, folder, arguments) for rank in range(2)]
        codes = [wait(ranks[0], started + SECONDS)]
        never_ends = fault.startswith("stopped") or fault == "disk that hangs"
        codes.append(wait(ranks[1], time.monotonic() + (0 if never_ends else SECONDS)))
        record = {
            "seconds": time.monotonic() - started,
            "codes": codes,
            "errors": [(folder / f"rank{rank}.err").read_text() for rank in range(2)],
            "outputs": [(folder / f"rank{rank}.out").read_text() for rank in range(2)],
            "left": sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()),
        }
        (folder / "result.json").write_text(json.dumps(record, indent=1))
    wait(launcher, 0.0)


def keep_store(port: int) -> int:
    """Fork a process that keeps a store, as torchrun does; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    time.sleep(600)
    os._exit(store is None)


def start(rank: int, port: int, fault: str, folder: Path, arguments: list[str]) -> int:
    """Fork a rank; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    sys.argv = ["preflight", *arguments]
    if rank == 1 and fault != "healthy":
        place = folder / ("run" if fault in ("read-only", "disk that hangs") else "run/checkpoints")
        do_wrong(fault.partition(",")[0], "optimizer.lr=0.5" if fault == "other config" else str(place))
    code = command.main()
    sys.stdout.flush()
    os._exit(code)


def wait(pid: int, until: float) -> int:
    """A rank's exit code; negative: the signal that ended it."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
